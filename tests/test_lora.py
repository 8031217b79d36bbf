"""Adapters: what an adapted layer computes and trains, and that peft and diffusers agree with it and with its files.

Oracles: peft (outputs, gradients, folders), diffusers (its pipeline file, its kohya converter), the published
adapters' names and shapes in tests/manifests/lora. Tolerances are in units of max(1, max|reference|), fp32 unless said.
"""

import copy
import json
import math

import peft
import pytest
import torch
from conftest import close, load_kohya
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from manifests import about, components, names_and_shapes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from nanomed import weights
from nanomed.adapters import formats, lora
from nanomed.adapters.layer import LoraConv2d, LoraLinear, LowRankLinear
from nanomed.run import files
from nanomed.training.optimizer import clip_gradients
from nanomed.weights import WeightsError

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj", "proj_out", "conv")


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.to_out[0](nn.functional.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn1, self.norm = Attention(width), nn.LayerNorm(width)
        self.ff, self.proj_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn1(self.norm(x))
        return x + self.proj_out(torch.nn.functional.gelu(self.ff(x)))


class Net(nn.Module):
    """A patch convolution, two transformer blocks, a padded and strided convolution, and two layers named proj_out."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 2, stride=2)
        self.conv = nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.proj_out = nn.Linear(width, 5)

    def forward(self, image):  # (B, 3, 8, 8)
        x = self.conv(self.proj(image)).flatten(2).transpose(1, 2)  # (B, 4, width)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def stir(params, by: float = 0.2) -> None:
    """Move the adapter away from its start, where B = 0 hides every mistake."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in params:
            param += by * torch.randn(param.shape, generator=generator).to(param)


MIXED = {"to_v": 2, "^proj_out": 6, "blocks.0.attn1.to_k": 1}
CASES = {  # inject's arguments and the same in peft's words
    "lora": (dict(rank=4), dict(r=4, lora_alpha=4)),
    "alpha is not the rank": (dict(rank=4, alpha=10), dict(r=4, lora_alpha=10)),
    "rslora": (dict(rank=4, alpha=3, kind="rslora"), dict(r=4, lora_alpha=3, use_rslora=True)),
    "dora": (dict(rank=4, alpha=6, kind="dora"), dict(r=4, lora_alpha=6, use_dora=True)),
    "rsdora": (dict(rank=4, alpha=6, kind="rsdora"), dict(r=4, lora_alpha=6, use_dora=True, use_rslora=True)),
    "mixed ranks": (
        dict(rank=4, alpha=8, rank_pattern=MIXED, alpha_pattern={"conv": 3}),
        dict(r=4, lora_alpha=8, rank_pattern=MIXED, alpha_pattern={"conv": 3}),
    ),
    "mixed ranks, dora": (
        dict(rank=4, alpha=8, kind="dora", rank_pattern={"attn1.to_.": 2}, alpha_pattern={"proj": 1.5}),
        dict(r=4, lora_alpha=8, use_dora=True, rank_pattern={"attn1.to_.": 2}, alpha_pattern={"proj": 1.5}),
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("ours, theirs", CASES.values(), ids=CASES.keys())


def in_peft(net: Net, settings: dict, state: dict | None = None) -> peft.PeftModel:
    """The same adapter by peft on a copy of the network, with our tensors in it."""
    config = peft.LoraConfig(**settings, target_modules=list(TARGETS))
    model = peft.get_peft_model(copy.deepcopy(net).requires_grad_(True), config)
    if state:
        result = peft.set_peft_model_state_dict(model, {f"base_model.model.{k}": v for k, v in state.items()})
        assert not result.unexpected_keys
    return model


# ------------------------------------------------------------------------------------------------- what is computed


@each_case
def test_outputs_and_gradients_are_those_of_peft(net, image, ours, theirs):
    """To 1e-5, through linear layers with and without bias and strided, padded convolutions; and dx too."""
    bare = copy.deepcopy(net)
    stir(lora.inject(net, targets=TARGETS, **ours))
    reference = in_peft(bare, theirs, lora.state(net))
    x, x_ref = image.clone().requires_grad_(), image.clone().requires_grad_()
    out, ref = net(x), reference(x_ref)
    close(out, ref, 1e-5)
    (out**2).sum().backward()
    (ref**2).sum().backward()
    grads = {name.replace(".default", ""): p.grad for name, p in reference.named_parameters() if p.grad is not None}
    largest = max(g.abs().max() for g in grads.values()).item()
    mine = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert {f"base_model.model.{n}" for n in mine} == {
        n.replace("magnitude_vector.weight", "magnitude_vector") for n in grads
    }
    for name, grad in mine.items():
        key = f"base_model.model.{name}"
        ref_grad = grads.get(key, grads.get(f"{key}.weight"))
        assert (grad - ref_grad).abs().max() <= 1e-5 * largest, name
    close(x.grad / largest, x_ref.grad / largest, 1e-5)


@pytest.mark.parametrize("kind", lora.KINDS)
def test_an_adapter_starts_as_nothing(net, image, kind):
    """B = 0, so the network is what it was: exactly, but for DoRA, where m / |W| is 1 up to rounding. Frozen before as
    after: PyTorch chooses the order of a product's sums by whether its factors want gradients."""
    before = net.requires_grad_(False)(image)
    lora.inject(net, 4, targets=TARGETS, kind=kind)
    after = net(image)
    close(after, before, 1e-6 if "dora" in kind else 0.0)


def test_starts_of_a():
    """gaussian: N(0, (1/r)^2). kaiming with a = sqrt 5: uniform in +-1/sqrt(fan in), as PEFT's default."""
    for init, std in (("gaussian", 1 / 8), ("kaiming", 1 / math.sqrt(3 * 4096))):
        torch.manual_seed(0)
        net = nn.ModuleDict({"a": nn.Linear(4096, 8, bias=False)})
        a, b = lora.inject(net, 8, targets=["a"], init=init)
        assert abs(a.std().item() / std - 1) < 0.02 and abs(a.mean().item()) < 0.02 * std * 3
        assert not b.any()
        if init == "kaiming":
            assert a.abs().max() <= 1 / 64
    net = nn.ModuleDict({"a": nn.Conv2d(64, 8, 8)})  # fan in 64 * 8 * 8 = 4096
    a, _ = lora.inject(net, 8, targets=["a"], init="kaiming")
    assert a.abs().max() <= 1 / 64 < 1.01 * a.abs().max()


def test_the_backward_is_right_in_double_precision():
    """Against finite differences, for every input that can ask for a gradient."""
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]
    x, w, bias, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(lambda *t: LowRankLinear.apply(*t, 0.7), (x, w, bias, a, b))
    frozen = w.detach()
    assert torch.autograd.gradcheck(lambda x, a, b: LowRankLinear.apply(x, frozen, None, a, b, 0.7), (x, a, b))
    out = LowRankLinear.apply(x.transpose(0, 1), frozen, bias, a, b, 0.7)  # not contiguous
    close(out, x.transpose(0, 1) @ (frozen + 0.7 * b @ a).t() + bias, 1e-12)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_layers_of_zeros_stay_finite(kind):
    """adaLN-Zero and zero-initialised outputs: DoRA divides by |W| = 0 there."""
    net = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Conv2d(4, 3, 1)})
    for p in net.parameters():
        nn.init.zeros_(p)
    params = lora.inject(net, 2, targets=["a", "b"], kind=kind)
    loss = net["a"](torch.randn(2, 4)).sum() + net["b"](torch.randn(1, 4, 2, 2)).sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in params)


def test_only_the_adapter_trains_and_no_gradient_of_the_base_is_computed(net, image):
    params = lora.inject(net, 2, targets=TARGETS)
    net(image).sum().backward()
    assert {id(p) for p in net.parameters() if p.grad is not None} == {id(p) for p in params}
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in params}


def test_the_unmerged_adapter_copies_nothing_and_base_names_do_not_change(net, image):
    """The very tensors, under their names; what autograd saves per layer is x, shared by q, k and v, and r numbers a
    row: never a second x, never something of the size of W."""
    before = dict(net.named_parameters())
    lora.inject(net, 2, targets=TARGETS)
    after = dict(net.named_parameters())
    assert all(after[name] is param for name, param in before.items())
    assert {n for n in after if n not in before} == lora.state(net).keys()
    assert isinstance(net.proj, LoraConv2d) and isinstance(net.proj, nn.Conv2d) and isinstance(net.proj_out, LoraLinear)

    layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))
    net = nn.ModuleDict({"layers": layers})
    params = lora.inject(net, 2, targets=["0", "1", "2"])
    x, saved = torch.randn(64, 32, requires_grad=True), {}
    owned = {p.untyped_storage().data_ptr() for p in [*params, *(layer.weight for layer in layers)]}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        sum(layer(x) for layer in layers)
    fresh = {pointer: tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in owned}
    assert fresh.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert sum(fresh.values()) == 3 * 2 * 64 * 4  # three times x A^T


# ------------------------------------------------------------------------------------------ bf16 under an fp32 adapter


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32], ids=["bf16 weights", "autocast"])
def test_fp32_adapters_on_a_network_that_computes_in_bf16(net, kind, weights_dtype):
    """Adapters stay fp32 and get fp32 gradients. The error against fp32 arithmetic is at most 1.25 times that of peft
    under autocast, which is how Med-Art trains: the same numbers are rounded to bf16."""
    image = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    stir(lora.inject(net, 4, alpha=8, targets=TARGETS, kind=kind))
    state = lora.state(net)
    lora.remove(net)
    net.to(weights_dtype)

    def ours(network):
        params = lora.inject(network, 4, alpha=8, targets=TARGETS, kind=kind)
        network.load_state_dict(state, strict=False)
        assert all(p.dtype == torch.float32 for p in params)
        return network

    def run(model, autocast):
        dtype = next(p.dtype for n, p in model.named_parameters() if n.endswith("proj.bias") or "proj.base" in n)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(image.to(dtype))
        out.float().square().mean().backward()
        params = {n.replace(".default", "").removeprefix("base_model.model."): p for n, p in model.named_parameters()}
        grads = {n.removesuffix(".weight"): p.grad for n, p in params.items() if ".lora_" in n}
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        return out.detach().float(), grads

    out_exact, grads_exact = run(ours(copy.deepcopy(net).float()), autocast=False)
    theirs = in_peft(net, dict(r=4, lora_alpha=8, use_dora=kind == "dora"))
    for name, param in theirs.named_parameters():
        param.data = param.data.float() if ".lora_" in name else param.data
    peft.set_peft_model_state_dict(theirs, {f"base_model.model.{k}": v for k, v in state.items()})
    out_theirs, grads_theirs = run(theirs, autocast=True)
    out, grads = run(ours(net), autocast=weights_dtype == torch.float32)

    def error(grads):
        return sum((grads[n] - g).square().sum() for n, g in grads_exact.items()).sqrt()

    assert 0 < (out - out_exact).norm() <= 1.25 * (out_theirs - out_exact).norm()
    assert 0 < error(grads) <= 1.25 * error(grads_theirs)


# -------------------------------------------------------------------------------------------- merge, unmerge, remove


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", lora.KINDS)
def test_merge_computes_the_same_and_unmerge_restores_every_bit(net, image, kind, dtype):
    """fp32: 1e-5. bf16: the merged weight is the exact sum rounded once, which is all that can be asked."""
    net.to(dtype)
    base = {name: p.clone() for name, p in net.named_parameters()}
    objects = dict(net.named_parameters())
    stir(lora.inject(net, 4, alpha=7, targets=TARGETS, kind=kind))
    state = {name: t.clone() for name, t in net.state_dict().items()}
    out = net(image.to(dtype))
    lora.merge(net)
    lora.merge(net)  # twice is once
    if dtype == torch.float32:
        close(net(image), out, 1e-5)
    layer = net.blocks[0].attn1.to_q
    exact = layer.base[0].double() + layer.scale * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    if "dora" in kind:
        exact *= (layer.lora_magnitude_vector / exact.norm(dim=1)).unsqueeze(1)
    eps = torch.finfo(dtype).eps
    assert ((layer.weight.double() - exact).abs() <= eps / 2 * exact.abs() + 1e-6).all()
    assert not torch.equal(layer.weight, base["blocks.0.attn1.to_q.weight"])
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name}: a state must not depend on merging"
    lora.unmerge(net)
    now = dict(net.named_parameters())
    for name, tensor in base.items():
        assert now[name] is objects[name] and torch.equal(now[name], tensor)
    assert torch.equal(net(image.to(dtype)), out)


def test_merging_and_the_backward_do_not_mind_autocast(net, image):
    """A checkpoint's images are drawn under autocast: the sum of base and adapter is fp32 all the same. And a backward
    inside the context, which torch advises against, computes in the dtypes of the forward."""
    params = lora.inject(net, 4, targets=TARGETS, kind="dora")
    stir(params)
    lora.merge(net)
    exact = net.proj_out.weight.clone()
    lora.unmerge(net)
    out = net(image).square().sum()
    out.backward(retain_graph=True)
    grads = [p.grad.clone() for p in lora.parameters(net.proj_out)]
    with torch.autocast("cpu", torch.bfloat16), lora.merged(net):
        assert torch.equal(net.proj_out.weight, exact)
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(lora.parameters(net.proj_out), grads, strict=True))


def test_merged_for_a_while_then_training_goes_on(net, image):
    params = lora.inject(net, 4, targets=TARGETS)
    stir(params)
    out = net(image)
    with torch.inference_mode(), lora.merged(net):
        close(net(image), out, 1e-5)
    net(image).sum().backward()
    assert all(p.grad is not None for p in params)
    with pytest.raises(RuntimeError, match="mid-drawing"), lora.merged(net):
        raise RuntimeError("mid-drawing")
    assert torch.equal(net(image), out)


@pytest.mark.parametrize("kind", lora.KINDS)
def test_fold_leaves_plain_layers(net, image, kind):
    stir(lora.inject(net, 4, alpha=7, targets=TARGETS, kind=kind))
    out = net(image)
    lora.fold(net)
    close(net(image), out, 1e-5)
    assert {type(m) for m in net.modules()} == {type(m) for m in Net().modules()}
    assert net.state_dict().keys() == Net().state_dict().keys()


def test_remove_gives_the_network_back(net, image):
    net.requires_grad_(False)
    out, state = net(image), copy.deepcopy(net.state_dict())
    stir(lora.inject(net, 4, targets=TARGETS, kind="dora"))
    lora.merge(net)
    lora.remove(net)
    assert torch.equal(net(image), out)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    lora.inject(net, 2)  # and it can be adapted again
    with pytest.raises(ValueError, match="has no adapter"):
        lora.merge(Net())


def test_merging_a_tied_weight_leaves_its_twin_alone():
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    net["b"].weight = net["a"].weight
    stir(lora.inject(net, 2, targets=["a"]))
    before = net["b"].weight.clone()
    lora.merge(net)
    assert torch.equal(net["b"].weight, before) and not torch.equal(net["a"].weight, before)
    lora.unmerge(net)
    assert net["a"].weight is net["b"].weight


def test_a_base_checkpoint_loads_strictly_with_and_without_the_adapter(net, image):
    """Also into a merged network; the adapter stays, parameter by parameter. Half an adapter is refused."""
    other = Net().state_dict()
    net.load_state_dict(other, strict=True)
    for assign in (False, True):
        for merge in (False, True):
            network = copy.deepcopy(net)
            params = lora.inject(network, 2, targets=TARGETS, kind="dora")
            stir(params)
            state = {name: t.clone() for name, t in lora.state(network).items()}
            if merge:
                lora.merge(network)
            changed = {name: tensor + 1 for name, tensor in other.items()}
            network.load_state_dict(changed, strict=True, assign=assign)
            assert all(now is then for now, then in zip(lora.parameters(network), params, strict=True))
            for name, tensor in (changed | state).items():
                assert torch.equal(network.state_dict()[name], tensor), name
    half = {name: tensor for name, tensor in network.state_dict().items() if "lora_B" not in name}
    with pytest.raises(RuntimeError, match="Missing key.*lora_B"):
        network.load_state_dict(half)
    with pytest.raises(RuntimeError, match="Unexpected key.*lora_A"):
        net.load_state_dict(network.state_dict())


def test_deep_copies_pickles_and_compiled_networks_keep_their_adapter(net, image, tmp_path):
    stir(lora.inject(net, 2, targets=TARGETS, kind="dora"))
    out = net(image)
    assert torch.equal(copy.deepcopy(net)(image), out)
    torch.save(net, tmp_path / "net.pt")
    assert torch.equal(torch.load(tmp_path / "net.pt", weights_only=False)(image), out)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled_out = compiled(image)
    close(compiled_out, out, 1e-5)
    out.square().sum().backward()
    grads = [p.grad.clone() for p in lora.parameters(net)]
    net.zero_grad()
    compiled_out.square().sum().backward()
    for param, grad in zip(lora.parameters(net), grads, strict=True):
        close(param.grad, grad, 1e-5)


def test_checkpointed_blocks_give_the_same_gradients(net):
    x = torch.randn(2, 4, 16)
    params = lora.inject(net, 2, targets=TARGETS)
    stir(params)
    net.blocks[0](x).square().sum().backward()
    grads = [p.grad.clone() for p in net.blocks[0].parameters() if p.requires_grad]
    net.zero_grad()
    torch.utils.checkpoint.checkpoint(net.blocks[0], x, use_reentrant=False).square().sum().backward()
    for param, grad in zip([p for p in net.blocks[0].parameters() if p.requires_grad], grads, strict=True):
        assert torch.equal(param.grad, grad)


def test_clipping_sees_every_tensor_of_the_adapter(net, image):
    """Published LoRA scripts clip the frozen parameters, a no-op. Here: norm 4e4 becomes 1, and the count is told."""
    params = lora.inject(net, 4, targets=TARGETS, kind="dora")
    stir(params)
    net(image).square().sum().backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in params]))
    for p in params:
        p.grad *= 4e4 / norm
    before, count = clip_gradients(params, 1.0)
    assert count == len(params) == 3 * len([m for m in net.modules() if isinstance(m, (LoraLinear, LoraConv2d))])
    assert abs(before.item() / 4e4 - 1) < 1e-5
    after = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in params]))
    assert abs(after.item() - 1) < 1e-5


# ----------------------------------------------------------------------------------------------------- which layers


def standin(component: str) -> nn.Module:
    """A module on the meta device with the names and shapes of a published network: what `inject` looks at."""
    root = nn.Module()
    shapes = names_and_shapes(component)
    with torch.device("meta"):
        for name, shape in shapes.items():
            path, leaf = name.rpartition(".")[::2]
            parent = root
            for part in path.split(".")[:-1] if path else []:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            last = path.rpartition(".")[2]
            if leaf == "weight" and len(shape) in (2, 4) and f"{path}.{leaf}" == name:
                bias = f"{path}.bias" in shapes
                if len(shape) == 2:
                    parent.add_module(last, nn.Linear(shape[1], shape[0], bias=bias))
                else:
                    parent.add_module(last, nn.Conv2d(shape[1], shape[0], shape[2:], bias=bias))
            elif path and last not in parent._modules:
                parent.add_module(last, nn.Module())
    return root


MEDART = "to_k to_q to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 proj linear linear_1 linear_2".split()


def test_medart_has_287_modules_and_6882688_parameters_in_the_dit():
    """Targets exactly as the released script lists them; the one that PixArt does not have is only warned about."""
    net = standin("pixart_alpha_xl2_512x512")
    with pytest.warns(UserWarning, match="no layer has: proj_in;"):
        params = lora.inject(net, 8, targets=MEDART)
    assert len(params) == 2 * 287 and sum(p.numel() for p in params) == 6_882_688


def test_medart_has_120_modules_and_9043968_parameters_in_t5():
    """The script's "wi" matches nothing: T5 v1.1 has wi_0 and wi_1."""
    net = standin("t5_v1_1_xxl_encoder")
    with pytest.warns(UserWarning, match="no layer has: wi;"):
        params = lora.inject(net, 8, targets=["q", "k", "v", "o", "wi", "wo"])
    assert len(params) == 2 * 120 and sum(p.numel() for p in params) == 9_043_968


@pytest.mark.parametrize("rank", [1, 4, 128])
@pytest.mark.parametrize(
    "component, per_rank",
    [("kandinsky22_prior_transformer", 327_680), ("kandinsky22_decoder_unet", 205_824), ("kandinsky3_unet", 417_792)],
)
def test_kandinsky_counts_are_the_papers(component, per_rank, rank):
    assert sum(p.numel() for p in lora.inject(standin(component), rank)) == per_rank * rank


@pytest.mark.parametrize("adapter", [name for name in components() if name.startswith("lora/")])
def test_names_and_shapes_are_those_of_published_adapters(adapter):
    head = about(adapter)
    net = standin(head["base"])
    targets = [t for t in head["target_modules"] if any(n == t or n.endswith(f".{t}") for n, _ in net.named_modules())]
    lora.inject(net, head["r"], alpha=head["lora_alpha"], targets=targets)
    ours = {f"base_model.model.{name}": tuple(t.shape) for name, t in lora.state(net).items()}
    assert ours == names_and_shapes(adapter)
    assert formats.config(net)["target_modules"] == sorted(formats.config(net)["target_modules"])


def test_suffixes_begin_at_a_dot(net):
    lora.inject(net, 2, targets=["proj"])
    assert {name.rpartition(".lora_")[0] for name in lora.state(net)} == {"proj"}  # not proj_out


def test_what_cannot_be_adapted_is_said(net):
    with pytest.raises(ValueError, match=r"no layer of Net is named qkv: its layers are named .*to_out\.0"):
        lora.inject(net, 4, targets=["qkv"])
    with pytest.raises(ValueError, match="norm is a LayerNorm"):
        lora.inject(net, 4, targets=["to_q", "norm"])
    with pytest.raises(ValueError, match="4 groups"):
        lora.inject(nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, groups=4)}), 2, targets=["a"])
    with pytest.raises(ValueError, match="a is a Own"):  # it may read its weight in its own way

        class Own(nn.Linear): ...

        lora.inject(nn.ModuleDict({"a": Own(4, 4)}), 2, targets=["a"])
    with pytest.raises(ValueError, match="rank 0 of blocks.1.attn1.to_v"):
        lora.inject(net, 4, rank_pattern={"1.attn1.to_v": 0})
    with pytest.raises(ValueError, match="kind='lokr'"):
        lora.inject(net, 4, kind="lokr")
    assert all(type(m) is not LoraLinear for m in net.modules())
    lora.inject(net, 4)
    with pytest.raises(ValueError, match="has an adapter already"):
        lora.inject(net, 4, targets=["proj"])


# -------------------------------------------------------------------------------------------------------- PEFT folders


@each_case
def test_peft_reads_our_folder(net, image, tmp_path, ours, theirs):
    bare = copy.deepcopy(net)
    stir(lora.inject(net, targets=TARGETS, **ours))
    formats.save_peft(tmp_path / "a", net)  # a base model's name would make peft look for it on the net
    model = peft.PeftModel.from_pretrained(bare, tmp_path / "a")
    close(model(image), net(image), 1e-5)
    formats.save_peft(tmp_path / "c", net, base_model="org/net")
    assert peft.PeftConfig.from_pretrained(tmp_path / "c").base_model_name_or_path == "org/net"
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    model.save_pretrained(tmp_path / "b")
    again = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert written.keys() == again.keys() and all(torch.equal(written[k], again[k]) for k in written)


@each_case
def test_we_read_peft_folders(net, image, tmp_path, ours, theirs):
    model = in_peft(net, theirs)
    stir(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    params = formats.load_peft(tmp_path, net)
    close(net(image), model(image), 1e-5)
    assert all(p.requires_grad for p in params) and sum(p.requires_grad for p in net.parameters()) == len(params)
    formats.save_peft(tmp_path / "again", net)
    first, second = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_target_modules_choose_the_same_layers_in_peft(net, tmp_path):
    """Endings where they are enough, names where not, an expression where a name is another's ending."""
    for chosen, written in [
        (("to_q", "conv"), ["conv", "to_q"]),
        (("blocks.0.attn1.to_q", "to_k"), ["blocks.0.attn1.to_k", "blocks.0.attn1.to_q", "blocks.1.attn1.to_k"]),
        (("proj_out",), ["proj_out"]),
    ]:
        network = copy.deepcopy(net)
        lora.inject(network, 2, targets=chosen)
        assert formats.config(network)["target_modules"] == written
    network = copy.deepcopy(net)  # only the outermost proj_out, whose name is the ending of others
    lora.inject(network, 2, targets=["blocks.0.attn1.to_q"])
    state = {
        "base_model.model.proj_out.lora_A.weight": torch.randn(3, 16),
        "base_model.model.proj_out.lora_B.weight": torch.randn(5, 3),
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    files.write_json(
        tmp_path / "adapter_config.json",
        {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["^proj_out"]},
    )
    network = copy.deepcopy(net)
    formats.load_peft(tmp_path, network)
    formats.save_peft(tmp_path / "again", network)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "again")
    assert sum(".lora_A." in name for name, _ in model.named_parameters()) == 1


def test_peft_pickles_are_read_as_plain_tensors(net, image, tmp_path):
    """What `safe_serialization=False` leaves, as the Kandinsky 2.2 decoder scripts of MMCP do."""
    model = in_peft(net, dict(r=4, lora_alpha=8))
    stir(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path, safe_serialization=False)
    if not (tmp_path / "adapter_model.bin").exists():  # peft has stopped writing them
        torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
    formats.load_peft(tmp_path, net)
    close(net(image), model(image), 1e-5)


# ----------------------------------------------------------------------------------------------- diffusers, kohya


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


UNET_TARGETS = (*lora.ATTENTION, "ff.net.0.proj", "proj_in", "conv1")
UNET_CASES = {
    "alpha is the rank": dict(rank=4),
    "alpha is not the rank": dict(rank=4, alpha=10),
    "mixed ranks": dict(rank=4, alpha=6, rank_pattern={"to_v": 2, "conv1": 3}, alpha_pattern={"to_k": 9}),
    "rslora": dict(rank=4, alpha=10, kind="rslora"),
    "dora": dict(rank=4, alpha=10, kind="dora"),
}
each_unet_case = pytest.mark.parametrize("ours", UNET_CASES.values(), ids=UNET_CASES.keys())


def draw(unet, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([3, 700]), text).sample


@each_unet_case
def test_diffusers_reads_our_file(unet, tmp_path, ours):
    ours_net, theirs = copy.deepcopy(unet), copy.deepcopy(unet)
    stir(lora.inject(ours_net, targets=UNET_TARGETS, **ours), by=0.1)
    formats.save_diffusers(tmp_path, {"unet": ours_net})
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, theirs, metadata=metadata)
    close(draw(ours_net), draw(theirs), 1e-5)
    assert (draw(ours_net) - draw(unet)).abs().max() > 0.05  # the adapter does something
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
        assert file.metadata()["format"] == "pt"
    assert settings["unet.lora_alpha"] == ours.get("alpha", 4) and settings["unet.r"] == 4

    again = copy.deepcopy(unet)
    formats.load_diffusers(tmp_path, {"unet": again})
    assert all(torch.equal(t, lora.state(again)[n]) for n, t in lora.state(ours_net).items())
    assert torch.equal(draw(again), draw(ours_net))


@each_unet_case
def test_we_read_what_diffusers_writes(unet, tmp_path, ours):
    """The pipeline's own writer, with the metadata it collects, after peft has injected the adapter."""
    theirs, ours_net = copy.deepcopy(unet), copy.deepcopy(unet)
    kind = ours.get("kind", "lora")
    theirs.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=ours.get("alpha", 4), target_modules=list(UNET_TARGETS), use_dora=kind == "dora",
            use_rslora=kind == "rslora", rank_pattern=ours.get("rank_pattern", {}),
            alpha_pattern=ours.get("alpha_pattern", {}),
        )
    )  # fmt: skip
    stir((p for n, p in theirs.named_parameters() if ".lora_" in n), by=0.1)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, peft.get_peft_model_state_dict(theirs),
        unet_lora_adapter_metadata=json.loads(json.dumps(theirs.peft_config["default"].to_dict(), default=list)),
    )  # fmt: skip
    formats.load_diffusers(tmp_path, {"unet": ours_net})
    close(draw(ours_net), draw(theirs), 1e-5)


def peft_unet(unet, rank=4):
    """A unet with peft's adapter, alpha = rank, and its tensors."""
    model = copy.deepcopy(unet)
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(lora.ATTENTION)))
    stir(p for n, p in model.named_parameters() if ".lora_" in n)
    return model, peft.get_peft_model_state_dict(model)


def test_older_diffusers_spellings_are_read(unet, tmp_path):
    """Files of 2023: `.lora.down.`, the attention processors' `_lora.down.` with and without "unet.", and no alpha
    anywhere, which there means the rank; raw PEFT keys; Med-Art's `unet.base_model.model.`."""
    model, state = peft_unet(unet)
    down_up = convert_state_dict_to_diffusers(state)
    assert any(".lora.down.weight" in key for key in down_up)
    old = {}
    for key, tensor in down_up.items():
        path, _, rest = key.partition(".lora.")
        head, last = path.removesuffix(".0").rsplit(".", 1)
        old[f"{head}.processor.{last}_lora.{rest}"] = tensor
    spellings = {
        "down": {f"unet.{k}": t for k, t in down_up.items()},
        "processors": {f"unet.{k}": t for k, t in old.items()},
        "attn_procs": old,
        "peft": {f"unet.{k}": t for k, t in state.items()},
        "named": {f"unet.{k.replace('.weight', '.default.weight')}": t for k, t in state.items()},
        "medart": {f"unet.base_model.model.{k}": t for k, t in state.items()},
    }
    for name, tensors in spellings.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        ours = copy.deepcopy(unet)
        formats.load_diffusers(tmp_path / f"{name}.safetensors", {"unet": ours})
        close(draw(ours), draw(model), 1e-5)
    half = {k: t.half() for k, t in spellings["peft"].items()}  # fp16 files become fp32 adapters
    save_file(half, tmp_path / "half.safetensors")
    ours = copy.deepcopy(unet)
    assert all(p.dtype == torch.float32 for p in formats.load_diffusers(tmp_path / "half.safetensors", {"unet": ours}))


class Text(nn.Module):
    """The names of a CLIP text encoder's attention."""

    def __init__(self):
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.layers = nn.ModuleList([nn.Module()])
        self.text_model.layers[0].self_attn = attention = nn.Module()
        for name in ("q_proj", "out_proj"):
            attention.add_module(name, nn.Linear(6, 6))


@pytest.mark.parametrize(
    "spelling",
    ["{0}.q_proj.lora_linear_layer.{1}.weight", "{0}.to_q_lora.{1}.weight", "{0}.q_proj.lora_{2}.weight"],
)
@pytest.mark.parametrize("root", ["text_model.layers.0.self_attn", "layers.0.self_attn"])
def test_text_encoder_spellings_are_read(tmp_path, spelling, root):
    """Also without "text_model.", as adapters trained under transformers 5 have it."""
    down, up = torch.randn(2, 6), torch.randn(6, 2)
    tensors = {
        spelling.format(f"text_encoder.{root}", "down", "A"): down,
        spelling.format(f"text_encoder.{root}", "up", "B"): up,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    text = Text()
    formats.load_diffusers(tmp_path / "a.safetensors", {"text_encoder": text})
    attention = text.text_model.layers[0].self_attn
    assert torch.equal(attention.q_proj.lora_A.weight, down) and torch.equal(attention.q_proj.lora_B.weight, up)
    assert attention.q_proj.scale == 1 and type(attention.out_proj) is nn.Linear


def test_one_file_for_several_parts(unet, tmp_path):
    """Every part's keys go to that part, and a part that nobody asked for is an error, not silence."""
    net, text = copy.deepcopy(unet), Text()
    stir([*lora.inject(net, 4, alpha=5), *lora.inject(text, 2, alpha=3, targets=["q_proj"], kind="dora")])
    parts = {"unet": net, "text_encoder": text}
    for save, load in ((formats.save_diffusers, formats.load_diffusers), (formats.save_kohya, load_kohya)):
        path = tmp_path / f"{save.__name__}.safetensors"
        save(path, parts)
        again = {"unet": copy.deepcopy(unet), "text_encoder": Text()}
        assert len(load(path, again)) == len(lora.parameters(net)) + 3
        for name, part in again.items():
            assert all(torch.equal(t, lora.state(parts[name])[n]) for n, t in lora.state(part).items())
            assert [m.alpha for m in part.modules() if hasattr(m, "alpha")] == [
                m.alpha for m in parts[name].modules() if hasattr(m, "alpha")
            ]
        with pytest.raises(
            WeightsError, match="(3|4) keys .* have no place in UNet2DConditionModel; nothing was loaded"
        ):
            load(path, {"unet": copy.deepcopy(unet)})


def test_medarts_t5_adapter_is_under_unet(tmp_path):
    """Its script saves both parts with the Stable Diffusion helper, so T5's keys begin with "unet."."""
    t5 = nn.ModuleDict({"encoder": nn.ModuleDict({"q": nn.Linear(4, 4, bias=False)})})
    tensors = {
        f"unet.base_model.model.encoder.q.lora_{k}.weight": torch.randn(s) for k, s in (("A", (2, 4)), ("B", (4, 2)))
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    formats.load_diffusers(tmp_path, {"text_encoder": t5})
    assert torch.equal(t5["encoder"]["q"].lora_A.weight, tensors["unet.base_model.model.encoder.q.lora_A.weight"])


@pytest.mark.parametrize("ours", [dict(rank=4, alpha=10), dict(rank=4, alpha=10, kind="rslora"),
                                  dict(rank=4, alpha=6, rank_pattern={"to_v": 2})])  # fmt: skip
def test_diffusers_reads_our_kohya_file(unet, tmp_path, ours):
    """Through its converter from kohya's keys; rsLoRA travels in alpha. (It drops DoRA's scales and, in attention,
    alphas that differ from layer to layer: the next test has those.)"""
    ours_net, theirs = copy.deepcopy(unet), copy.deepcopy(unet)
    stir(lora.inject(ours_net, targets=lora.ATTENTION, **ours), by=0.1)
    formats.save_kohya(tmp_path / "a.safetensors", {"unet": ours_net})
    state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path / "a.safetensors")
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, theirs)
    close(draw(ours_net), draw(theirs), 1e-5)


@each_unet_case
def test_kohya_files_mean_what_the_format_says(unet, tmp_path, ours):
    """The definition, applied here in float64 to a bare network: W + alpha / r up down, and with a scale d of DoRA,
    d (W + ...) / |W + ...| over the inputs (ComfyUI's and LyCORIS' formula)."""
    net, folded = copy.deepcopy(unet), copy.deepcopy(unet)
    stir(lora.inject(net, targets=UNET_TARGETS, **ours), by=0.1)
    formats.save_kohya(tmp_path / "a.safetensors", {"unet": net})
    tensors = {key: tensor.double() for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    for name, layer in folded.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.alpha" not in tensors:
            continue
        down, up = tensors.pop(f"{key}.lora_down.weight"), tensors.pop(f"{key}.lora_up.weight")
        delta = tensors.pop(f"{key}.alpha") / down.shape[0] * up.flatten(1) @ down.flatten(1)
        weight = layer.weight.double() + delta.view_as(layer.weight)
        if f"{key}.dora_scale" in tensors:
            norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
            weight = weight * (tensors.pop(f"{key}.dora_scale") / norm)
        layer.weight.data = weight.float()
    assert not tensors
    close(draw(net), draw(folded), 1e-5)


@each_unet_case
def test_kohya_files_come_back(unet, tmp_path, ours):
    net, again = copy.deepcopy(unet), copy.deepcopy(unet)
    stir(lora.inject(net, targets=UNET_TARGETS, **ours), by=0.1)
    formats.save_kohya(tmp_path / "a.safetensors", {"unet": net})
    tensors = load_file(tmp_path / "a.safetensors")
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{key}.alpha"].shape == () and tensors[f"{key}.lora_down.weight"].shape == (4, 8)
    if (
        ours.get("kind") == "dora"
    ):  # one column, as LyCORIS and ComfyUI take it: (out, 1), of convolutions (out, 1, 1, 1)
        assert tensors[f"{key}.dora_scale"].shape == (8, 1)
        assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.dora_scale"].shape == (8, 1, 1, 1)
    load_kohya(tmp_path / "a.safetensors", {"unet": again})
    close(draw(again), draw(net), 1e-5)


def test_kohya_without_alpha_has_scale_one_and_1x1_convolutions_read_as_linear(tmp_path):
    net = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(4, 3)})})
    a, b = torch.randn(2, 4, 1, 1), torch.randn(3, 2, 1, 1)
    save_file({"lora_unet_a_b_c.lora_down.weight": a, "lora_unet_a_b_c.lora_up.weight": b}, tmp_path / "a.safetensors")
    load_kohya(tmp_path / "a.safetensors", {"unet": net})
    layer = net["a_b"]["c"]
    assert layer.scale == 1 and torch.equal(layer.lora_A.weight, a[:, :, 0, 0])


def test_kohya_underscores_that_mean_two_layers_are_refused(tmp_path):
    net = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(4, 4)}), "a": nn.ModuleDict({"b_c": nn.Linear(4, 4)})})
    one = copy.deepcopy(net)
    lora.inject(one, 2, targets=["a_b.c"])
    formats.save_kohya(tmp_path / "a.safetensors", {"unet": one})
    with pytest.raises(WeightsError, match=r"a_b_c may be a\.b_c or a_b\.c"):
        load_kohya(tmp_path / "a.safetensors", {"unet": net})
    with pytest.raises(ValueError, match="one denoiser"):
        formats.save_kohya(tmp_path / "b.safetensors", {"prior": one, "unet": one})
    lora.inject(net, 2, targets=["c", "b_c"])
    with pytest.raises(ValueError, match="two layers are lora_unet_a_b_c"):
        formats.save_kohya(tmp_path / "b.safetensors", {"unet": net})


def test_mixed_ranks_without_alpha_keep_scale_one(tmp_path, net):
    """diffusers #14409: such files were loaded at a quarter of their strength."""
    tensors = {}
    for name, rank in (("blocks.0.attn1.to_q", 2), ("blocks.0.attn1.to_k", 8)):
        tensors |= {
            f"unet.{name}.lora_A.weight": torch.randn(rank, 16),
            f"unet.{name}.lora_B.weight": torch.randn(16, rank),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    formats.load_diffusers(tmp_path / "a.safetensors", {"unet": net})
    assert net.blocks[0].attn1.to_q.scale == net.blocks[0].attn1.to_k.scale == 1


# ------------------------------------------------------------------------------------------------------- bad files


def broken(tensors, config, what):
    a, b = "base_model.model.blocks.0.attn1.to_q.lora_A.weight", "base_model.model.blocks.0.attn1.to_q.lora_B.weight"
    if what == "layer":
        tensors["base_model.model.blocks.7.attn1.to_q.lora_A.weight"] = tensors[a].clone()
    elif what == "spelling":
        tensors["base_model.model.blocks.0.attn1.to_q.hada_w1_a"] = tensors[a].clone()
    elif what == "bias":
        tensors["base_model.model.blocks.0.attn1.to_q.bias"] = torch.zeros(16)
    elif what == "not adaptable":
        tensors["base_model.model.blocks.0.norm.lora_A.weight"] = tensors[a].clone()
    elif what == "half":
        del tensors[b]
    elif what == "shape":
        tensors[a] = torch.zeros(4, 15)
    elif what == "ranks differ":
        tensors[b] = torch.zeros(16, 3)
    elif what == "integers":
        tensors[a] = torch.zeros(4, 16, dtype=torch.int64)
    elif what == "rank":
        config["r"] = 8
    elif what == "dora":
        config["use_dora"] = True
    elif what == "magnitude":
        config["use_dora"] = True
        tensors |= {
            k.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3) for k in tensors if "lora_A" in k
        }
    elif what == "not lora":
        config["peft_type"] = "LOHA"
    elif what == "foreign":
        config["use_qalora"] = True
    elif what == "alpha":
        config["lora_alpha"] = "much"
    elif what == "infinite alpha":
        config["lora_alpha"] = "inf"
    elif what == "no alpha":
        del config["lora_alpha"]
    elif what == "pattern":
        config["rank_pattern"] = {"(": 4}
    elif what == "twice":
        tensors[a.replace("lora_A", "lora_A.default")] = tensors[a].clone()


@pytest.mark.parametrize(
    "what, message",
    [
        (
            "layer",
            r"1 keys \(base_model.model.blocks.7.attn1.to_q.lora_A.weight\) have no place in Net; nothing was loaded",
        ),
        ("spelling", "hada_w1_a.* have no place"),
        ("bias", r"to_q\.bias.* have no place"),
        ("not adaptable", "norm.* have no place"),
        ("half", "blocks.0.attn1.to_q has A, but an adapter is A and B at least"),
        ("shape", r"A is torch.float32 \(4, 15\), the layer asks for \(4, 16\)"),
        ("ranks differ", r"B is torch.float32 \(16, 3\), the layer asks for \(16, 4\)"),
        ("integers", "A is torch.int64"),
        ("rank", "rank 4, but its settings say rank 8"),
        ("dora", "use_dora contradict"),
        ("magnitude", r"magnitude is \(3,\), not one per output channel"),
        ("not lora", "not a LoRA but LOHA"),
        ("infinite alpha", "alpha inf"),
        ("no alpha", "are not said .KeyError: .lora_alpha"),
        ("foreign", "made with use_qalora"),
        ("alpha", "rank and alpha are not said"),
        ("pattern", "rank and alpha are not said"),
        ("twice", "has two tensors A"),
    ],
)
def test_bad_adapters_are_refused_and_change_nothing(net, image, tmp_path, what, message):
    lora.inject(net, 4)
    formats.save_peft(tmp_path, net)
    lora.remove(net)
    net.requires_grad_(True)
    out = net(image)
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    broken(tensors, config, what)
    files.write_json(tmp_path / "adapter_config.json", config)
    files.write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(WeightsError, match=message) as caught:
        formats.load_peft(tmp_path, net)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(net(image), out) and all(p.requires_grad for p in net.parameters())
    assert all(type(m) is not LoraLinear for m in net.modules())


def test_files_that_are_missing_or_damaged(net, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        formats.load_peft(tmp_path / "nowhere", net)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(WeightsError, match="adapter_config.json is not JSON"):
        formats.load_peft(tmp_path, net)
    lora.inject(net, 4)
    formats.save_peft(tmp_path, net)
    with pytest.raises(ValueError, match="has an adapter already"):
        formats.load_peft(tmp_path, net)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(WeightsError, match="adapter_model.safetensors: .*not complete"):
        formats.load_peft(tmp_path, Net())


def test_dora_in_some_layers_only_is_refused(tmp_path):
    """No format but kohya's can say it, so it could not be saved again."""
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    lora.inject(net, 2, targets=["a", "b"], kind="dora")
    formats.save_kohya(tmp_path / "a.safetensors", {"unet": net})
    tensors = load_file(tmp_path / "a.safetensors")
    del tensors["lora_unet_b.dora_scale"]
    save_file(tensors, tmp_path / "a.safetensors")
    lora.remove(net)
    with pytest.raises(WeightsError, match="DoRA in some layers"):
        load_kohya(tmp_path / "a.safetensors", {"unet": net})


def test_kohya_dora_over_the_inputs_is_refused(tmp_path):
    """Early LyCORIS files normalise over the other axis: another function, not another layout."""
    tensors = {"lora_unet_a.lora_down.weight": torch.randn(2, 4), "lora_unet_a.lora_up.weight": torch.randn(4, 2),
               "lora_unet_a.dora_scale": torch.ones(1, 4)}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="not one per output channel"):
        load_kohya(tmp_path / "a.safetensors", {"unet": nn.ModuleDict({"a": nn.Linear(4, 4)})})


def test_files_can_be_written_over_while_their_tensors_are_in_use(net, image, tmp_path):
    """A mapped file written anew has zeroed adapters elsewhere: loaded tensors are copies, files are renamed."""
    stir(lora.inject(net, 4))
    formats.save_peft(tmp_path, net)
    again = Net()
    again.load_state_dict({k: v for k, v in net.state_dict().items() if ".lora_" not in k})
    formats.load_peft(tmp_path, again)
    out = again(image)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(again(image), out)


def test_fingerprints_do_not_depend_on_merging(net):
    stir(lora.inject(net, 4))
    print_before = weights.fingerprint(net)
    lora.merge(net)
    assert weights.fingerprint(net) == print_before
    lora.fold(net)
    assert weights.fingerprint(net) != print_before

"""DiT against diffusers' DiTTransformer2DModel, and its loss against the published one written out."""

import argparse
import json
import math

import diffusers
import numpy as np
import pytest
import torch
from conftest import close
from manifests import about, config, names_and_shapes
from safetensors.torch import save_file
from torch import Tensor

from nanomed import weights
from nanomed.denoisers.dit import OPTIONAL, PUBLISHED_GUIDED_CHANNELS, DiT, DiTConfig, load_dit, positions
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Diffusion
from nanomed.diffusion.variational import hybrid_loss

KINDS = {
    "/2": DiTConfig(3, 48, 2, 2, num_classes=8, input_size=12),
    "/4": DiTConfig(2, 32, 4, 4, num_classes=7, input_size=24),
    "/8": DiTConfig(1, 64, 4, 8, in_channels=3, num_classes=2, input_size=16, learn_sigma=False),
}


def published(tensors: dict[str, Tensor], c: DiTConfig) -> dict[str, Tensor]:
    """diffusers' names (or gradients under them) as those of the published files: the known renaming."""
    renamed, first = {}, "transformer_blocks.0.norm1.emb"
    pairs = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{first}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{first}.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(c.depth):
        here, there = f"blocks.{i}", f"transformer_blocks.{i}"
        pairs |= {f"{here}.attn.proj": f"{there}.attn1.to_out.0", f"{here}.mlp.fc1": f"{there}.ff.net.0.proj",
                  f"{here}.mlp.fc2": f"{there}.ff.net.2",
                  f"{here}.adaLN_modulation.1": f"{there}.norm1.linear"}  # fmt: skip
        for kind in ("weight", "bias"):
            parts = [tensors[f"{there}.attn1.to_{x}.{kind}"] for x in "qkv"]
            renamed[f"{here}.attn.qkv.{kind}"] = torch.cat(parts)
    renamed |= {
        f"{here}.{kind}": tensors[f"{there}.{kind}"] for here, there in pairs.items() for kind in ("weight", "bias")
    }
    renamed["y_embedder.embedding_table.weight"] = tensors[f"{first}.class_embedder.embedding_table.weight"]
    return renamed


def pair(kind: str, dtype: torch.dtype = torch.float32) -> tuple[diffusers.DiTTransformer2DModel, DiT]:
    """diffusers' network at its default initialisation, and ours with the same weights.

    diffusers keeps an embedder of time and class in every block, all alike in its conversions: here one. Its defaults
    are not the published network's in two numbers, which are set here: the spacing of the frequencies of time (127
    instead of 128 steps), and an epsilon of 1e-5 in the second LayerNorm.
    """
    c = KINDS[kind]
    torch.manual_seed(0)
    reference = diffusers.DiTTransformer2DModel(
        c.num_heads, c.hidden_size // c.num_heads, c.in_channels, c.out_channels, c.depth, sample_size=c.input_size,
        patch_size=c.patch_size, num_embeds_ada_norm=c.num_classes, norm_eps=1e-6,
    ).eval()  # fmt: skip
    shared = reference.transformer_blocks[0].norm1.emb
    shared.time_proj.downscale_freq_shift = 0
    for block in reference.transformer_blocks:
        block.norm1.emb = shared
    tensors = {name: tensor.clone() for name, tensor in published(reference.state_dict(), c).items()}
    return reference.to(dtype), weights.load(DiT(c), tensors).eval().to(dtype)


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and labels, of which the last is the null class."""
    c = KINDS[kind]
    labels = torch.tensor([0, 1, c.num_classes])
    return torch.randn(3, c.in_channels, c.input_size, c.input_size).to(dtype), torch.tensor([999, 0, 421]), labels


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_diffusers(kind, dtype, tolerance):
    reference, ours = pair(kind, dtype)
    x, t, labels = inputs(kind, dtype)
    x.requires_grad_()
    out, expected = ours(x, t, labels), reference(x, t, labels).sample
    close(out, expected, tolerance)
    probe = torch.randn_like(out)
    (mine,) = torch.autograd.grad((out * probe).sum(), x, retain_graph=True)
    (yours,) = torch.autograd.grad((expected * probe).sum(), x, retain_graph=True)
    assert (mine - yours).abs().max() <= 10 * tolerance * yours.abs().max()
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients = published({name: p.grad for name, p in reference.named_parameters()}, KINDS[kind])
    largest = max(g.abs().max() for g in gradients.values())
    assert gradients.keys() == {name for name, _ in ours.named_parameters()} and largest > 0
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 10 * tolerance * largest, name


def test_positions_equal_diffusers():
    expected = diffusers.models.embeddings.get_2d_sincos_pos_embed(48, 8, base_size=8, output_type="pt").float()
    close(positions(8, 8, 48)[0], expected, 1e-7)
    assert positions(6, 9, 48).shape == (1, 54, 48)


def test_images_that_are_not_square_are_drawn_row_by_row():
    """A patch changes the output only through attention: without it, each patch knows its own place alone."""
    _, ours = pair("/2")
    for block in ours.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    x, t, labels = torch.randn(1, 4, 6, 10), torch.tensor([3]), torch.tensor([1])
    moved = x.clone()
    moved[..., 2:4, 6:8] += 1
    with torch.no_grad():
        change = (ours(moved, t, labels) - ours(x, t, labels)).abs().amax((0, 1)) > 1e-6
    expected = torch.zeros(6, 10, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal(change, expected)
    with pytest.raises(ValueError, match="patches of 2"):
        ours(torch.randn(1, 4, 5, 6), t, labels)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        _, ours = pair("/2")
        ours.checkpointing = checkpointing
        torch.manual_seed(1)
        ours(*inputs("/2")).square().sum().backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-6)


# ---------------------------------------------------------------------------------------------------- family and files


def test_the_family_has_the_papers_sizes():
    """Millions of parameters at patches of 2, table 1 of Peebles & Xie (which counts neither labels nor positions
    consistently: to 2 %)."""
    for size, millions in dict(S=33, B=130, L=458, XL=675).items():
        network = weights.build(DiT, DiTConfig.named(f"DiT-{size}/2"))
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    assert DiTConfig.named("S/8") == DiTConfig()
    assert DiTConfig.named("XL/4", num_classes=8) == DiTConfig(28, 1152, 16, 4, num_classes=8)
    for wrong in ("M/2", "S/3", "S"):
        with pytest.raises(ValueError, match="is not one of"):
            DiTConfig.named(wrong)


def test_the_published_network_loads_strictly(tmp_path):
    """Its file has the table of positions besides, which is the one computed here."""
    component = "dit_s_8_fastdit_512"
    (tmp_path / "config.json").write_text(json.dumps(config(component)))
    network = weights.build(DiT, DiTConfig.from_json(tmp_path))
    tensors = names_and_shapes(component)
    table = tensors.pop("pos_embed")
    assert OPTIONAL == ("pos_embed",)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == tensors
    assert positions(8, 8, 384).shape == table
    total = sum(p.numel() for p in network.parameters()) + math.prod(table)
    assert total == about(component)["params"]


def test_files_load(tmp_path):
    """A folder with settings; a flat .pt; a fast-DiT checkpoint, whose moving average is taken; with and without the
    table of positions."""
    torch.manual_seed(0)
    c = DiTConfig(1, 384, 6, 8, num_classes=8, input_size=64)
    ours = DiT(c).eval()
    torch.nn.init.normal_(ours.final_layer.linear.weight)
    batch = torch.randn(1, 4, 64, 64), torch.tensor([7]), torch.tensor([3])
    table = positions(8, 8, 384)
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    fields = dict(depth=1, num_classes=8, mlp_ratio=4.0, class_dropout_prob=0.1)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state | {"pos_embed": table}, tmp_path / "flat.pt")
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    training = dict(model=other, ema=state | {"pos_embed": table}, opt={}, args=argparse.Namespace(model="DiT-S/8"))
    torch.save(training, tmp_path / "fast.pt")
    with torch.no_grad():
        expected = ours(*batch)
        for path in (tmp_path, tmp_path / "flat.pt", tmp_path / "fast.pt"):
            loaded = load_dit(path)
            assert not loaded.training and loaded.config == c
            assert torch.equal(loaded(*batch), expected)
    assert load_dit(tmp_path, torch.bfloat16).final_layer.linear.weight.dtype == torch.bfloat16
    torch.save(state | {"pos_embed": table.flip(1)}, tmp_path / "moved.pt")
    with pytest.raises(weights.WeightsError, match="pos_embed"):
        load_dit(tmp_path / "moved.pt")
    (tmp_path / "config.json").write_text(json.dumps(fields | dict(mlp_ratio=3)))
    with pytest.raises(weights.WeightsError, match="mlp_ratio"):
        load_dit(tmp_path)
    torch.save({"weight": table}, tmp_path / "none.pt")
    for name in ("none.pt", "absent.pt"):
        with pytest.raises(weights.WeightsError, match=name):
            load_dit(tmp_path / name)


def test_a_fresh_network_says_zero_and_learns():
    torch.manual_seed(0)
    ours = DiT(KINDS["/2"])
    x, t, labels = inputs("/2")
    assert (ours(x, t, labels) == 0).all()
    target = torch.randn(3, 8, 1, 1).expand(-1, -1, 12, 12)
    optimizer = torch.optim.Adam(ours.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = (ours(x, t, labels) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_dropped_labels_are_null():
    ours = DiT(KINDS["/2"])
    drop = torch.tensor([False, True, False])
    assert ours.dropped(torch.tensor([0, 1, 2]), drop).tolist() == [0, 8, 2]
    assert ours.null(2).tolist() == [8, 8]


@pytest.mark.parametrize("channels", [4, PUBLISHED_GUIDED_CHANNELS])
def test_guidance_of_all_channels_and_of_the_published_three(channels):
    """The rest, the variance and in the published files the fourth channel, is that of the class."""
    _, ours = pair("/2")
    x, t, labels = inputs("/2")
    with torch.no_grad():
        mixed = guided(ours, {"labels": labels}, {"labels": ours.null(3)}, 4.0, channels)(x, t)
        with_class, without = ours(x, t, labels), ours(x, t, ours.null(3))
        expected = with_class.clone()
        expected[:, :channels] = without[:, :channels] + 4 * (with_class - without)[:, :channels]
    close(mixed, expected, 1e-5)


# ---------------------------------------------------------------------------------------------------- loss and sampling


def reference_loss(output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The published loss in float64: epsilon's MSE, and a term of the bound with a learned range, not rescaled."""
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    posterior = betas * (1 - before) / (1 - abar)
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    losses = []
    for i, step in enumerate(t.tolist()):
        epsilon, v = output[i].double().chunk(2)
        x, clean = xt[i].double(), x0[i].double()
        mse = ((noise[i].double() - epsilon) ** 2).mean()
        fraction = (v + 1) / 2
        log_variance = fraction * np.log(betas[step]) + (1 - fraction) * clipped[step]
        said = (x - np.sqrt(1 - abar[step]) * epsilon.detach()) / np.sqrt(abar[step])
        a = betas[step] * np.sqrt(before[step]) / (1 - abar[step])
        b = (1 - before[step]) * np.sqrt(1 - betas[step]) / (1 - abar[step])
        mean, truth = a * said + b * x, a * clean + b * x
        if step > 0:
            term = -1 + log_variance - clipped[step]
            term = 0.5 * (
                term + torch.exp(clipped[step] - log_variance) + (truth - mean) ** 2 * torch.exp(-log_variance)
            )
        else:

            def cdf(z: Tensor) -> Tensor:
                return 0.5 * (1 + torch.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

            deviation = torch.exp(0.5 * log_variance)
            upper, lower = cdf((clean - mean + 1 / 255) / deviation), cdf((clean - mean - 1 / 255) / deviation)
            mass = torch.where(clean < -0.999, upper, torch.where(clean > 0.999, 1 - lower, upper - lower))
            term = -torch.log(mass.clamp(min=1e-12))
        losses.append(mse + term.mean() / np.log(2))
    return torch.stack(losses)


def test_the_loss_and_its_gradient_equal_the_published_one():
    """At the first timestep, at the last, between; with latents beyond the outer bins."""
    torch.manual_seed(0)
    diffusion = Diffusion(variance="learned_range", spacing="unclip")
    t = torch.tensor([0, 0, 1, 2, 10, 250, 500, 998, 999])
    x0 = torch.randn(len(t), 4, 6, 6)
    x0[1] = (x0[1] * 2).clamp(-1, 1)
    noise = torch.randn_like(x0)
    xt = diffusion.noised(x0, t, noise)
    output = torch.cat([noise + 0.1 * torch.randn_like(x0), torch.randn_like(x0)], 1)
    mine, yours = (output.clone().requires_grad_() for _ in range(2))
    found = hybrid_loss(diffusion, mine, x0, xt, t, noise)
    expected = reference_loss(yours, x0, xt, t, noise)
    close(found["loss"], expected, 1e-5)
    close(found["mse"] + found["vlb"], found["loss"], 1e-6)
    found["loss"].sum().backward()
    expected.sum().backward()
    assert (mine.grad - yours.grad).abs().max() <= 1e-4 * yours.grad.abs().max()


def test_the_bound_trains_the_variance_and_not_the_mean():
    diffusion = Diffusion(variance="learned_range")
    x0, noise, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([0, 300])
    output = torch.randn(2, 8, 3, 3, requires_grad=True)
    loss = hybrid_loss(diffusion, output, x0, diffusion.noised(x0, t, noise), t, noise)
    (gradient,) = torch.autograd.grad(loss["vlb"].sum(), output)
    assert (gradient[:, :4] == 0).all() and (gradient[:, 4:] != 0).any()
    with pytest.raises(ValueError, match="beside v"):
        hybrid_loss(Diffusion(prediction="v"), output, x0, x0, t, noise)


def test_a_perfect_network_has_no_divergence():
    """At the lower end of the range with the true noise, the step is the posterior itself."""
    diffusion = Diffusion(variance="learned_range")
    x0, noise, t = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), torch.tensor([2, 300, 999])
    output = torch.cat([noise, -torch.ones_like(noise)], 1)
    found = hybrid_loss(diffusion, output, x0, diffusion.noised(x0, t, noise), t, noise)
    assert found["mse"].abs().max() == 0 and found["vlb"].abs().max() < 1e-5


def spaced(count: int) -> list[int]:
    """The published choice of `count` of 1000 timesteps: a fractional stride from end to end, rounded."""
    stride, at, steps = 999 / (count - 1), 0.0, []
    for _ in range(count):
        steps.append(round(at))
        at += stride
    return steps


@pytest.mark.parametrize("steps", [250, 100, 7])
def test_ancestral_steps_equal_the_published_respaced_process(steps):
    """250 steps with betas derived anew and the learned range, without clamping; replayed draws."""
    diffusion = Diffusion(variance="learned_range", spacing="unclip")
    grid = spaced(steps)
    assert diffusion.timesteps(steps) == grid[::-1]
    torch.manual_seed(0)
    draws = torch.randn(steps + 1, 2, 4, 3, 3)
    weight = torch.randn(8, 4) * 0.4

    class Replay:
        count = 0

        def randn(self, *shape: int) -> Tensor:
            Replay.count += 1
            return draws[Replay.count]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        out = torch.einsum("oc,bchw->bohw", weight.to(x.dtype), x)
        return (out + t.view(-1, 1, 1, 1) / 1000).tanh()

    found = samplers.ddpm(denoise, diffusion, draws[0], steps, Replay())

    full = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    abar = full[grid]
    before = np.append(1.0, abar[:-1])
    betas = 1 - abar / before
    posterior = betas * (1 - before) / (1 - abar)
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    x = draws[0].double()
    for number, i in enumerate(reversed(range(steps))):
        epsilon, v = denoise(x, torch.tensor([grid[i]] * 2)).chunk(2, 1)
        fraction = (v + 1) / 2
        log_variance = fraction * np.log(betas[i]) + (1 - fraction) * clipped[i]
        clean = (x - np.sqrt(1 - abar[i]) * epsilon) / np.sqrt(abar[i])
        x = (betas[i] * np.sqrt(before[i]) * clean + (1 - before[i]) * np.sqrt(1 - betas[i]) * x) / (1 - abar[i])
        if i > 0:
            x = x + torch.exp(0.5 * log_variance) * draws[number + 1]
    close(found, x, 1e-4)

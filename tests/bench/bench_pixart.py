"""PixArt against diffusers, transformers and peft, interleaved in one run.

    python tests/bench/bench_pixart.py                     every row below, 15 minutes on two cores
    python tests/bench/bench_pixart.py forward training    some rows
    python tests/bench/bench_pixart.py --small             every row at toy sizes: does it run

    forward     the transformer at 512 pixels, XL/2's width, guidance's batch of 2, text of 120 tokens
    training    a LoRA step of Med-Art's 12 targets at rank 8, batch 1, against peft; and an unmerged adapter's overhead
    text        T5 on texts of 40 to 90 tokens: trimmed, and padded to 120; the transformer's output from both
    start       from a command to the first call of the denoiser, 611M parameters; fresh processes
    load        peak memory of reading those 611M parameters, over what they hold

Medians of interleaved repeats; the figures are the ratios.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear",
           "linear_1", "linear_2"]  # fmt: skip


def interleaved(runs: dict[str, Callable[[], object]], repeats: int, warm: int = 1) -> dict[str, float]:
    """Median seconds of each, taken in turns; the order is reversed in every other round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + warm):
        for name, run in list(runs.items())[:: -1 if repeat % 2 else 1]:
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= warm:
                times[name].append(time.perf_counter() - begin)
    for name, values in times.items():
        spread = max(values) / min(values)
        print(f"    {name:34} {statistics.median(values):9.3f} s   (max/min {spread:.2f})", flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def networks(args):
    """diffusers' transformer and ours with the same weights."""
    import conftest  # noqa: F401  (lets peft and diffusers import where torchvision's binary does not fit torch)
    import diffusers

    from nanomed import weights
    from nanomed.denoisers.pixart import PixArtConfig, PixArtTransformer

    torch.manual_seed(0)
    heads, layers = (4, 2) if args.small else (16, args.layers)
    settings = dict(num_attention_heads=heads, num_layers=layers, caption_channels=4096, sample_size=64)
    reference = diffusers.PixArtTransformer2DModel(**settings, cross_attention_dim=heads * 72).eval()
    ours = PixArtTransformer(PixArtConfig(**settings)).eval()
    weights.load(ours, {name: tensor.clone() for name, tensor in reference.state_dict().items()})
    return reference.to(args.device, args.dtype), ours.to(args.device, args.dtype)


def inputs(args, batch: int, real: int, length: int = 120) -> dict:
    side = 16 if args.small else 64
    mask = torch.arange(length, device=args.device)[None] < torch.tensor([[real]] * batch, device=args.device)
    x, states = torch.randn(batch, 4, side, side), torch.randn(batch, length, 4096)
    return dict(x=x.to(args.device, args.dtype), t=torch.full((batch,), 500, device=args.device),
                prompt_embeds=states.to(args.device, args.dtype), attention_mask=mask)  # fmt: skip


def theirs(network, batch: dict):
    sizes = dict(resolution=None, aspect_ratio=None)
    mask = batch["attention_mask"].long()
    return network(batch["x"], batch["prompt_embeds"], batch["t"], sizes, encoder_attention_mask=mask).sample


def forward(args) -> None:
    reference, ours = networks(args)
    for real in (120, 65):
        batch = inputs(args, 2, real)
        with torch.no_grad():
            text = ours.read_text(batch["prompt_embeds"], batch["attention_mask"])
            difference = (ours(**batch) - theirs(reference, batch)).abs().max().item()
            print(f"  {args.layers} blocks, batch 2, {real} of 120 tokens real; outputs differ by {difference:.1e}")
            found = interleaved(
                {
                    "diffusers": lambda batch=batch: theirs(reference, batch),
                    "nanomed": lambda batch=batch: ours(**batch),
                    "nanomed, text read before": lambda batch=batch, text=text: ours(batch["x"], batch["t"], **text),
                },
                args.repeats,
            )
        for name in ("nanomed", "nanomed, text read before"):
            print(f"  forward, {name}: {found['diffusers'] / found[name]:.3f}x as fast as diffusers")


def training(args) -> None:
    import warnings

    reference, ours = networks(args)
    import peft

    from nanomed.adapters import lora

    warnings.simplefilter("ignore")
    base, _ = networks(args)
    params = lora.inject(ours, 8, targets=TARGETS)
    with torch.no_grad():
        for param in params:
            param += 0.02 * torch.randn_like(param)
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    for name, param in adapted.named_parameters():
        param.data = param.data.float() if ".lora_" in name else param.data
    peft.set_peft_model_state_dict(adapted, {f"base_model.model.{k}": v for k, v in lora.state(ours).items()})
    batch = inputs(args, 1, 65)
    noise = torch.randn_like(batch["x"])

    def step(network, call, checkpointing: bool = False) -> Callable[[], None]:
        trained = [p for p in network.parameters() if p.requires_grad]

        def run() -> None:
            if network is ours:
                ours.checkpointing = checkpointing
            elif checkpointing:
                reference.enable_gradient_checkpointing()
            else:
                reference.disable_gradient_checkpointing()
            network.train(checkpointing)
            out = call(network).float()
            torch.nn.functional.mse_loss(out.chunk(2, 1)[0], noise.float()).backward()
            for param in trained:
                param.grad = None

        return run

    def plain(network, call) -> Callable[[], None]:
        def run() -> None:
            network.eval()
            with torch.no_grad():
                call(network)

        return run

    def mine(network):
        return network(**batch)

    def other(network):
        return theirs(network, batch)

    with torch.no_grad():
        difference = ((mine(ours) - other(adapted)).norm() / other(adapted).norm()).item()
    print(
        f"  {len(ours.transformer_blocks)} blocks, batch 1, 65 of 120 tokens real; outputs differ by {difference:.1e}"
    )
    import copy

    merged = copy.deepcopy(ours)
    lora.fold(merged)
    found = interleaved(
        {
            "forward, diffusers without adapter": plain(base, other),
            "forward, diffusers + peft": plain(adapted, other),
            "forward, nanomed folded": plain(merged, mine),
            "forward, nanomed unmerged": plain(ours, mine),
            "step, diffusers + peft": step(adapted, other),
            "step, nanomed": step(ours, mine),
            "checkpointed, diffusers + peft": step(adapted, other, True),
            "checkpointed, nanomed": step(ours, mine, True),
        },
        args.repeats,
    )
    for kind in ("step", "checkpointed"):
        ratio = found[f"{kind}, diffusers + peft"] / found[f"{kind}, nanomed"]
        forwards = found[f"{kind}, nanomed"] / found["forward, nanomed folded"]
        print(f"  LoRA {kind}: {ratio:.3f}x as fast as peft; {forwards:.2f} forwards")
    here = found["forward, nanomed unmerged"] / found["forward, nanomed folded"] - 1
    there = found["forward, diffusers + peft"] / found["forward, diffusers without adapter"] - 1
    print(f"  unmerged overhead: {here:.1%}, peft's {there:.1%}")


def text(args) -> None:
    import conftest  # noqa: F401
    import transformers

    from nanomed import weights
    from nanomed.text.t5 import T5Config, T5Encoder, encoder_half

    torch.manual_seed(0)
    sizes = dict(d_model=512, d_ff=1280, num_heads=8) if args.small else dict(d_model=4096, d_ff=10240, num_heads=64)
    settings = sizes | dict(vocab_size=1000, d_kv=64, num_layers=2, feed_forward_proj="gated-gelu")
    reference = transformers.T5EncoderModel(transformers.T5Config(**settings)).eval().to(args.device, args.dtype)
    ours = weights.load(
        weights.build(T5Encoder, T5Config(**settings)), encoder_half(dict(reference.state_dict()))
    ).eval()
    lengths = [40, 52, 65, 78, 90]
    prompts = []
    for length in lengths:
        ids = torch.randint(3, 1000, (1, 120), device=args.device)
        mask = torch.arange(120, device=args.device)[None] < length
        prompts.append((ids.masked_fill(~mask, 0), mask))

    def each(encode) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for ids, mask in prompts:
                    encode(ids, mask)

        return run

    print(f"  2 of 24 layers of T5-XXL, prompts of {lengths} tokens, one at a time")
    found = interleaved(
        {
            "transformers, padded": each(lambda ids, mask: reference(ids, attention_mask=mask.long())),
            "nanomed, padded": each(ours),
            "nanomed, trimmed": each(ours.trimmed),
        },
        args.repeats,
    )
    for name in ("transformers, padded", "nanomed, padded"):
        print(f"  T5 trimmed: {found[name] / found['nanomed, trimmed']:.3f}x as fast as {name}")
    if sizes["d_model"] == 4096:
        _, network = networks(args)
        batch = inputs(args, 1, 1)
        worst = 0.0
        with torch.no_grad():
            for ids, mask in prompts:
                outs = [
                    network(batch["x"], batch["t"], states, mask)
                    for states in (ours(ids, mask), ours.trimmed(ids, mask))
                ]
                worst = max(worst, ((outs[0] - outs[1]).abs().max() / outs[0].abs().max().clamp(min=1)).item())
        print(f"  the transformer's output from trimmed and from padded states differs by {worst:.1e}")


# ------------------------------------------------------------------------------------------------------ fresh processes

PEAK = """
def peak():
    import re
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
"""
SHIM = """
import torch
declared = []
for operator in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                 "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):  # see conftest.py
    declared.append(torch.library.Library("torchvision", "FRAGMENT"))
    try:
        declared[-1].define(operator)
    except RuntimeError:
        pass
"""
START = {
    "nanomed": """
import torch
from nanomed.systems import pixart
network = pixart.load_pixart(FOLDER)
""",
    "diffusers": SHIM
    + """
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel
network = PixArtTransformer2DModel.from_pretrained(FOLDER)
""",
}
LOAD = """
import torch
from nanomed.denoisers.pixart import load_pixart
start = peak()
begin = time.perf_counter()
network = load_pixart(FOLDER, torch.DTYPE)
loaded = time.perf_counter() - begin
for tensor in network.parameters():
    tensor.detach().amax()
held = sum(t.numel() * t.element_size() for t in network.parameters())
print(json.dumps([loaded, peak() - start, held]))
"""
LOAD_REFERENCE = SHIM + LOAD.replace(
    "from nanomed.denoisers.pixart import load_pixart", "from diffusers import PixArtTransformer2DModel"
).replace(
    "load_pixart(FOLDER, torch.DTYPE)",
    "PixArtTransformer2DModel.from_pretrained(FOLDER, torch_dtype=torch.DTYPE)",
)


def checkpoint(args, folder: Path) -> Path:
    """A file of XL/2's tensors, or of a smaller network's."""
    from safetensors.torch import save_file

    from nanomed import weights
    from nanomed.denoisers.pixart import PixArtConfig, PixArtTransformer

    shape = dict(num_attention_heads=16, num_layers=1 if args.small else 28, sample_size=64, caption_channels=4096)
    network = weights.build(PixArtTransformer, PixArtConfig(**shape))
    tensors = {name: torch.randn(t.shape) * 0.02 for name, t in network.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(_class_name="PixArtTransformer2DModel", **shape)))
    return folder


def fresh(code: str, folder: Path) -> tuple[str, float]:
    """Run code in a new interpreter; what it prints, and the seconds from the command to its end."""
    code = "import json, time\n" + PEAK + code.replace("FOLDER", repr(str(folder)))
    begin = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                         env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
    return run.stdout, time.perf_counter() - begin


def start(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = checkpoint(args, Path(folder))
        size = (where / "diffusion_pytorch_model.safetensors").stat().st_size
        print(f"  a file of {size / 1e9:.2f} GB, fresh processes, file in the page cache")
        found = interleaved({name: lambda code=code: fresh(code, where) for name, code in START.items()}, args.repeats)
        print(f"  to the first call of the denoiser: {found['diffusers'] / found['nanomed']:.2f}x as fast as diffusers")


def load(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = checkpoint(args, Path(folder))
        for dtype in ("float32", "bfloat16"):
            for name, code in (("nanomed", LOAD), ("diffusers", LOAD_REFERENCE)):
                out, _ = fresh(code.replace("DTYPE", dtype), where)
                seconds, grown, held = json.loads(re.findall(r"\[.*\]", out)[-1])
                print(f"  {dtype:9} {name:10} {seconds:6.2f} s to load; peak {grown / held:.2f} x {held / 1e9:.2f} GB")


ROWS = dict(forward=forward, training=training, text=text, start=start, load=load)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="which rows; all of them by default")
    parser.add_argument("--layers", type=int, default=3, help="blocks, of 28")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="toy sizes: does it run")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{args.dtype} on {args.device}, {torch.get_num_threads()} threads")
    for name in args.rows or ROWS:
        print(name)
        ROWS[name](args)


if __name__ == "__main__":
    main()

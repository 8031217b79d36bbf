"""What `--dry_run` says before a stage is begun. Its memory is counted on shapes; the oracle is torch's profiler, which
writes down what the allocator is asked for and given back in real steps of the same system.
"""

import gc
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train
from nanomed import systems
from nanomed.systems.pixart import PixArt
from nanomed.systems.sdxl import SDXL
from nanomed.training import plan, shadow
from nanomed.training.shadow import cost_of, descent_of, one_step

CPU = torch.device("cpu")
CLIP = dict(vocab_size=100, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
KL = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
OTHERS = {  # systems that have no miniature of their own
    "sdxl": lambda: SDXL.build(
        unet=dict(block_out_channels=(32, 48, 64), cross_attention_dim=48, attention_head_dim=(2, 3, 4), sample_size=16,
                  norm_num_groups=8, transformer_layers_per_block=(1, 2, 3), use_linear_projection=True,
                  down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
                  up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), addition_embed_type="text_time",
                  addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8),
        vae=KL, text_encoder=CLIP, text_encoder_2=CLIP | dict(projection_dim=16)),
    "pixart": lambda: PixArt.build(
        transformer=dict(num_attention_heads=2, attention_head_dim=24, num_layers=3, caption_channels=16,
                         sample_size=16),
        text_encoder=dict(vocab_size=90, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), vae=KL),
}  # fmt: skip


def prepared(name: str, stage: str, rank: int):
    torch.manual_seed(0)
    system = OTHERS[name]() if name in OTHERS else systems.build(name, random=True)
    system.to(memory_format=torch.channels_last)  # as train.py does
    if rank:
        system.adapt(stage, rank)
    system.trainable(stage)
    return system


def settings(batch: int = 4, **more):
    return SimpleNamespace(**dict(batch=batch, precision="fp32", weight_decay=0.0, ema=0.9, eps=1e-8) | more)


def measured(config, system, stage: str, **attributes) -> int:
    """The largest sum of what was allocated and freed in two real steps; the weights are there before."""
    gc.collect()
    with plan.under(system, attributes), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        descent = descent_of(config, system)
        for _ in range(2):
            one_step(config, system, stage, descent)
    events = [event for event in told.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([change for _, change in sorted((e.start_ns(), e.nbytes()) for e in events)]).max())


@pytest.fixture
def long_texts(monkeypatch):
    """A step on shapes takes texts to have their full length, for a mask of shapes cannot be asked. So they shall."""
    example = systems.base.System.example

    def long(self, stage, batch, device):
        made = example(self, stage, batch, device)
        return made | ({"prompt": [f"{i}" + " polyp" * 200 for i in range(batch)]} if "prompt" in made else {})

    monkeypatch.setattr(systems.base.System, "example", long)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name, stage, rank",
    [
        ("kandinsky2-tiny", "prior", 0),
        ("hunyuan-tiny", "transformer", 4),
        ("pixart", "transformer", 4),
        ("dit-tiny", "transformer", 0),
        pytest.param("sd-tiny", "vae", 0, marks=slow),
        pytest.param("sd-tiny", "unet", 0, marks=slow),
        pytest.param("sd-tiny", "unet", 4, marks=slow),
        pytest.param("sdxl", "unet", 0, marks=slow),
        pytest.param("sdxl", "unet", 4, marks=slow),
        pytest.param("msdm-tiny", "vae", 0, marks=slow),
        pytest.param("msdm-tiny", "unet", 0, marks=slow),
        pytest.param("kandinsky2-tiny", "decoder", 0, marks=slow),
        pytest.param("kandinsky2-tiny", "decoder", 8, marks=slow),
        pytest.param("kandinsky3-tiny", "unet", 0, marks=slow),
        pytest.param("kandinsky3-tiny", "unet", 4, marks=slow),
        pytest.param("hunyuan-tiny", "base", 0, marks=slow),
        pytest.param("pixart", "transformer", 0, marks=slow),
        pytest.param("medart-tiny", "base", 0, marks=slow),
        pytest.param("medart-tiny", "adapters", 4, marks=slow),
    ],
)
def test_the_memory_counted_on_shapes_is_what_real_steps_take(name, stage, rank, long_texts):
    """Within 5% of each kind of step, where the issue is 10%; most are equal to the byte. What is missing are buffers
    inside one operation of a CPU, as of oneDNN's convolutions. The weights are equal on both sides, so not counted."""
    system, config = prepared(name, stage, rank), settings()
    for kind, attributes in system.kinds(stage).items():
        counted = cost_of(config, system, stage, card=False, **attributes).bytes
        assert counted == pytest.approx(measured(config, system, stage, **attributes), rel=0.05), kind


@slow
def test_half_precision_takes_the_memory_of_half_precision(long_texts):
    """Autocast to bfloat16 of a network in bfloat16, with adapters in float32: the papers' LoRA. Less than float32."""
    system, config = prepared("hunyuan-tiny", "transformer", 4), settings(precision="bf16")
    for param in system.parameters():
        if not param.requires_grad:
            param.data = param.data.bfloat16()
    half = cost_of(config, system, "transformer", card=False).bytes
    assert half == pytest.approx(measured(config, system, "transformer"), rel=0.05)
    system = prepared("hunyuan-tiny", "transformer", 4)
    assert half < 0.7 * cost_of(settings(), system, "transformer", card=False).bytes


def test_counting_changes_nothing_of_the_system():
    system = prepared("dit-tiny", "transformer", 0)
    before = {name: (param, param.clone()) for name, param in system.named_parameters()}
    cost_of(settings(), system, "transformer", card=True, size=7)
    assert system.size != 7
    for name, param in system.named_parameters():
        assert param is before[name][0] and torch.equal(param, before[name][1]) and param.grad is None


def test_storages_are_counted_once_and_as_long_as_they_live():
    """By hand: views, in-place operations and a second name cost nothing, and what is freed is given back."""
    weight = torch.zeros(10)
    with shadow.Alive([weight]) as alive:
        a = torch.zeros(256)  # 1,024 bytes
        view = a.view(16, 16).t()
        view += 1
        weight += 1
        assert (alive.now, alive.most) == (1024, 1024)
        b = a + 1
        assert (alive.now, alive.most) == (2048, 2048)
        del a
        assert alive.now == 2048  # the view is left
        del view
        assert (alive.now, alive.most) == (1024, 2048)
        del b
    assert (alive.now, alive.most) == (0, 2048)


def test_norms_of_a_card_are_in_float32_under_autocast_and_only_there():
    """As the documentation of torch.amp lists it for CUDA; a CPU's autocast leaves them in bfloat16."""
    x, norm = torch.randn(2, 8, 4).bfloat16(), torch.nn.GroupNorm(2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        with shadow.Float32Norms():
            assert norm(x).dtype == torch.nn.functional.layer_norm(x, (4,)).dtype == torch.float32
    with shadow.Float32Norms():
        assert norm(x).dtype == torch.bfloat16


def test_operations_are_those_by_hand():
    """Two for a multiplication and an addition: of a product, of attention, of its backward pass (five products where
    the scores are computed again)."""
    q = torch.zeros(1, 2, 8, 16, requires_grad=True)
    with shadow.Alive() as alive:
        torch.zeros(3, 5) @ torch.zeros(5, 7)
        assert alive.flops == 2 * 3 * 5 * 7
        alive.flops = 0
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert alive.flops == 2 * 2 * (2 * 8 * 8 * 16)
        out.sum().backward()
        assert alive.flops == 7 * 2 * (2 * 8 * 8 * 16)


def test_a_dry_run_says_what_a_stage_needs_and_which_card_fits(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "train.py --model dit-tiny --dry_run --stage transformer --batch 4".split())
    assert train.main() == 0
    out = capsys.readouterr().out
    system = prepared("dit-tiny", "transformer", 0)
    weights, trained = (sum(p.nbytes for p in params) for params in
                        (system.parameters(), system.trainable("transformer").values()))  # fmt: skip
    beside, total = (float(re.search(rf"{what} +([\d.]+) GB", out)[1]) for what in ("a step", "in all"))
    assert beside > 4 * trained / 1e9 - 0.005  # gradients, two moments and the average
    assert total == pytest.approx(beside + weights / 1e9 + 1.0, abs=0.011)  # and CUDA itself
    assert "in all, --frozen share over 2" in out and "fits a card of 8 GB, 12 GB, 16 GB, 24 GB, 40 GB, 80 GB" in out
    assert "4 samples (the second of two real ones)" in out


def test_a_step_that_would_take_long_on_a_cpu_is_not_made(monkeypatch, capsys):
    """Its time is then that of its operations, and the line says so."""
    monkeypatch.setattr(plan, "flops_per_second", lambda *a: 2e6)
    monkeypatch.setattr(plan, "one_step", lambda *a: pytest.fail("a real step"))
    monkeypatch.setattr(sys, "argv", "train.py --model dit-tiny --dry_run --stage transformer --batch 1".split())
    assert train.main() == 0
    out = capsys.readouterr().out
    flops, seconds = float(re.search(r"([\d.]+) TFLOP at", out)[1]), float(re.search(r"one step +([\d.]+) s", out)[1])
    assert flops == pytest.approx(seconds * 1e6 / 1e12, abs=0.051) and seconds > 5

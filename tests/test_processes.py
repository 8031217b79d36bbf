"""Several processes, and no waiting: two gloo processes train to the weights of one, a step asks the device nothing.

The oracle is one process with the same samples of every step: `--accumulate 2` where two processes have one pass each.
"""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_two_train_as_one, close
from torch.utils._python_dispatch import TorchDispatchMode

import train
from nanomed import systems
from nanomed.layers import linear
from nanomed.run import flags
from nanomed.run.randomness import ImageNoise, seed_all
from nanomed.training.optimizer import INSIDE, Descent, LaidOutAdamW, adamw
from nanomed.training.placement import places_of

ROOT = Path(__file__).parents[1]
COMMON = ["--data", "toy:12", "--batch", "2", "--steps", "20", "--save_every", "10", "--score_images", "0", "--valid",
          "0.2", "--test_prompts", "", "--log_every", "10", "--views", "1"]  # fmt: skip
PRESETS = {  # what each adds: self-conditioning has no tiny preset, so msdm-tiny stands for the plain U-Net
    "msdm-tiny": [],
    "medart-tiny": ["--hldf_every", "5"],
    "kandinsky2-tiny": [],
}


@pytest.mark.parametrize("preset", PRESETS)
def test_two_processes_train_to_the_weights_of_one(preset, tmp_path, tmp_path_factory):
    """Every stage, 20 steps, a validation in between: weights equal to 1e-5, relative to each tensor's largest value.
    HLDF's recomputed nodes, adapters, and parameters without a gradient (the prior's deviation) are among them."""
    cache = tmp_path_factory.getbasetemp() / "processes-cache"
    assert_two_train_as_one(preset, [*COMMON, *PRESETS[preset], "--cache", str(cache)], tmp_path)


# ------------------------------------------------------------------------------------------------------- no waiting


class Questions(TorchDispatchMode):
    """Counts how often the value of a tensor is asked for: on a GPU each time waits for all work before it."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["msdm-tiny", "medart-tiny", "kandinsky2-tiny"])
def test_a_step_asks_the_device_nothing(preset):
    """Forward, backward, clipping, optimizer and average, in every stage; HLDF's step too. `health` asks once."""
    torch.manual_seed(0)
    system = systems.build(preset)
    batch = {"image": torch.rand(2, 3, system.size, system.size) * 2 - 1, "prompt": ["an image of a polyp", ""]}
    for stage in system.stages:
        if stage == "adapters":
            system.adapt(stage, 2)
        params = system.trainable(stage)
        fields = (
            {}
            if stage == "vae"
            else {
                f: v
                for kind, (_, make) in system.frozen(stage).items()
                for f, v in make(batch["image" if kind == "image" else "prompt"]).items()
            }
        )
        descent = Descent(params, weight_decay=0.01, average=0.9, fp16=False)
        with Questions() as questions:
            for step in range(2):
                seed_all("step", step)
                descent.backward(system(batch | fields, stage, step)["loss"])
                norm, clipped = descent.step(1e-4, 1.0)
        assert questions.asked == 0, stage
        assert clipped and torch.isfinite(norm)
        with questions:
            assert descent.health(stage, 2) == 0


def test_a_broken_step_changes_nothing_and_is_counted_where_it_is_asked():
    """Weights, moments and the optimizer's own count of steps are those of a run without it, to the bit."""
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    found = []
    for broken in (False, True):
        param = torch.nn.Parameter(start.clone())
        descent = Descent({"w": param}, weight_decay=0.1, average=0.0, fp16=False)
        for step in range(4):
            if broken and step == 2:
                param.grad = torch.full_like(param, float("nan"))
                descent.step(0.1, 1.0)
            param.grad = torch.sin(torch.arange(15.0).view(5, 3) + step)
            descent.step(0.1, 1.0)
        assert descent.health("stage", 5) == broken
        found.append([param.detach(), *(value for _, value in sorted(descent.optimizer.state[param].items()))])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    for _ in range(3):
        param.grad = torch.full_like(param, float("inf"))
        descent.step(0.1, 0.0)
    with pytest.raises(FloatingPointError, match="stage: loss or gradient was not finite for 3 steps in a row"):
        descent.health("stage", 8)


def test_the_plain_adamw_takes_over_where_pytorchs_inside_is_another(monkeypatch):
    """`LaidOutAdamW` overrides a private method. Were its arguments others, the stock optimizer would be used: slower
    on channels-last weights of a CPU, and the same to the bit (test_training.py)."""
    param = torch.nn.Parameter(torch.zeros(2))
    assert type(adamw([param], lr=0.1)) is LaidOutAdamW, f"PyTorch's _init_group no longer takes {INSIDE}"
    monkeypatch.setattr(torch.optim.AdamW, "_init_group", lambda self, group, lists: None)
    assert type(adamw([param], lr=0.1)) is torch.optim.AdamW


def test_the_plain_product_takes_over_where_onednns_operator_is_not(monkeypatch):
    """`torch.ops.mkldnn._linear_pointwise` is private: without it, and where a gradient is wanted, it is F.linear."""
    layer, x = torch.nn.Linear(24, 16), torch.randn(5, 24)
    assert linear._ONEDNN, "PyTorch no longer has the operator: products on a CPU are the plain ones"
    plain = layer(x).detach()
    with torch.no_grad():
        monkeypatch.setattr(linear, "_WIDE", True)
        close(linear.multiply(layer, x), plain, 1e-6)
        for switch in ("_WIDE", "_ONEDNN"):  # no AVX-512, no operator
            with monkeypatch.context() as without:
                without.setattr(linear, switch, False)
                assert torch.equal(linear.multiply(layer, x), plain)
    assert linear.multiply(layer, x).requires_grad


@pytest.mark.parametrize("preset", ["msdm-tiny", "medart-tiny", "kandinsky2-tiny"])
def test_a_frozen_part_that_lives_elsewhere_is_met_there(preset):
    """Another dtype stands for another device: what goes into a part goes to where it is, and comes back."""
    torch.manual_seed(0)
    system = systems.build(preset).eval()
    stage = list(system.stages)[-1]
    with torch.no_grad():
        expected = system.sample(["an image of a polyp"], ImageNoise(0, [0]), steps=2)
        for part in {part for parts, _ in system.frozen(stage).values() for part in parts.split()}:
            system.get_submodule(part).double()
        moved = system.sample(["an image of a polyp"], ImageNoise(0, [0]), steps=2)
        close(moved.float(), expected, 1e-4)
        batch = {"image": torch.rand(2, 3, system.size, system.size) * 2 - 1, "prompt": ["a polyp", ""]}
        assert torch.isfinite(system(batch, stage, 1)["loss"])


@pytest.mark.parametrize(
    "asked, adapted, places",
    [
        ("device", False, {"vae": "device"}),
        ("cpu", False, {"vae": "cpu"}),
        ("share", False, {"vae": "share"}),
        ("cpu", True, {"text_encoder": "device", "vae": "cpu"}),  # nothing of a tuned T5 is kept
        ("share", True, {"text_encoder": "share", "vae": "share"}),
        ("text_encoder=share,vae=cpu", True, {"text_encoder": "share", "vae": "cpu"}),
    ],
)
def test_a_frozen_part_lives_where_it_is_asked_to_as_far_as_it_can(asked, adapted, places):
    system = systems.build("medart-tiny")
    if adapted:
        system.adapt("adapters", 2)
    assert places_of(asked, system, "adapters") == places
    with pytest.raises(flags.UsageError, match="--frozen vae=moon: say device, cpu, share"):
        places_of("vae=moon", system, "adapters")


# ------------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "words, said",
    [
        ("--batch 0", "--batch 0: out of range, which is 1 .. 65536"),
        ("--steps 0", "--steps 0: out of range, which is 1 .. 10^9"),
        ("--lr -1", "--lr -1: out of range, which is > 0"),
        ("--lr nan", "--lr nan: not a number in the range > 0"),
        ("--clip inf", "--clip inf: not a number in the range >= 0"),
        ("--valid 1", "--valid 1: out of range, which is 0 ..< 1"),
        ("--ema 1", "--ema 1: out of range, which is 0 ..< 1"),
        ("--dropout 1.5", "--dropout 1.5: out of range, which is 0 .. 1"),
        ("--precision fp8", "--precision fp8: choose fp32, bf16, fp16"),
        ("--model nosuch", "--model nosuch: choose one of msdm, "),
        ("--model captioner-tiny --steps 0", "--steps 0: out of range, which is 1 .. 10^9"),
        ("--model captioner-tiny --rank 4", "unrecognized arguments: --rank 4"),
        ("--model captioner-tiny --resume latest", "unrecognized arguments: --resume latest"),
        ("--keep 0", "--keep 0: out of range, which is >= 1"),
        ("--warmup -1", "--warmup -1: out of range, which is >= 0"),
        ("--views 1.5", "--views 1.5: not a whole number in the range 0 .. 10000"),
    ],
)
def test_a_value_out_of_its_range_is_refused_before_anything_is_made(words, said, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "runs"), *words.split()])
    with pytest.raises(flags.UsageError) as refused:
        train.main()
    assert str(refused.value).startswith(said) and not list(tmp_path.iterdir())


def test_help_ends_with_the_models_own_flags(capsys):
    with pytest.raises(SystemExit):
        flags.parse(train.Config, ["--model", "medart", "--help"], models=flags.Models(systems.recipe, systems.options))
    said = capsys.readouterr().out
    assert said.index("checkpoints:") < said.index("options of Med-Art:") < said.index("--hldf_every")
    with pytest.raises(SystemExit):
        flags.parse(train.Config, ["--model", "msdm", "--help"], models=flags.Models(systems.recipe, systems.options))
    assert "hldf" not in capsys.readouterr().out


def test_help_says_what_stages_have_for_themselves(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--model", "msdm-tiny", "--help"])
    with pytest.raises(SystemExit):
        train.main()
    told = capsys.readouterr().out.split("where no flag is given:")[1]
    for stage in ("vae", "unet"):
        for name, value in systems.recipe("msdm-tiny", stage).items():
            assert re.search(rf"^  {stage}: .*--{name} {re.escape(str(value))}( |$)", told, re.M), name

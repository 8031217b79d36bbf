"""Training that can be trusted with a week of GPU time: exact resume, preemption, broken steps, checkpoints, ranks.

All runs are the tiny preset on a handful of images, so that a run of two stages takes seconds.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import StopAfter
from safetensors.torch import load_file

import train
from nanomed import systems
from nanomed.run import files, flags, runs, signals
from nanomed.run.flags import UsageError
from nanomed.run.hardware import autocast
from nanomed.run.randomness import ImageNoise
from nanomed.run.ranks import ALONE
from nanomed.run.signals import PREEMPTED
from nanomed.training.optimizer import EMA, adamw, clip_gradients

ROOT = Path(__file__).parents[1]
FLAGS = ["--model", "msdm-tiny", "--data", "toy:24", "--batch", "4", "--steps", "6", "--save_every", "2",
         "--score_images", "0", "--test_prompts", "", "--log_every", "1", "--keep", "9"]  # fmt: skip


@pytest.fixture
def run_train(monkeypatch, tmp_path_factory):
    """Run train.py in this process: run_train(folder, *flags, stop_after=step) -> (exit code, run folder)."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    torch.set_num_threads(1)

    def go(out: Path, *flags: str, stop_after: int = 10**9) -> tuple[int, Path]:
        argv = ["train.py", *FLAGS, "--out", str(out), "--cache", str(cache), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(signals, "StopSignal", StopAfter(stop_after))
        code = train.main()
        return code, runs.newest(out)

    return go


def trained(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run has learned: the exported parts, and the last checkpoint with its moments."""
    tensors = {}
    paths = sorted(run.glob("model/*/*.safetensors")) + sorted(run.glob("checkpoints/*-step-000006/*.safetensors"))
    for path in paths:
        tensors |= {f"{path.relative_to(run)}: {name}": tensor for name, tensor in load_file(path).items()}
    assert len(paths) == 8  # vae, unet, text_encoder; model + optimizer of the VAE; model, optimizer, ema of the U-Net
    return tensors


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[0]}"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What an uninterrupted run learns, computed once for each set of flags."""
    return {}


# 24 images, 22 of them for training: the VAE's epoch is 5.5 batches, so steps 5 and 6 straddle its end.
STOPS = {
    "inside an epoch of the first stage": (3,),
    "at the end of a stage": (6,),
    "first step of the second stage": (7,),
    "between two checkpoints of the second stage": (9,),
    "twice, the second time in the resumed run": (2, 3),
}


@pytest.mark.parametrize("stops", STOPS.values(), ids=STOPS.keys())
def test_resume_is_bitwise_exact(run_train, tmp_path, straight, stops):
    """Weights, averages and optimizer moments equal those of a run that was never stopped, to the last bit."""
    if not straight:
        code, run = run_train(tmp_path / "straight")
        assert code == 0
        straight.update(trained(run))
    code, run = run_train(tmp_path / "stopped", stop_after=stops[0])
    for stop in (*stops[1:], 10**9):
        assert code == PREEMPTED
        assert json.loads((run / "state.json").read_text())["status"] == "preempted"
        code, run = run_train(tmp_path / "stopped", "--resume", "latest", stop_after=stop)
    assert code == 0
    same(trained(run), straight)


def test_resume_inside_an_accumulation_is_bitwise_exact(run_train, tmp_path):
    """A signal during the second of three backward passes: the step is finished, saved, and gone on from."""
    flags = ("--accumulate", "3", "--batch", "2")
    _, whole = run_train(tmp_path / "straight", *flags)
    code, _ = run_train(tmp_path / "stopped", *flags, stop_after=8)
    assert code == PREEMPTED
    _, run = run_train(tmp_path / "stopped", *flags, "--resume", "latest")
    same(trained(run), trained(whole))


def test_a_checkpoint_that_is_damaged_is_refused_by_name(run_train, tmp_path):
    run_train(tmp_path, stop_after=9)
    run = runs.newest(tmp_path)
    newest = runs.Run(run, ALONE).checkpoints("unet")[-1] / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        run_train(tmp_path, "--resume", "latest")


def test_resume_refuses_settings_that_would_change_the_numbers(run_train, tmp_path):
    run_train(tmp_path, stop_after=2)
    with pytest.raises(UsageError, match="batch was 4 and is 8 now"):
        run_train(tmp_path, "--resume", "latest", "--batch", "8")


def test_a_broken_step_is_skipped_and_counted_and_three_in_a_row_stop(run_train, tmp_path, monkeypatch):
    """NaN in the loss: weights stay as they were; the third in a row ends the run with one clear line."""
    from nanomed.systems.msdm import MSDM

    forward = MSDM.forward
    broken = {2, 4, 5, 6}

    def sometimes(self, batch, stage, step):
        losses = forward(self, batch, stage, step)
        return losses | {"loss": losses["loss"] * float("nan")} if self.training_step(step) in broken else losses

    monkeypatch.setattr(
        MSDM, "training_step", lambda self, step: step + 1 if torch.is_grad_enabled() else 0, raising=False
    )
    monkeypatch.setattr(MSDM, "forward", sometimes)
    with pytest.raises(FloatingPointError, match="not finite for 3 steps in a row, up to step 6"):
        run_train(tmp_path)
    log = [json.loads(line) for line in (runs.newest(tmp_path) / "log.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in log if "skipped" in line}
    assert [steps[i]["skipped"] for i in (1, 2, 3, 4)] == [0, 1, 1, 2]
    at = {i: load_file(runs.newest(tmp_path) / f"checkpoints/vae-step-00000{i}/model.safetensors") for i in (2, 4)}
    assert any(not torch.equal(at[2][name], at[4][name]) for name in at[2])  # step 3 was a good one


def test_checkpoints_are_pruned_to_the_last_and_the_best(run_train, tmp_path):
    _, run = run_train(tmp_path, "--keep", "1")
    kept = [folder.name for folder in runs.Run(run, ALONE).checkpoints("unet")]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["score"] for line in lines if line["stage"] == "unet" and "score" in line}
    best = min(scores, key=scores.get)
    assert kept == sorted({f"unet-step-{best:06d}", "unet-step-000006"})
    assert not list(run.rglob("*.tmp"))


def test_what_a_run_leaves_behind(run_train, tmp_path):
    """Settings, log, grids, model card, and a model folder that loads by itself."""
    import nanomed

    _, run = run_train(tmp_path)
    config = json.loads((run / "config.json").read_text())
    assert config["model"] == "msdm-tiny" and config["environment"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    assert len(steps) == 12 and all(line["clipped"] > 20 for line in steps)
    assert {path.name for path in (run / "samples").iterdir()} >= {"vae-step-000002.png", "unet-step-000006.png"}
    assert "Not for diagnosis" in (run / "README.md").read_text()
    system = nanomed.load(run)
    assert system.vae.scale != 1.0
    assert system.steps == systems.settings("msdm-tiny")["steps"]  # of drawing: --steps are those of training
    images = system.sample(["Generate an image containing text."], ImageNoise(0, [0]), steps=2)
    assert images.shape == (1, 3, 32, 32) and 0 <= images.min() and images.max() <= 1


# ---------------------------------------------------------------------------------------------- going on, otherwise


def resumed(monkeypatch, *words: str) -> int:
    """train.py with these words alone."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setattr(signals, "StopSignal", StopAfter(10**9))
    return train.main()


def test_the_runs_name_is_enough_and_a_finished_run_goes_on(run_train, tmp_path, straight, monkeypatch, capsys):
    """Stopped, and gone on with by --resume alone: the weights of a straight run, bit for bit. Then two more steps, of
    the last stage, on a cosine that is stretched; every change stands in the log, the settings and the card."""
    if not straight:
        straight.update(trained(run_train(tmp_path / "straight")[1]))
    _, run = run_train(tmp_path / "stopped", stop_after=9)
    assert resumed(monkeypatch, "--resume", str(run)) == 0
    same(trained(run), straight)
    for words, told in ((["--batch", "8", "--views", "2"], "batch was 4 and is 8 now, views was 8 and is 2 now"),
                        (["--steps", "5"], "--steps 5: stage unet has made 6 already"),
                        (["--stage", "vae", "--steps", "8"], "stage unet stands on it"),
                        (["--data", "toy:25"], "data was toy:24 and is toy:25 now"),
                        (["--model", "medart-tiny"], "model was msdm-tiny and is medart-tiny now")):  # fmt: skip
        before = (run / "config.json").read_text(), (run / "state.json").read_text()
        with pytest.raises(UsageError, match=told):
            resumed(monkeypatch, "--resume", str(run), *words)
        assert before == ((run / "config.json").read_text(), (run / "state.json").read_text())
    capsys.readouterr()
    assert resumed(monkeypatch, "--resume", "latest", "--out", str(run.parent), "--steps", "8") == 0
    assert "the cosine of the learning rate is stretched whole, from 6 steps to 8 steps" in capsys.readouterr().out
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["stage"] == "unet" and "grad_norm" in line]
    assert steps[-3:] == [6, 7, 8] and {"stage": "unet", "step": 6, "changed": {"steps": [6, 8]}} in lines
    assert json.loads((run / "config.json").read_text())["steps"] == 8
    assert resumed(monkeypatch, "--resume", str(run), "--steps", "9", "--batch", "8", "--resume_anyway") == 0
    card = (run / "README.md").read_text()
    assert "From unet step 6 on: steps was 6 and is 8 now." in card and "**gone on anyway**" in card


def test_a_data_set_that_has_moved_is_known_by_its_contents(run_train, tmp_path, monkeypatch):
    from nanomed.data import toy

    toy.write(tmp_path / "a", 6, 64)
    _, run = run_train(tmp_path / "runs", "--data", f"clef:{tmp_path / 'a'}", "--steps", "2", stop_after=1)
    os.rename(tmp_path / "a", tmp_path / "b")
    moved = ["--resume", str(run), "--data", f"clef:{tmp_path / 'b'}"]
    image, other = sorted((tmp_path / "b" / "images").iterdir())[:2]
    kept = image.read_bytes()
    image.write_bytes(other.read_bytes())
    with pytest.raises(UsageError, match="data was clef:.*a and is clef:.*b now"):
        resumed(monkeypatch, *moved)
    image.write_bytes(kept)
    assert resumed(monkeypatch, *moved) == 0


@pytest.mark.parametrize("images, valid", [(3, "0"), (1, "0.1")])
def test_nothing_needs_to_be_held_out(run_train, tmp_path, capsys, images, valid):
    """Everything trains, the last checkpoint is kept, and grids show training prompts; one image is enough."""
    from nanomed.data import toy

    toy.write(tmp_path / "a", images, 64)
    code, run = run_train(tmp_path / "runs", "--data", f"clef:{tmp_path / 'a'}", "--valid", valid)
    said = capsys.readouterr().out
    assert code == 0 and f"{images} images (nothing held out)" in said
    assert "nothing is held out, so nothing is measured; the last checkpoint is kept" in said
    assert "keeping step 6, the last" in said and (run / "samples" / "unet-step-000006.png").is_file()
    assert not [line for line in (run / "log.jsonl").read_text().splitlines() if "valid_loss" in line]


def test_other_processes_share_the_same_samples_of_a_step():
    """Batches of 4 in 3 passes on 2 processes: 24 samples a step, whose order is the same on any number that divides
    them; passes stay whole where they can."""
    from nanomed.data.table import Row
    from nanomed.run.ranks import Ranks
    from nanomed.training.batches import Batches, Samples

    rows = [Row(Path(f"{i}.png"), (str(i),)) for i in range(50)]

    def samples(world: int, batch: int, accumulate: int, step: int) -> list[int]:
        found = {}
        for rank in range(world):
            batches = Batches(rows, Samples(8, 0, dropout=0.3), batch, Ranks(rank, world))
            batches._pool.submit = lambda sample, position: position
            for micro in range(accumulate):
                found |= {at: batches._order(at // 50)[at % 50] for at in batches._start(step * accumulate + micro)}
            batches.close()
        return [found[i] for i in sorted(found)]

    for world, expected in ((1, (4, 6)), (2, (4, 3)), (3, (4, 2)), (6, (4, 1)), (4, (3, 2)), (24, (1, 1))):
        assert Ranks(0, world).divided(4, 3, before=2) == expected
        assert samples(world, *expected, 3) == samples(2, 4, 3, 3)
    with pytest.raises(UsageError, match="5 processes cannot share the 24 samples of a step: start 1, 2, 3, 4, 6"):
        Ranks(0, 5).divided(4, 3, before=2)


# ------------------------------------------------------------------------------------------------ whole processes


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def command(out: Path, cache: Path, *flags: str, ranks: int = 1) -> list[str]:
    head = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)
    ]  # fmt: skip
    return [*head, str(ROOT / "train.py"), *FLAGS, "--out", str(out), "--cache", str(cache), *flags]


def wait_for_step(out: Path, step: int, process: subprocess.Popen, stage: str = "unet") -> None:
    """Until the log says that a stage has made a step."""
    while process.poll() is None:
        run = runs.newest(out)
        text = (run / "log.jsonl").read_text() if run and (run / "log.jsonl").is_file() else ""
        if f'"stage": "{stage}", "step": {step}' in text:
            return
        time.sleep(0.05)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for others")
def test_sigterm_saves_and_two_ranks_resume_exactly(tmp_path, tmp_path_factory):
    """Two gloo ranks: SIGTERM to the launcher, state saved at once, and the resumed run equals a straight one."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    whole = subprocess.run(command(tmp_path / "a", cache, ranks=2), env=environment(), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-2000:]
    process = subprocess.Popen(
        command(tmp_path / "b", cache, ranks=2), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for_step(tmp_path / "b", 1, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    run = runs.newest(tmp_path / "b")
    assert json.loads((run / "state.json").read_text())["status"] == "preempted"
    again = command(tmp_path / "b", cache, "--resume", "latest", ranks=2)
    done = subprocess.run(again, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    same(trained(run), trained(runs.newest(tmp_path / "a")))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for others")
def test_sigint_has_its_own_exit_code(tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"
    process = subprocess.Popen(
        command(tmp_path, cache, "--steps", "400"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for_step(tmp_path, 1, process, stage="vae")
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0].decode()
    assert process.returncode == PREEMPTED
    assert "state saved; go on with --resume" in output


def timed(words: list[str]) -> float:
    """Run a command to its end; the seconds it took, which is what random times to kill it are drawn from."""
    start = time.monotonic()
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.monotonic() - start


def killed_until_done(out: Path, cache: Path, seconds: float, rng: random.Random) -> tuple[Path, int]:
    """Kill -9 at random times of a run that takes `seconds`, resume, until it is done; the run and the kills it took.

    A third of the time is the start of Python, where there is nothing to lose.
    """
    hits, resume = 0, ()
    while True:
        process = subprocess.Popen(
            command(out, cache, *resume), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            hits += 1
        error = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), error[-2000:]
        run = runs.newest(out)
        resume = ("--resume", str(run)) if run else ()
        if process.returncode == 0:
            return run, hits


def kill_often(tmp_path: Path, cache: Path, kills: int) -> None:
    seconds = timed(command(tmp_path / "a", cache))
    expected, rng, hits, number = trained(runs.newest(tmp_path / "a")), random.Random(kills), 0, 0
    while hits < kills:
        run, more = killed_until_done(tmp_path / f"b{number}", cache, seconds, rng)
        same(trained(run), expected)
        assert not list(run.rglob("*.tmp"))
        hits, number = hits + more, number + 1
        assert number <= 4 * kills, "the runs end before they can be killed"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_kill_minus_nine_loses_nothing(tmp_path, tmp_path_factory):
    """Always restarted from a whole checkpoint, and in the end bitwise the straight run. Short form: 3 kills."""
    kill_often(tmp_path, tmp_path_factory.getbasetemp() / "cache", 3)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.slow
def test_kill_minus_nine_fifty_times(tmp_path, tmp_path_factory):
    kill_often(tmp_path, tmp_path_factory.getbasetemp() / "cache", 50)


# ------------------------------------------------------------------------------------------------- smaller pieces


def test_ema_follows_torchs_averaged_model():
    """Against torch.optim.swa_utils with the same decay, warm-up past."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3)
    ours = EMA(dict(module.named_parameters()), 0.9)
    ours.updates = 10**6
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(module)  # the first call only copies
    for _ in range(5):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        ours.update()
        theirs.update_parameters(module)
    for name, p in theirs.module.named_parameters():
        torch.testing.assert_close(ours.average[name], p.detach(), rtol=1e-6, atol=1e-6)
    before = module.weight.detach().clone()
    with ours.swapped():
        assert not torch.equal(module.weight, before)
    assert torch.equal(module.weight, before)


def test_adamw_on_channels_last_weights_is_torchs(monkeypatch):
    """Bit for bit the plain fused AdamW on contiguous copies; the kernel itself sees contiguous tensors only, and
    moments keep the shape and the layout of their parameter, as checkpoints want them."""
    torch.manual_seed(0)
    shapes = [(6, 4, 3, 3), (5, 4, 1, 1), (7, 3), (3,)]
    plain = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    last = [p.detach().clone() for p in plain]
    last = [torch.nn.Parameter(p.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p) for p in last]
    ours, theirs = adamw(last, lr=0.1, weight_decay=0.01), torch.optim.AdamW(plain, lr=0.1, fused=True)
    kernel, seen = torch._fused_adamw_, []
    monkeypatch.setattr(
        torch, "_fused_adamw_", lambda *lists, **options: seen.extend(lists[:4]) or kernel(*lists, **options)
    )
    for _ in range(3):
        for a, b in zip(plain, last):
            a.grad = torch.randn_like(a)
            b.grad = torch.empty_like(b).copy_(a.grad)
        ours.step()
        assert all(tensor.is_contiguous() for tensors in seen for tensor in tensors) and len(seen) == 4
        theirs.step()
        seen.clear()
    for a, b in zip(plain, last):
        assert torch.equal(a, b)
        assert ours.state[b]["exp_avg"].stride() == b.stride() and ours.state[b]["exp_avg"].shape == b.shape


def test_clipping_reports_norm_and_count():
    params = [torch.nn.Parameter(torch.zeros(10)) for _ in range(4)]
    for p in params:
        p.grad = torch.full((10,), 4e4 / 40**0.5)
    norm, clipped = clip_gradients(params, 1.0)
    assert norm.item() == pytest.approx(4e4, rel=1e-4) and clipped == 4
    total = torch.stack([p.grad.norm() for p in params]).norm().item()
    assert total == pytest.approx(1.0, rel=1e-4)
    assert clip_gradients([torch.nn.Parameter(torch.zeros(1))], 1.0) == (0.0, 0)


def test_atomic_writes_leave_the_old_file_when_they_fail(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    files.write_tensors(path, {"w": torch.ones(3)})
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        files.write_tensors(path, {"w": torch.zeros(3)})
    assert torch.equal(load_file(path)["w"], torch.ones(3))


def test_learning_rate_schedules():
    config = train.Config(lr=1.0, warmup=10, steps=110, schedule="cosine")
    rates = [train.learning_rate(config, step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5) and rates[109] < 0.001
    with pytest.raises(UsageError, match="--schedule never: choose constant, cosine, linear"):
        flags.parse(train.Config, ["--schedule", "never"])


def test_flags_follow_the_names_people_type():
    argv = [
        "--model",
        "msdm-tiny",
        "--learning_rate",
        "0.5",
        "--train-batch-size",
        "7",
        "--max_train_steps=3",
        "--compile",
    ]
    config = flags.parse(train.Config, argv)
    assert (config.lr, config.batch, config.steps, config.compile) == (0.5, 7, 3, True)
    assert set(config.given) == {"model", "lr", "batch", "steps", "compile"}
    with pytest.raises(UsageError, match="unrecognized arguments: --no_such_flag"):
        flags.parse(train.Config, ["--no_such_flag", "1"])
    with pytest.raises(UsageError, match="--steps many"):
        flags.parse(train.Config, ["--steps", "many"])


def test_no_flag_is_swallowed_by_torchrun():
    """torchrun's parser sees all words first: a flag of ours that abbreviates one of its own would be refused."""
    import dataclasses

    from torch.distributed.run import get_args_parser

    import evaluate
    import sample

    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    for config in (train.Config, sample.Config, evaluate.Config):
        for name in [field.name for field in dataclasses.fields(config)] + list(flags.ALIASES):
            assert not [option for option in theirs if option.startswith(f"--{name}")], name


# --------------------------------------------------------------------------------------------------- mixed precision


MINIATURES = ("msdm-tiny", "kandinsky2-tiny", "kandinsky3-tiny", "sd-tiny", "medart-tiny", "hunyuan-tiny", "dit-tiny")


@pytest.mark.parametrize("model", MINIATURES)
def test_under_bf16_every_stage_has_the_loss_of_fp32(model):
    """Autocast is for matrix products and convolutions. What a loss takes differences of (a variance, a divergence, a
    structural similarity) is computed in float32: 2% of the loss, and 10% of an autoencoder's gradient, are its own
    rounding. (That of an untrained deep U-Net is off by more, whoever computes it.)
    """
    torch.manual_seed(0)
    system = systems.build(model)
    for stage in system.stages:
        system.trainable(stage)
        batch = system.example(stage, 2, torch.device("cpu"))
        if "image" in batch:  # smooth ones, whose small variances are what rounds away
            coarse = batch["image"][:, :, ::8, ::8]
            batch["image"] = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")
        losses, norms = [], []
        for precision in ("fp32", "bf16"):
            torch.manual_seed(1)
            random.seed(1)
            with autocast(precision, torch.device("cpu")):
                loss = system(batch, stage, 1)["loss"]
            system.zero_grad()
            loss.backward()
            grads = [p.grad.flatten() for p in system.parameters() if p.grad is not None]
            losses.append(loss.item())
            norms.append(torch.cat(grads))
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
        assert stage != "vae" or (norms[1] - norms[0]).norm() < 0.1 * norms[0].norm()

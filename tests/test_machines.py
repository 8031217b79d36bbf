"""Other machines, told by making calls fail or differ as they do there: Windows, macOS, and GPUs that are not here."""

import io
import os
import shutil
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from nanomed import systems
from nanomed.captions.generation import draw
from nanomed.denoisers import dit, pixart
from nanomed.layers import devices
from nanomed.run import files, flags, hardware
from nanomed.run.flags import UsageError
from nanomed.run.ranks import ALONE, Ranks, device_of
from nanomed.run.runs import Run, environment
from nanomed.text.t5 import relative_buckets
from nanomed.training.optimizer import Descent

MPS = torch.device("mps")


@pytest.fixture
def windows(monkeypatch):
    """Folders cannot be opened, files are flushed through a descriptor that writes, signal 0 is Ctrl-C."""
    opened = os.open

    def refusing(path, flags, *args, **kwargs):
        caller = sys._getframe(1).f_code
        if os.path.isdir(path) and "rmtree" not in caller.co_name:  # which does without on Windows
            raise PermissionError(13, "Permission denied", str(path))
        assert flags & os.O_RDWR or flags & os.O_WRONLY or "fsync" not in caller.co_names
        return opened(path, flags, *args, **kwargs)

    def replacing(source, target):
        inside = [str(path) for place in (source, target) for path in [Path(place), *Path(place).rglob("*")]]
        maps = Path("/proc/self/maps")  # of Linux alone
        held = [path for path in inside if maps.is_file() and f" {path}\n" in maps.read_text()]
        if held:
            raise PermissionError(13, "Access is denied", held[0])
        replaced(source, target)

    replaced = os.replace
    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("os.kill is Ctrl-C on Windows"))
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    return monkeypatch


def test_files_and_folders_are_written_whole(windows, tmp_path):
    files.write_text(tmp_path / "a" / "text", "whole")
    with files.atomic(tmp_path / "folder") as temporary:
        files.write_text(temporary / "inside", "too")
    assert (tmp_path / "folder" / "inside").read_text() == "too" and (tmp_path / "a" / "text").read_text() == "whole"


def test_what_a_dead_process_left_is_swept_and_what_a_living_one_writes_is_not(windows, tmp_path):
    errors = {8: 87, 9: 5}  # no such process; access denied, for it is somebody else's
    asked = []
    kernel = types.SimpleNamespace(OpenProcess=lambda access, inherit, pid: asked.append(pid) or int(pid == 7),
                                   CloseHandle=lambda handle: 1)  # fmt: skip
    windows.setattr(files.ctypes, "WinDLL", lambda name, use_last_error: kernel, raising=False)
    windows.setattr(files.ctypes, "get_last_error", lambda: errors[asked[-1]], raising=False)
    for pid in (7, 8, 9):
        (tmp_path / f".x.{pid}.tmp").write_text("")
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.7.tmp", ".x.9.tmp"]


def test_no_file_is_mapped_that_a_run_replaces_or_removes(windows, tmp_path, untrained):
    """Windows renames and removes nothing that is mapped: a checkpoint resumed from, weights that were read."""
    model = shutil.copytree(untrained, tmp_path / "model")
    systems.load(model).save(model)  # a run that goes on writes over the parts that it has read

    param = torch.nn.Parameter(torch.ones(4000))
    descent = Descent({"w": param}, weight_decay=0.0, average=0.9, fp16=False)
    run = Run.create(tmp_path, {"model": "m"}, ALONE)
    for step in (1, 2):
        descent.backward(param.square().sum())
        descent.step(1e-3, 0.0)
        if step == 2:
            run.restore("unet", descent)
        run.save("unet", step, descent, {})
    run.prune("unet", 1, None)
    assert [folder.name for folder in run.checkpoints("unet")] == ["unet-step-000002"]


def test_git_need_not_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git"] is None


def test_a_letter_that_an_alphabet_lacks_is_no_error(monkeypatch):
    """As when Windows writes into a file."""
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    with pytest.raises(SystemExit) as ended:
        flags.main(lambda: print("\u017c\u00f3\u0142w"))
    narrow.flush()
    assert ended.value.code == 0 and narrow.buffer.getvalue().strip() == b"\\u017c\xf3\\u0142w"


def test_a_lock_is_taken_on_a_byte_behind_the_end(windows, tmp_path):
    places = []

    def locking(descriptor, mode, count):
        places.append(os.lseek(descriptor, 0, os.SEEK_CUR))
        if len(places) in (1, 3):
            raise OSError(13, "Permission denied")  # another process holds it: it is tried again, or not

    windows.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with open(tmp_path / "journal", "w+b", buffering=0) as file:
        file.write(b"abc")
        assert files.lock(file) and places == [1 << 40] * 2 and file.tell() == 3
        assert not files.lock(file, wait=False) and file.tell() == 3


def test_a_lock_keeps_others_out_until_the_file_is_closed(tmp_path):
    order, first = [], open(tmp_path / "journal", "a+b")
    files.lock(first)

    def second():
        with open(tmp_path / "journal", "a+b") as file:
            files.lock(file)
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.2)
    order.append("first")
    first.close()
    thread.join(10)
    assert order == ["first", "second"]


def test_memory_is_none_where_the_system_does_not_tell(windows):
    assert hardware.peak_memory(torch.device("cpu")) == 0


@pytest.mark.parametrize("error", [TypeError, OSError, AttributeError])
def test_a_c_library_without_the_switches_is_left_alone(monkeypatch, error):
    def library(name):
        raise error("bad argument type for built-in operation")

    monkeypatch.setattr(hardware.ctypes, "CDLL", library)
    assert hardware.keep_memory() is False


# ------------------------------------------------------------------------------------------------------------ devices


def here(monkeypatch, cuda: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_the_best_device_there_is_works_unless_another_is_said(monkeypatch):
    here(monkeypatch, cuda=2, mps=True)
    assert device_of() == torch.device("cuda", 0) and device_of(local=1) == torch.device("cuda", 1)
    assert device_of("cuda:1") == torch.device("cuda", 1) and device_of("cpu") == torch.device("cpu")
    here(monkeypatch, mps=True)
    assert device_of() == device_of("mps") == MPS
    assert device_of(float64=True) == torch.device("cpu")  # measuring needs what MPS has not
    here(monkeypatch)
    assert device_of() == torch.device("cpu")


@pytest.mark.parametrize("asked, float64, said", [
    ("cuda", False, "--device cuda: no CUDA device is here"), ("mps", False, "--device mps: it is not here"),
    ("cuda:x", False, "--device cuda:x: say cuda, cuda:1, mps or cpu"), ("cpu:0", False, "say cuda, cuda:1, mps"),
    ("tpu", False, "--device tpu: say"), ("cuda:\u0661", False, "say cuda, cuda:1, mps or cpu"),
])  # fmt: skip
def test_a_device_that_is_not_here_is_refused_in_a_line(monkeypatch, asked, float64, said):
    here(monkeypatch)
    with pytest.raises(UsageError, match=said):
        device_of(asked, float64=float64)


def test_more_is_refused_than_there_is(monkeypatch):
    here(monkeypatch, cuda=2, mps=True)
    with pytest.raises(UsageError, match="--device cuda:2: 2 CUDA devices are here"):
        device_of("cuda:2")
    with pytest.raises(UsageError, match="no float64"):
        device_of("mps", float64=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="each takes its own"):
        Ranks.join("cuda:1")
    with pytest.raises(UsageError, match="--device mps: there is one"):
        Ranks.join("mps")
    here(monkeypatch, mps=True)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert Ranks.join().device.type == "cpu"  # what is not asked for is left out


class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
    """Stands for MPS on meta tensors, which here say that they are its: a float64 among them is refused."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu" and args[0].is_meta:
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))  # meta tensors hold no numbers
        made = func(*args, **kwargs)
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta" and tensor.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return made


def test_no_float64_is_made_on_mps(monkeypatch):
    monkeypatch.setattr(devices, "NARROW", ("meta",))
    meta = torch.device("meta")
    with NoFloat64():
        with pytest.raises(TypeError):  # the stand-in does its work
            torch.zeros(2, dtype=torch.float64, device=meta)
        assert dit.positions(2, 2, 8, meta).device == meta
        assert pixart.positions(2, 2, 8, 2, 1.0, meta).device == meta
        assert relative_buckets(torch.zeros(3, dtype=torch.int64, device=meta)).device == meta
    assert torch.equal(dit.positions(2, 2, 8), dit.positions(2, 2, 8, "cpu"))
    assert Ranks(device=MPS).meeting.type == "cpu" and Ranks(device=MPS).mean(3.0, 2) == 3.0
    assert ALONE.meeting.type == "cpu"


def test_libraries_are_told_before_torch_reads_it(tmp_path):
    """Whatever stands first, `import nanomed` is before torch in the scripts; what a user has set stays."""
    import subprocess

    program = "import os, sys; import {}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    for module, given, expected in (
        ("train", {}, "20000 True"),
        ("nanomed", {"GOMP_SPINCOUNT": "7"}, "7 False"),
        ("nanomed", {"OMP_WAIT_POLICY": "active"}, "None False"),
    ):
        environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
        done = subprocess.run([sys.executable, "-c", program.format(module)], env=environment, capture_output=True,
                              text=True, cwd=Path(__file__).resolve().parents[1])  # fmt: skip
        assert done.stdout.strip() == expected, done.stderr
    for script in ("train.py", "sample.py", "evaluate.py"):
        with open(os.path.join(os.path.dirname(__file__), "..", script), encoding="utf-8") as file:
            lines = [line for line in file if line.startswith(("import ", "from "))]
        first = next(i for i, line in enumerate(lines) if "nanomed" in line)
        assert not any("torch" in line for line in lines[:first]), script


def test_a_token_is_drawn_where_its_logits_are():
    assert draw(torch.tensor([[0.0, 5.0]]), torch.tensor([0.9])).tolist() == [1]

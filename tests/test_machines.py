"""Other machines, told by making calls fail or differ as they do there: Windows, macOS, and GPUs that are not here."""

import os
import sys
import threading
import types

import pytest
import torch

from nanomed.captions.generation import draw
from nanomed.denoisers import dit, pixart
from nanomed.layers import devices
from nanomed.run import files, hardware
from nanomed.run.flags import UsageError
from nanomed.run.ranks import ALONE, Ranks, device_of
from nanomed.text.t5 import relative_buckets

MPS = torch.device("mps")


@pytest.fixture
def windows(monkeypatch):
    """Folders cannot be opened, files are flushed through a descriptor that writes, signal 0 is Ctrl-C."""
    opened = os.open

    def refusing(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        assert flags & os.O_RDWR or flags & os.O_WRONLY or "fsync" not in sys._getframe(1).f_code.co_names
        return opened(path, flags, *args, **kwargs)

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
    kernel = types.SimpleNamespace(OpenProcess=lambda access, inherit, pid: int(pid == 7), CloseHandle=lambda handle: 1,
                                   GetLastError=lambda: 87)  # fmt: skip
    windows.setattr(files.ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    for pid in (7, 8):
        (tmp_path / f".x.{pid}.tmp").write_text("")
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".x.7.tmp"]


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

    program = "import os, sys; sys.argv = ['x']; import train; print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in ((None, "passive"), ("active", "active")):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": given} if given else {}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True,
                              cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # fmt: skip
        assert done.stdout.strip() == expected, done.stderr
    for script in ("train.py", "sample.py", "evaluate.py"):
        with open(os.path.join(os.path.dirname(__file__), "..", script), encoding="utf-8") as file:
            lines = [line for line in file if line.startswith(("import ", "from "))]
        first = next(i for i, line in enumerate(lines) if "nanomed" in line)
        assert not any("torch" in line for line in lines[:first]), script


def test_a_token_is_drawn_where_its_logits_are():
    assert draw(torch.tensor([[0.0, 5.0]]), torch.tensor([0.9])).tolist() == [1]

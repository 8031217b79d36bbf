"""What several test files share: tolerances as the project defines them, and the optional real vocabularies."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import nanomed  # noqa: F401  # isort: skip  # before torch, whose libraries read what it sets when they are loaded
import pytest
import torch
from safetensors.torch import load_file

from nanomed.run import runs

# torchvision is a test oracle only (pytorch-fid and torch-fidelity import it). Its binary wheel brings operators for
# CUDA builds of torch; beside a CPU build, its Python side imports once the operators it decorates are declared. Where
# its library loads it declares them itself, and a second declaration would end the process.
_declared = []


def _declare_operators_of_torchvision() -> None:
    found = importlib.util.find_spec("torchvision")
    for library in Path(found.origin).parent.glob("_C*") if found and found.origin else ():
        try:
            torch.ops.load_library(str(library))
            return
        except OSError:  # made for another build of torch
            pass
    for operator in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        _declared[-1].define(operator)


_declare_operators_of_torchvision()


def pytest_configure() -> None:
    """Networks here are tiny: a second thread gains nothing, and beside a busy neighbour it costs many times as much
    time. And one thread adds up in one order, so that what is to be equal to the bit is."""
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite goes through a process a core, four at most, a file at a time, where pytest-xdist is installed.
    A run that names files, or says -n or --pdb itself, stays as it is."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput"):
        if config.option.numprocesses is None and not config.option.usepdb and not config.option.collectonly:
            config.option.numprocesses = min(os.cpu_count() or 1, 4)
            config.option.dist = "loadfile"


def close(out: torch.Tensor, ref: torch.Tensor, tolerance: float) -> None:
    """max|out - ref| <= tolerance * max(1, max|ref|), and the same shape."""
    assert out.shape == ref.shape, f"{tuple(out.shape)} is not {tuple(ref.shape)}"
    error = (out.double() - ref.double()).abs().max().item()
    bound = tolerance * max(1.0, ref.double().abs().max().item())
    assert error <= bound, f"error {error:.3e} is above {bound:.3e}"


def assert_two_train_as_one(preset: str, words: list[str], out: Path) -> None:
    """A training by two processes ends in the weights of the same by one, which makes two passes a step: to 1e-5 of
    each tensor's largest value."""
    models = []
    for count in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if count == 2 else []
        more = ["--accumulate", "2"] if count == 1 else []
        done = subprocess.run(
            [sys.executable, *launch, "train.py", "--model", preset, *words, *more, "--out", str(out / str(count))],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[1], capture_output=True, text=True,
            timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        models.append(runs.newest(out / str(count)) / "model")
    files = sorted(path.relative_to(models[0]) for path in models[0].rglob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        one, two = (load_file(model / file) for model in models)
        for name in one:
            close(two[name].float(), one[name].float(), 1e-5)


def assert_gradients_equal(ours: torch.nn.Module, reference: torch.nn.Module, tolerance: float) -> None:
    """Of every parameter, to the tolerance times the largest gradient of the network."""
    expected = {name: p.grad for name, p in reference.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert expected.keys() == {name for name, _ in ours.named_parameters()} and largest > 0
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= tolerance * largest, name


def load_kohya(path: Path, modules: dict[str, torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Give networks the adapters of a file in kohya's keys, as --lora reads it; returns the adapters' parameters."""
    from nanomed.adapters import lora, onto

    onto.attach(onto.sources(path)[0], modules)
    return [param for module in modules.values() for param in lora.parameters(module)]


@pytest.fixture(scope="session")
def golden() -> Path:
    """Golden tensors and ids, made once with the reference implementations."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The published tokenizer files, which are not in the repository. Tests on them skip where they are absent."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("NANOMED_TEST_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("published vocabularies are absent: set NANOMED_TEST_DATA to a folder with clip/, t5/, bert/")
    return folder


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """A saved msdm-tiny of random weights, none of them zero."""
    from nanomed import systems

    torch.manual_seed(0)
    system = systems.build("msdm-tiny")
    with torch.no_grad():
        for param in system.parameters():
            param.add_(0.02 * torch.randn_like(param))
    folder = tmp_path_factory.mktemp("model")
    system.save(folder)
    return folder


class StopAfter:
    """A stop signal that arrives during optimizer step number `step` (counted from the start of the process)."""

    def __init__(self, step: int):
        self.left = step

    def __call__(self):
        return self

    @property
    def received(self) -> str:
        self.left -= 1
        return "SIGTERM" if self.left <= 0 else ""

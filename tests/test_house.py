"""The plan of the house: who may import whom, which packages run, and a README whose commands and files are real."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"torch", "numpy", "scipy", "PIL", "tokenizers", "safetensors", "tqdm"}  # the seven of the card
FLOORS = {  # a module imports from lower floors and from its own package; floor 0 from files and from each other
    **dict.fromkeys(["files"], 0),
    **dict.fromkeys(["blocks", "convolution", "diffusion", "samplers", "hldf", "lora", "lowrank"], 1),
    **dict.fromkeys(["weights", "runtime", "runs", "cache"], 1),
    **dict.fromkeys(["text", "denoisers", "autoencoders", "data", "metrics"], 2),
    **dict.fromkeys(["systems", "captions", "training", "imagesets", "toyworld"], 3),
    **dict.fromkeys(["setups", "measuring"], 4),
    **dict.fromkeys(["reporting"], 5),
}
SCRIPTS = ["train.py", "sample.py", "evaluate.py"]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
            if node.module == "nanomed":
                found |= {f"nanomed.{alias.name}" for alias in node.names}
    return found


def sources() -> list[Path]:
    return sorted((ROOT / "nanomed").rglob("*.py")) + [ROOT / name for name in SCRIPTS]


def test_only_the_seven_packages_run():
    allowed = PACKAGES | set(sys.stdlib_module_names) | {"nanomed", "evaluate", "sample"}
    for path in sources():
        foreign = {name.split(".")[0] for name in imports(path)} - allowed
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_pyproject_names_the_seven_packages_and_no_other():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=~! ]", line)[0] for line in project["dependencies"]}
    assert names == (PACKAGES - {"PIL"}) | {"pillow"}


def test_no_module_imports_from_its_own_height_or_above():
    for path in (ROOT / "nanomed").rglob("*.py"):
        parts = path.relative_to(ROOT / "nanomed").with_suffix("").parts
        if parts == ("__init__",):
            continue
        mine = FLOORS[parts[0]]
        for name in imports(path):
            target = name.split(".")[1:2]
            if not name.startswith("nanomed.") or target[0] not in FLOORS or target[0] == parts[0]:
                continue
            theirs = FLOORS[target[0]]
            beside = mine == theirs and (mine <= 1 or (parts[0], target[0]) in {("training", "systems")})
            assert theirs < mine or beside, f"{path.relative_to(ROOT)} imports {name}"


def test_library_code_leaves_gradients_devices_and_printing_to_the_caller():
    """The scripts and what serves the training loop (training.py, the weights' command line) may."""
    spoken = re.compile(r"\bno_grad\(|inference_mode\(|\.cuda\(|^\s*print\(", re.MULTILINE)
    allowed = {"training.py", "runs.py", "runtime.py", "weights.py", "__main__.py", "systems/msdm.py"}
    for path in (ROOT / "nanomed").rglob("*.py"):
        name = path.relative_to(ROOT / "nanomed").as_posix()
        if name.split("/")[-1] not in allowed and name not in allowed:
            assert not spoken.search(path.read_text(encoding="utf-8")), name


def test_nothing_is_unpickled():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert "pickle.load" not in text and not re.search(r"weights_only\s*=\s*False", text), path.name
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path.name


def test_no_collective_hides_behind_a_rank():
    """A barrier or a reduction that only one rank reaches hangs all of them."""
    collective = {"barrier", "all_reduce", "any_rank", "mean_over_ranks", "gather_rows", "average_gradients"}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If) and "rank" in ast.unparse(node.test) and "== 0" in ast.unparse(node.test):
                called = {getattr(call.func, "attr", getattr(call.func, "id", ""))
                          for child in node.body for call in ast.walk(child) if isinstance(call, ast.Call)}  # fmt: skip
                assert not called & collective, f"{path.name}:{node.lineno}"


def test_importing_the_package_does_not_import_torch():
    code = "import sys, nanomed; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -------------------------------------------------------------------------------------------------------- README


def commands() -> list[str]:
    """Every line of the README's fenced shell blocks, continuation lines joined."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_parses(command, monkeypatch):
    """Scripts get the flags they have, modules exist, and files that are named are there."""
    from nanomed import runtime

    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        arguments = get_args_parser().parse_args(words[1:])
        words = ["python", arguments.training_script, *arguments.training_script_args]
    if words[0] != "python" or not words[1].endswith(".py"):
        assert words[0] in ("pip", "python", "git", "cd", "hf", "source"), command
        if words[:2] == ["python", "-m"] and words[2].startswith("nanomed"):
            target = ROOT / Path(*words[2].split("."))
            assert target.with_suffix(".py").is_file() or (target / "__main__.py").is_file(), command
        return
    assert words[1] in SCRIPTS, command
    module = __import__(words[1].removesuffix(".py"))
    runtime.parse(module.Config, [word.replace("FILE", "x") for word in words[2:]])
    for word in words[2:]:
        if word.startswith("weights/msdm-tiny/"):
            assert (ROOT / word).is_file(), word


def test_every_file_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:nanomed|tests|weights)/[\w./-]+|(?:train|sample|evaluate)\.py)`", text))
    named |= {path for path in re.findall(r"\]\((?!http)([^)#]+)\)", text)}
    missing = [name for name in named - {"weights/inception/"} if not (ROOT / name).exists()]  # a user puts that there
    assert not missing, missing


def test_every_flag_has_a_help_text():
    from nanomed import runtime

    for name in SCRIPTS:
        config = __import__(name.removesuffix(".py")).Config
        comments = runtime._comments(config)
        assert set(comments) == {field.name for field in dataclasses.fields(config)}, name


def test_help_is_two_screens_at_most(capsys):
    from nanomed import runtime

    for name in SCRIPTS:
        with pytest.raises(SystemExit):
            runtime.parse(__import__(name.removesuffix(".py")).Config, ["--help"])
        assert len(capsys.readouterr().out.splitlines()) < 110, name

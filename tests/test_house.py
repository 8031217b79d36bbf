"""The plan of the house: who may import whom, which packages run, and a README whose commands and files are real."""

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"torch", "numpy", "scipy", "PIL", "tokenizers", "safetensors", "tqdm"}  # the seven of the card
OPTIONAL = {"nanomed/data/dicom.py": {"pydicom"}}  # a package that one file imports, where it is there
WALLS = {  # a wing, and the wings that its files may import besides their own; "run.flags" is one file of a wing
    # floor 1: nothing of nanomed
    "run": "",
    "layers": "",
    # floor 2: files to tensors, images and prompts
    "weights": "run",
    "data": "run",
    # floor 3: the networks, the maths, and what changes or judges them; none of them knows another
    "diffusion": "weights",
    "text": "layers weights run",
    "denoisers": "layers weights",
    "autoencoders": "layers weights",
    "adapters": "weights run",
    "metrics": "weights run",
    "captions": "text layers data weights run",
    # floor 4: a paper's system, and a set of images with every number about it
    "systems": "diffusion text denoisers autoencoders adapters data weights run",
    "evaluation": "metrics text data weights run",
    # floor 5: what the scripts call; a system is handed to them
    "training": "adapters metrics data weights run",
    "drawing": "weights run",
    # floor 6: tables of both papers, which start the scripts as processes
    "tables": "drawing training systems evaluation metrics data weights run",
}
SCRIPTS = ["train.py", "sample.py", "evaluate.py"]
MANY = {  # a wing, and its functions that may take more than six things, besides `self`
    "systems": "sample pictures",  # what a drawing can be asked for, one word each
    "denoisers": "__init__ forward",  # shapes as a published config.json says them; x, t and all conditions
    "autoencoders": "__init__",  # shapes, too
    "adapters": "inject forward _gradients",  # in the words of peft's LoraConfig; an autograd function's inputs
    "diffusion": "forward",  # an autograd function's inputs
    "metrics": "kernel_interval",
    "captions": "generate",  # how to write, one word each, as transformers' generate has them
}


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
    allowed = PACKAGES | set(sys.stdlib_module_names) | {"nanomed"}
    for path in sources():
        optional = OPTIONAL.get(path.relative_to(ROOT).as_posix(), set())
        foreign = {name.split(".")[0] for name in imports(path)} - allowed - optional
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_one_file_draws_bars():
    """So that a file without a terminal gets lines, and every wait is told in one way."""
    assert [path.name for path in sources() if "tqdm" in imports(path)] == ["progress.py"]


def test_texts_are_read_and_written_in_an_encoding_that_is_named():
    """Windows and Linux take others where none is."""
    for path in sources():
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                words, name = {word.arg for word in call.keywords}, ast.unparse(call.func)
                told = "encoding" in words or any("b" in ast.unparse(mode) for mode in call.args[1:2])
                if name == "open" or name.endswith(".read_text") and not call.args + call.keywords:
                    assert told, f"{path.name}:{call.lineno}"
                if name.endswith(".write_text") and name != "files.write_text":
                    assert told, f"{path.name}:{call.lineno}"


def test_pyproject_names_the_seven_packages_and_no_other():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=~! ]", line)[0] for line in project["dependencies"]}
    assert names == (PACKAGES - {"PIL"}) | {"pillow"}


def wing(path: Path) -> str:
    """The wing of a file of the package; "" for the package's own __init__.py."""
    first = path.relative_to(ROOT / "nanomed").parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def test_every_wing_keeps_to_its_walls():
    for path in (ROOT / "nanomed").rglob("*.py"):
        if mine := wing(path):
            allowed = {mine, *WALLS[mine].split()}
            theirs = {name.split(".")[1] for name in imports(path) if name.startswith("nanomed.")}
            assert not theirs - allowed, f"{path.relative_to(ROOT)} imports {theirs - allowed}"


def test_the_walls_leave_no_way_back():
    """A wing stands above everything that it may import, so there is no circle."""
    floors: dict[str, int] = {}
    for name, below in WALLS.items():  # the table is in the order of the floors
        floors[name] = 1 + max((floors[other] for other in below.split()), default=0)
    assert set(floors) == {wing(path) for path in (ROOT / "nanomed").rglob("*.py")} - {""}


def test_nothing_in_the_package_imports_a_script():
    for path in (ROOT / "nanomed").rglob("*.py"):
        assert not imports(path) & {name.removesuffix(".py") for name in SCRIPTS}, path.relative_to(ROOT)


def test_no_two_files_import_each_other():
    """No circle of files either, counting imports inside functions."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for path in (ROOT / "nanomed").rglob("*.py")}  # fmt: skip
    arrows = {name: {other for other in imports(path) if other in files and other != name and not
                     files[other].name == "__init__.py"} for name, path in files.items()}  # fmt: skip
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in arrows[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in files:
        visit(name, ())


def test_every_wing_says_what_it_is_and_may_import():
    for name in WALLS:
        path = ROOT / "nanomed" / name
        said = ast.get_docstring(ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
                                           .read_text(encoding="utf-8")))  # fmt: skip
        assert said and ("may import" in said.lower()), name


def test_folders_hold_about_a_dozen_files_at_most():
    for folder in {path.parent for path in (ROOT / "nanomed").rglob("*.py")}:
        count = sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        assert count <= 14, f"{folder.relative_to(ROOT)}: {count} files"


def test_library_code_leaves_gradients_devices_and_printing_to_the_caller():
    """The scripts and what serves them (drawing, the training loop, command lines) may."""
    spoken = re.compile(r"\bno_grad\(|inference_mode\(|\.cuda\(|^\s*print\(", re.MULTILINE)
    allowed = {"training/judge.py", "training/caches.py", "training/plan.py", "drawing.py", "evaluation/final.py",
               "evaluation/notebook.py", "run/flags.py", "run/pictures.py", "run/runs.py", "systems/msdm.py",
               "__main__.py"}  # fmt: skip
    for path in (ROOT / "nanomed").rglob("*.py"):
        name = path.relative_to(ROOT / "nanomed").as_posix()
        if name.split("/")[-1] not in allowed and name not in allowed:
            assert not spoken.search(path.read_text(encoding="utf-8")), name


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


def test_functions_take_six_things_at_most():
    """More are a sign that an object is missing."""
    for path in sources():
        allowed = MANY.get(wing(path), "").split() if path.parent != ROOT else []
        for function in functions(path):
            args = function.args
            names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            assert count <= 6 or function.name in allowed, f"{path.relative_to(ROOT)}: {function.name} takes {count}"


def test_public_names_say_what_they_are():
    """Classes, functions and methods; one that stands in the place of a parent's may leave it to that."""
    for path in (ROOT / "nanomed").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            assert ast.get_docstring(node), f"{name}.{node.name}"
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    said = inspect.getdoc(getattr(getattr(module, node.name), method.name))
                    assert said, f"{name}.{node.name}.{method.name}"


def test_nothing_is_unpickled():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert "pickle.load" not in text and not re.search(r"weights_only\s*=\s*False", text), path.name
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path.name


def test_no_collective_hides_behind_a_rank():
    """A barrier or a reduction that only one rank reaches hangs all of them."""
    collective = {"barrier", "all_reduce", "any", "mean", "gather", "agree"}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If) and "ranks.first" in ast.unparse(node.test):
                calls = [call.func for child in node.body for call in ast.walk(child) if isinstance(call, ast.Call)]
                called = {call.attr for call in calls if "ranks" in ast.unparse(call)}
                assert not called & collective, f"{path.name}:{node.lineno}"


def test_importing_the_package_does_not_import_torch():
    code = "import sys, nanomed; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -------------------------------------------------------------------------------------------------------- README


GUIDES = ["README.md", "CONTRIBUTING.md", "nanomed/systems/README.md", "nanomed/evaluation/README.md",
          "nanomed/captions/README.md", "nanomed/tables/README.md"]  # fmt: skip


def commands() -> list[str]:
    """Every command of the guides' fenced shell blocks, continuation lines joined."""
    text = "\n".join((ROOT / guide).read_text(encoding="utf-8") for guide in GUIDES)
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.split(" #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return list(dict.fromkeys(command.strip() for line in lines for command in line.split("&&")))


def parse(module, words: list[str]):
    """A script's own reading of a command line."""
    from nanomed import systems
    from nanomed.run import flags

    if module.__name__ == "train" and flags.said("model", words) == "captioner-tiny":
        from nanomed.captions.__main__ import Train

        return flags.parse(Train, words)
    own = {"models": flags.Models(systems.recipe, systems.options)} if module.__name__ == "train" else {}
    return flags.parse(module.Config, words, **own)


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_parses(command, monkeypatch):
    """Scripts get the flags they have, modules exist, and files that are named are there."""

    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        arguments = get_args_parser().parse_args(words[1:])
        words = ["python", arguments.training_script, *arguments.training_script_args]
    if words[0] != "python" or not words[1].endswith(".py"):
        assert words[0] in ("pip", "python", "python3", ".", "git", "cd", "hf"), command
        if words[:2] == ["python", "-m"] and words[2].startswith("nanomed"):
            target = ROOT / Path(*words[2].split("."))
            assert target.with_suffix(".py").is_file() or (target / "__main__.py").is_file(), command
        return
    if words[1].startswith("tests/bench/"):
        assert (ROOT / words[1]).is_file(), command
        return
    assert words[1] in SCRIPTS, command
    module = __import__(words[1].removesuffix(".py"))
    parse(module, [word.replace("FILE", "x") for word in words[2:]])
    for word in words[2:]:
        if word.startswith("weights/msdm-tiny/"):
            assert (ROOT / word).is_file(), word


def test_every_file_that_the_readme_names_exists():
    for guide in GUIDES:
        text = (ROOT / guide).read_text(encoding="utf-8")
        named = set(re.findall(r"`((?:nanomed|tests|weights)/[\w./-]+|(?:train|sample|evaluate)\.py)`", text))
        missing = [name for name in named - {"weights/inception/"} if not (ROOT / name).exists()]  # a user puts that
        links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        missing += [link for link in links if not (ROOT / guide).parent.joinpath(link).exists()]
        assert not missing, (guide, missing)


def test_the_readme_is_ten_minutes_long():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_continuous_integration_runs_the_readmes_test_command():
    """`.ci/run` takes the line out of the README as it stands; there is exactly one."""
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if '-e ".[test]"' in line]
    assert len(lines) == 1 and lines[0].startswith("python3 -m venv .venv && . .venv/bin/activate && ")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "tests.yml").read_text()


def test_every_flag_has_a_help_text():
    from nanomed.run import flags

    for name in SCRIPTS:
        config = __import__(name.removesuffix(".py")).Config
        comments = flags.comments(config)
        assert set(comments) == {field.name for field in dataclasses.fields(config)}, name


def test_a_script_runs_in_a_profiler(tmp_path):
    """`python -m cProfile train.py` runs the script inside its own module, where its text has to be looked for."""
    words = [sys.executable, "-m", "cProfile", "-o", str(tmp_path / "p"), str(ROOT / "sample.py"), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--prompts" in done.stdout, done.stderr


def test_help_is_two_screens_at_most(capsys):

    for name in SCRIPTS:
        with pytest.raises(SystemExit):
            parse(__import__(name.removesuffix(".py")), ["--help"])
        assert len(capsys.readouterr().out.splitlines()) < 125, name


def test_the_hints_of_four_wings_hold():
    """diffusion, layers, adapters and run, by mypy as pyproject.toml sets it up."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]

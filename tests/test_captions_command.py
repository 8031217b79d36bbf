"""The captioners' command line, with values that no one means: one line, a known exit code, and nothing left behind.

As tests/test_hostile.py has it for the other commands, whose values these are; the model behind it answers nothing.
"""

import dataclasses
import shutil

import pytest
from PIL import Image
from test_hostile import CODES, VALUES, called, listing

import nanomed.captions.models
import nanomed.captions.tiny
from nanomed.captions import __main__ as command
from nanomed.captions import rewording
from nanomed.run import files, flags
from nanomed.run.flags import UsageError


class Silent:
    prompt, writer = "<image>", None

    def ask(self, question):
        return question

    def say(self, question, system=""):
        return question

    def count(self, text):
        return 0

    def generate(self, images, texts, **how):
        return [""] * len(texts)

    def finish(self):
        pass


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with two images, prompts, captions, and the folder of a captioner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", "none")
    for i in range(2):
        (tmp_path / "data" / "polyps").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "polyps" / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("Generate an image with 2 polyps.\nGenerate an image with 1 polyp.\n")
    (tmp_path / "short.csv").write_text("file_name,text\na.png,a polyp\n")
    nanomed.captions.tiny.save(nanomed.captions.tiny.build(), tmp_path / "model")
    (tmp_path / "weights" / "openai" / "clip-vit-large-patch14").mkdir(parents=True)
    monkeypatch.setattr(nanomed.captions.models, "load", lambda *a: Silent())
    monkeypatch.setattr(nanomed.captions.tiny, "train", lambda *a, **k: nanomed.captions.tiny.build())
    monkeypatch.setattr(nanomed.captions.tiny, "accuracy", lambda model: (1.0, 1.0))
    monkeypatch.setattr(command, "_t5", lambda name, device: shortener(name))
    monkeypatch.setattr(files, "_sync", lambda path: None)
    monkeypatch.setattr(rewording, "Encoder", lambda *a: None)
    return tmp_path


def shortener(name):
    """A T5 with a tokenizer that finds every text short; none where there is no such folder."""
    nanomed.weights.find(name)

    class Tokenizer:
        def lengths(self, texts):
            return [1] * len(texts)

    return type("Shortener", (), {"tokenizer": Tokenizer(), "generate": lambda *a, **k: [""]})()


VERBS = {
    "vsg": (command.Vsg, ["vsg", "folder:data", "--model", "model", "--attempts", "2"]),
    "simplify": (command.Simplify, ["simplify", "short.csv", "--model", "model"]),
    "paraphrase": (command.Paraphrase, ["paraphrase", "prompts.txt", "--model", "model", "--attempts", "3"]),
    "train": (command.Train, ["train", "--out", "made"]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_value_of_any_flag_is_misread(verb, there, capsys, monkeypatch):
    config, besides = VERBS[verb]
    before, codes = listing(there), {}
    for field in dataclasses.fields(config):
        for value in VALUES:
            code, said = called(command.main, [*besides, f"--{field.name}", value], capsys, monkeypatch)
            where = (verb, field.name, value, code, said)
            assert code in CODES and "Traceback" not in said, where
            if code:
                assert len(said.strip().splitlines()) == 1 and listing(there) == before, where
            for path in listing(there) - before:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            if flags.kind_of(field.type) in (int, float):
                assert code == 2 or value.strip() in ("0", "7", "1" + 30 * "0"), where
                assert flags.range_of(field.type), where
            codes[code] = codes.get(code, 0) + 1
    assert codes[0] and codes[2]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nothing"],
        ["vsg"],
        ["vsg", "--out", "c.csv"],
        ["paraphrase"],
        ["simplify"],
        ["vsg", "folder:data", "--model", "model", "--int8", "--place", "share"],
        ["vsg", "folder:nowhere", "--model", "model"],
        ["vsg", "folder:data", "--model", "no"],
        ["paraphrase", "no.csv", "--model", "model"],
        ["simplify", "no.csv"],
    ],
)
def test_mistakes_are_one_line_and_write_nothing(words, there, capsys, monkeypatch):
    before = listing(there)
    code, said = called(command.main, words, capsys, monkeypatch)
    assert code in (2, 3, 4) and len(said.strip().splitlines()) == 1 and listing(there) == before


def test_train_py_trains_the_captioner(there, monkeypatch, capsys):
    """By its flags, under the names that people type, too; into the folder of a captioner again, and no other's."""
    import train

    recipes = []
    monkeypatch.setattr(nanomed.captions.tiny, "train", lambda recipe, bar, device: recipes.append(recipe)
                        or nanomed.captions.tiny.build())  # fmt: skip
    words = "--model captioner-tiny --max_train_steps 3 --seed 4 --batch 2 --learning_rate 0.1 --scenes 5".split()
    for _ in range(2):
        code, said = called(train.main, [*words, "--out", "made"], capsys, monkeypatch)
        assert code == 0 and not said
    assert recipes == [nanomed.captions.tiny.Recipe(3, 2, 5, 0.1, 4)] * 2
    assert nanomed.captions.tiny.PROMPT in nanomed.weights.settings(there / "made", "it")["prompt"]
    (there / "other").mkdir()
    (there / "other" / "config.json").write_text('{"model_type": "llama"}')
    code, said = called(train.main, [*words, "--out", "other"], capsys, monkeypatch)
    assert code == 2 and "config.json is there already" in said and len(said.splitlines()) == 1 and len(recipes) == 2


def test_nothing_is_written_over_that_somebody_else_made(there, monkeypatch):
    """A file of that name, of whichever command; what the commands themselves wrote they may write again."""
    for verb, extra in (("vsg", []), ("simplify", []), ("paraphrase", [])):
        (there / "mine.csv").write_text("mine\n")
        monkeypatch.setattr("sys.argv", ["captions", *VERBS[verb][1], "--out", "mine.csv", *extra])
        with pytest.raises(UsageError, match="mine.csv"):
            command.main()
        assert (there / "mine.csv").read_text() == "mine\n"
        (there / "mine.csv").unlink()
        assert command.main() == 0 and command.main() == 0
        for path in there.glob("*mine.csv*"):
            path.unlink()
    (there / "c.csv.html").write_text("mine\n")
    monkeypatch.setattr("sys.argv", ["captions", *VERBS["vsg"][1], "--out", "c.csv", "--review"])
    with pytest.raises(UsageError, match="c.csv.html is there already"):
        command.main()
    assert not (there / "c.csv").exists()

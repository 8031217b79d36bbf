"""Paraphrases: more than 11,000 texts from the 483 prompts, each of which reads back to its prompt's meaning."""

import csv
import random

import pytest

from nanomed.captions import paraphrase
from nanomed.data import grammar
from nanomed.run import flags


@pytest.fixture(scope="module")
def everything() -> list[tuple[str, str]]:
    return [(prompt, text) for prompt in grammar.all_prompts() for text in paraphrase.paraphrases(prompt)]


def test_there_are_more_than_eleven_thousand_distinct_texts(everything):
    assert len({text for _, text in everything}) > 11_000
    assert min(len(paraphrase.paraphrases(prompt)) for prompt in grammar.all_prompts()) >= 25


def test_every_text_means_what_its_prompt_means(everything):
    for prompt, text in everything:
        assert paraphrase.parse(text) == grammar.parse(prompt), (prompt, text)


def test_no_text_serves_two_meanings(everything):
    meanings: dict[str, str] = {}
    for prompt, text in everything:
        meaning = repr(sorted(grammar.parse(prompt).items(), key=str))
        assert meanings.setdefault(text, meaning) == meaning, text


def test_texts_fit_the_text_encoder_and_differ_from_their_prompts(everything):
    assert max(len(text.split()) for _, text in everything) <= 40
    assert not {text for _, text in everything} & set(grammar.all_prompts())


def test_they_are_the_same_every_time_and_varied():
    first = paraphrase.paraphrases("Generate an image with no polyps.", 10)
    assert first == paraphrase.paraphrases("Generate an image with no polyps.", 10)
    assert len({text.split()[0] for text in first}) >= 4


@pytest.mark.parametrize("text", ["", "Create a cat.", "Create an endoscopic image with many polyps.",
                                  "Generate an image with no polyps."])  # fmt: skip
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="not a paraphrase"):
        paraphrase.parse(text)


def test_the_file_serves_the_papers_strategies(tmp_path):
    from pathlib import Path

    from nanomed.data.table import Row, Table, with_paraphrases

    prompts = random.Random(0).sample(grammar.all_prompts(), 20)
    assert paraphrase.write_csv(tmp_path / "p.csv", prompts, n=3) == (60, [])
    assert len(list(csv.DictReader(open(tmp_path / "p.csv")))) == 60
    table = Table("t", (Row(Path("a.jpg"), tuple(prompts)),))
    row = with_paraphrases(table, tmp_path / "p.csv", "all").rows[0]
    assert [paraphrase.parse(text) for text in row.paraphrases] == [grammar.parse(prompt) for prompt in prompts]


# ------------------------------------------------------------------------------------------------------ the command

REAL = ["Generate an image with an abnormality with the color black.",
        "Generate an image with an abnormality with the colors pale pink, pink/red and white.",
        "Generate an image with 2 polyps.", "Generate an image with 2 polyps.", "Something else entirely."]  # fmt: skip


@pytest.fixture
def organisers(tmp_path):
    """A file as the organisers give it, semicolons and all."""
    path = tmp_path / "prompt-gt.csv"
    path.write_text("ImageID;Prompt\n" + "".join(f'img{i};"{prompt}"\n' for i, prompt in enumerate(REAL)))
    return path


def test_the_organisers_colours_are_free_words():
    for prompt in REAL[:2]:
        for text in paraphrase.paraphrases(prompt, None):
            assert paraphrase.parse(text) == grammar.parse(prompt), text


def test_input_comes_first_and_is_left_as_it_is(organisers, tmp_path, capsys):
    """A line for each of its distinct prompts; those that no rule covers are listed, and keep their own words."""
    before, out = organisers.read_bytes(), tmp_path / "p.csv"
    assert paraphrase.main([str(organisers), "--out", str(out), "--n", "3"]) == 0
    said = capsys.readouterr().out
    assert "9 paraphrases of 3 prompts" in said and "1 that no rule covers" in said and repr(REAL[4]) in said
    assert organisers.read_bytes() == before
    lines = list(csv.DictReader(open(out)))
    assert list(dict.fromkeys(line["Prompt"] for line in lines)) == list(dict.fromkeys(REAL))
    from pathlib import Path

    from nanomed.data.table import Row, Table, with_paraphrases

    table = Table("t", (Row(Path("a.jpg"), tuple(REAL)),))
    assert with_paraphrases(table, out, "all").rows[0].paraphrases[4] == REAL[4]
    added = with_paraphrases(table, out, "add").rows[0].prompts
    assert len(added) == 9 and added.count(REAL[4]) == 1


def test_data_sets_are_read_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paraphrase.main(["toy:5", "--out", "p.csv", "--n", "1"]) == 0
    lines = list(csv.DictReader(open("p.csv")))
    from nanomed import data

    assert {line["Prompt"] for line in lines} == {p for row in data.load("toy:5").rows for p in row.prompts}
    assert paraphrase.main(["toy:5", "--out", "p.csv", "--n", "2"]) == 0  # its own file


@pytest.mark.parametrize("words, code, message", [
    (["SOURCE", "--out", "SOURCE"], 2, "prompt-gt.csv is there already"),
    (["nowhere.csv", "--out", "x.csv"], 3, "nowhere.csv: no such file"),
    (["SOURCE", "--out", "x.csv", "--n", "0"], 2, "--n 0"),
    ([".", "--out", "x.csv"], 3, "clef:."),
    (["clef:nowhere", "--out", "x.csv"], 3, "nowhere"),
])  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(organisers, tmp_path, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    before = organisers.read_bytes()
    monkeypatch.setattr("sys.argv", ["paraphrase", *(word.replace("SOURCE", str(organisers)) for word in words)])
    with pytest.raises(SystemExit) as ended:
        flags.main(paraphrase.main)
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert organisers.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["prompt-gt.csv"]

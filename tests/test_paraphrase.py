"""Paraphrases: more than 11,000 texts from the 483 prompts, each of which reads back to its prompt's meaning."""

import csv
import random

import pytest

from nanomed.captions import paraphrase
from nanomed.data import grammar


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
    assert paraphrase.write_csv(tmp_path / "p.csv", prompts, n=3) == 60
    assert len(list(csv.DictReader(open(tmp_path / "p.csv")))) == 60
    table = Table("t", (Row(Path("a.jpg"), tuple(prompts)),))
    row = with_paraphrases(table, tmp_path / "p.csv", "all").rows[0]
    assert [paraphrase.parse(text) for text in row.paraphrases] == [grammar.parse(prompt) for prompt in prompts]

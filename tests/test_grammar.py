"""The prompt grammar of MEDVQA-GI 2024: the real set's kinds and counts, typos included, and a parser of all of it."""

from collections import Counter

import pytest

from nanomed.data import grammar


def kind(prompt: str) -> str:
    said = grammar.parse(prompt)
    if "not containing" in prompt:
        return "not containing"
    places = ("abnormality_at", "instrument_at", "landmark_at")
    for key in ("contains", "findings", "instruments", "polyps", "sizes", "paris", "procedure", *places):
        if key in said:
            return key
    return "stray" if prompt == grammar.STRAY else "colors"


def test_there_are_483_prompts_in_the_real_proportions():
    prompts = grammar.all_prompts()
    assert len(prompts) == len(set(prompts)) == 483
    assert Counter(map(kind, prompts)) == {
        "contains": 22, "not containing": 2, "findings": 8, "instruments": 4, "polyps": 8, "colors": 99, "sizes": 12,
        "paris": 6, "procedure": 2, "abnormality_at": 132, "instrument_at": 80, "landmark_at": 107, "stray": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("Generate an image with no polyps.", {"polyps": 0, "polyp": False}),
        ("Generate an image with 1 finding.", {"findings": 1}),
        ("Generate an image containing a green/black box artefact.", {"contains": (grammar.BOX,), "box": True}),
        ("Generate an image not containing text.", {"text": False}),
        (
            "Generate an image containing polyp snareandtube.",
            {"contains": ("polyp snare", "tube"), "instrument": True},
        ),
        (
            "Generate an image with an an instrument located in the lower-right and lower-center.",
            {"instrument_at": frozenset({"lower-right", "lower-center"})},
        ),
        (
            "Generate an image with an an anatomical landmark located in the lower-rigth.",
            {"landmark_at": frozenset({"lower-right"})},
        ),
        ("Generate a polyp of type paris is.", {"paris": ("is",)}),
        ("Generate an image with Pink findings.", {"colors": ("pink",)}),
        ("Generate an image with an abnormality with the color black.", {"colors": ("black",)}),
        (
            "Generate an image with an abnormality with the colors pale pink, pink/red and white.",
            {"colors": ("pale pink", "pink/red", "white")},
        ),
        ("Generate an image with an abnormality with the color(s) red and pink.", {"colors": ("red", "pink")}),
    ],
)
def test_known_prompts_are_read(prompt, said):
    assert grammar.parse(prompt) == said


@pytest.mark.parametrize("text", ["", "a cat", "Generate an image with a cat.", "Generate an image with no polyps",
                                  "Generate an image with an an abnormality located in the middle."])  # fmt: skip
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="not a prompt of the MEDVQA-GI grammar"):
        grammar.parse(text)


def test_no_prompt_is_longer_than_the_real_longest():
    assert max(len(prompt.split()) for prompt in grammar.all_prompts()) <= 21

"""The captioner in miniature: what it says of the toy world can be read back, its folder is LLaVA-NeXT's, it learns."""

import pytest
import torch
import transformers
from conftest import close
from PIL import Image

import nanomed.captions
from nanomed.captions import tiny
from nanomed.data import grammar, toy
from nanomed.evaluation import toyworld

SCENES = [toy.scene(seed) for seed in range(60)]


def test_a_caption_says_what_the_scene_shows_and_the_reader_agrees():
    """`claims` is no other than what the organisers' prompts of the scene say, kind for kind."""
    right = named = 0
    for scene in SCENES:
        said = toy.claims(tiny.describe(scene))
        assert set(said) <= set(toy.prompts(scene)) and len(said) == 3 + bool(scene.polyps)
        a, b = tiny.judged(toy.render(scene, 96), tiny.describe(scene))
        right, named = right + a, named + b
    assert named >= 4 * len(SCENES) and right / named > 0.99  # the reader's own error at 96 pixels


def test_what_a_caption_does_not_say_is_not_judged():
    assert toy.claims("An endoscopic image.") == toy.claims("") == []
    assert toy.claims("one polyp: a red one in the nowhere.") == [grammar.count("polyp", 1)]
    assert tiny.judged(toy.render(SCENES[0], 96), "An endoscopic image.") == (0, 0)


def test_a_wrong_caption_is_told_from_a_right_one():
    """With everything turned round, nothing that is named is right."""
    image = toy.render(next(scene for scene in SCENES if not scene.polyps and not scene.box), 96)
    wrong = "one polyp: a red one in the center. There is a green box artefact."
    assert tiny.judged(image, wrong) == (0, 4)


def test_images_drawn_from_captions_are_judged_by_what_those_say():
    """As `evaluate.py` does: every sentence of a caption counts, and texts of another world do not."""
    images = [toy.render(scene, 96) for scene in SCENES]
    told = [tiny.describe(scene) for scene in SCENES]
    right = toyworld.faithfulness(images, told)
    assert len(right["prompt faithfulness"]) == sum(tiny.judged(*pair)[1] for pair in zip(images, told))
    assert len(right["box artefact yes/no"]) == len(right["instrument yes/no"]) == len(SCENES)
    wrong = toyworld.faithfulness(images, told[::-1])
    assert sum(right["prompt faithfulness"]) > 1.5 * sum(wrong["prompt faithfulness"])
    assert toyworld.faithfulness(images, ["A polyp."] * len(SCENES)) == {}


def test_the_vocabulary_spells_every_caption():
    tokenizer = tiny.tokenizer()
    for scene in SCENES:
        text = tiny.describe(scene)
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text and tokenizer.token_to_id("<unk>") not in ids


def test_its_folder_is_one_of_llava_next(tmp_path):
    """transformers reads it, and both write the same."""
    torch.manual_seed(0)
    ours = tiny.build()
    tiny.save(ours, tmp_path)
    again = nanomed.captions.load(tmp_path)
    reference = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path).eval()
    image = Image.fromarray(toy.render(SCENES[3], 96))
    with torch.no_grad():
        pixels, (before, after) = again.network.tiles.cut(image)[None], again.pieces(tiny.PROMPT)
        ids = torch.tensor([[*before, *[2] * again.network.tiles.tokens((96, 96)), *after]])
        expected = reference(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([[96, 96]])).logits
        close(again.logits(image, tiny.PROMPT), expected, 1e-4)
        assert torch.equal(again.logits(image, tiny.PROMPT), ours.logits(image, tiny.PROMPT))


def test_the_loss_is_that_of_the_next_token():
    """By hand: the mean of -log p of each token of each caption, padding left out."""
    torch.manual_seed(0)
    model = tiny.build()
    images = [Image.fromarray(toy.render(scene, 96)) for scene in SCENES[:2]]
    texts = [tiny.describe(SCENES[0]), "no"]
    total, count = 0.0, 0
    with torch.no_grad():
        for image, text in zip(images, texts):
            ids = [*model.tokenizer.encode(text, add_special_tokens=False).ids, 1]
            logs = model.logits(image, tiny.PROMPT + text)[0].log_softmax(-1)[-len(ids) :]
            total -= sum(logs[i, token].item() for i, token in enumerate(ids))
            count += len(ids)
        close(tiny.loss_of(model, images, texts), torch.tensor(total / count), 1e-5)


def test_it_learns_by_heart_what_it_is_shown():
    """A few scenes in a few steps, end included."""
    model = tiny.train(tiny.Recipe(steps=90, batch=2, scenes=2, lr=5e-3))
    images = [Image.fromarray(toy.render(toy.scene(i), 96)) for i in range(2)]
    texts = model.generate(images, [tiny.PROMPT] * 2, max_new_tokens=60)
    assert texts == [tiny.describe(toy.scene(i)) for i in range(2)]


@pytest.mark.slow
def test_nine_tenths_of_what_it_names_is_right_after_the_recipe():
    """Of scenes that were not learned, by the deterministic reader. Minutes."""
    right, _ = tiny.accuracy(tiny.train())
    assert right >= 0.9

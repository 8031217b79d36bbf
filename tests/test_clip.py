"""CLIP: its tokenizer against transformers and recorded ids, its two towers against transformers, and the published
files' names and shapes."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import close
from manifests import about, config, names_and_shapes
from PIL import Image
from safetensors.torch import load_file

from nanomed import weights
from nanomed.text.clip import ClipText, ClipTextConfig
from nanomed.text.clip_vision import MEAN, STD, ClipVision, ClipVisionConfig, preprocess
from nanomed.text.tokenizers import END, START, ClipTokenizer, train_bpe

# --------------------------------------------------------------------------------------------------------- tokenizer

PROMPTS = [
    "Generate an image containing a green/black box artefact.",
    "Generate an image with 1 polyp.",
    "Generate an image with polyps of size 5-10mm and 11-20mm.",
    "Generate an image with an abnormality located in the upper-right, center and lower-left.",
]
ALPHABETS = [
    "abcdefgh ABCDEFGH 0123456789 .,;:!?'\"-_/()[]{}<>|@#$%^&*+=~`\\",
    "'s 't 're 've 'm 'll 'd 'S 'LL",
    " \t\n\r\x0b\x0c\x00\x01\x1f\x7f\x85\u00a0\u2003\u2028\u3000\ufeff\u200b\u200d\u2060",
    "éüñçøßÆŒİıſǅ ÀÈ e\u0301 a\u030a o\u0308\u0304 \u1e9b\u0323 \uac00\u1100\u1161 ΑΒΓσς",
    "漢字かなカナ한글العربيةעבריתไทยहिन्दी Кириллица",
    "😀👩‍⚕️🏽🇩🇪❤️ ①Ⅷ½٣৩ ﬁ Ａ１ \u202eRTL \ud7ff\ue000\ufffd\U0010ffff",
]
PIECES = [START, END, START.upper(), "<|EndOfText|>", "!", "!!!", "polyp", "Polyps", "  ", "''s", "don't", "x" * 300]


def strings(count: int, seed: int = 0) -> list[str]:
    """Prompts in the wild: pieces of words, punctuation, scripts, emoji, control characters, special tokens."""
    draw = random.Random(seed)
    texts = ["", " ", "\n\t", *PROMPTS, *PIECES, "word " * 5000, "é" * 4000]
    while len(texts) < count:
        parts = []
        for _ in range(draw.randint(1, 8)):
            kind = draw.randrange(8)
            if kind < len(ALPHABETS):
                parts.append("".join(draw.choices(ALPHABETS[kind], k=draw.randint(1, 12))))
            elif kind == 6:
                parts.append(draw.choice(PIECES))
            else:
                points = (draw.randrange(0x11000) for _ in range(4))
                parts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
        texts.append(draw.choice(["", " "]).join(parts))
    return texts


def described(token: str, normalized: bool) -> dict:
    return {
        "__type": "AddedToken",
        "content": token,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": normalized,
    }


CONFIGS = {  # the ways in which published repositories describe their special tokens
    "plain": {},
    "clip-l": {"bos_token": described(START, True), "eos_token": described(END, True), "pad_token": END},
    "sdxl-2": {"bos_token": described(START, True), "eos_token": described(END, True), "pad_token": "!"},
    "decoder": {
        "pad_token": "!",
        "added_tokens_decoder": {
            str(i): {key: value for key, value in described(token, fold).items() if key != "__type"} | {"special": True}
            for i, token, fold in [(0, "!", False), (-2, START, True), (-1, END, True)]
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return train_bpe(PROMPTS * 2 + ["polyp polyps Polyp don't é 漢字 !!"], merges=120)


@pytest.mark.parametrize("kind", CONFIGS)
def test_ids_equal_transformers_on_thousands_of_strings(tokenizer, tmp_path, kind):
    tokenizer.save(tmp_path)
    settings = json.loads(json.dumps(CONFIGS[kind]))
    if added := settings.get("added_tokens_decoder"):  # ids from the end are of this vocabulary
        settings["added_tokens_decoder"] = {str(int(i) % len(tokenizer)): token for i, token in added.items()}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, reference = ClipTokenizer.from_folder(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert ours.pad_id == reference.pad_token_id
    texts = strings(2000)
    for length in (77, 16):
        expected = reference(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids, mask = ours(texts, length=length)
        wrong = (ids != expected.input_ids).any(1).nonzero().flatten().tolist()
        assert not wrong, f"{len(wrong)} differ, the first: {texts[wrong[0]]!r}"
        assert torch.equal(mask, expected.attention_mask.bool())
    assert ours.lengths(texts[:50]) == [len(ids) for ids in reference(texts[:50]).input_ids]


def test_recorded_ids_of_the_published_vocabulary(real_data, golden):
    tokenizer = ClipTokenizer.from_folder(real_data / "clip")
    assert (len(tokenizer), tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (49408, 49406, 49407, 49407)
    cases = json.loads((golden / "clip_hf.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 45
    ids, mask = tokenizer([case["text"] for case in cases], length=512)
    for case, row, real in zip(cases, ids, mask):
        assert row[real].tolist() == case["ids"], case["text"]


@pytest.mark.parametrize("pad", [END, "!"])
def test_published_vocabulary_equals_transformers(real_data, tmp_path, pad):
    published = ClipTokenizer.from_folder(real_data / "clip")
    ClipTokenizer(published.vocab, published.merges, pad).save(tmp_path)
    ours, reference = ClipTokenizer.from_folder(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = strings(1000, seed=1)
    expected = reference(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(ours(texts)[0], expected.input_ids)


def test_truncation_keeps_the_end_and_is_counted(tokenizer):
    texts = ["", "polyp", "1 2 3", "1 2 3 4", "1 2 3 4", "9 " * 1000]
    ids, mask = tokenizer(texts, length=5)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape == (6, 5)
    assert mask.sum(1).tolist() == [2, 3, 5, 5, 5, 5]
    assert all(row[real][-1] == tokenizer.end_id for row, real in zip(ids, mask))
    assert (ids[:, 0] == tokenizer.start_id).all() and (ids[~mask] == tokenizer.pad_id).all()
    assert tokenizer.cut == 3 and tokenizer.lengths(texts) == [2, 3, 5, 6, 6, 1002]
    tokenizer(["polyp"])
    assert tokenizer.cut == 0
    with pytest.raises(ValueError, match="start and end"):
        tokenizer(["polyp"], length=1)
    with pytest.raises(ValueError, match="not text"):
        tokenizer(["polyp", "half a pair: \ud83d"])


def test_a_trained_vocabulary_follows_clips_convention(tokenizer, tmp_path):
    tokens = list(tokenizer.vocab)
    assert list(tokenizer.vocab.values()) == list(range(len(tokens)))
    assert tokens[0] == "!" and tokens[256:512] == [token + "</w>" for token in tokens[:256]]
    assert tokens[-2:] == [START, END] and len(tokens) <= 512 + 120 + 2
    assert [a + b for a, b in tokenizer.merges] == tokens[512:-2]
    assert tokenizer.lengths(["polyp", "generate an image"]) == [3, 5]  # words that are frequent are one token
    by_hand = [("a", "b"), ("ab", "c</w>"), ("a", "b</w>"), ("b", "c"), ("bc", "d</w>")]  # 2, 2, 1, 1, 1 times
    assert train_bpe(["ab abc abc b bcd"], merges=9).merges == by_hand
    again = train_bpe(PROMPTS * 2 + ["polyp polyps Polyp don't é 漢字 !!"], merges=120)
    assert again.vocab == tokenizer.vocab and again.merges == tokenizer.merges
    tokenizer.save(tmp_path)
    reread = ClipTokenizer.from_folder(tmp_path)
    assert reread.vocab == tokenizer.vocab and reread.merges == tokenizer.merges


def test_reads_a_tokenizer_json_alone(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "vocab.json").exists()
    texts = strings(200, seed=2)
    assert torch.equal(ClipTokenizer.from_folder(tmp_path / "b")(texts)[0], tokenizer(texts)[0])


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("vocab.json", "{", "damaged"),
        ("vocab.json", "[]", "startoftext"),
        ("vocab.json", '{"a": 0}', "startoftext"),
        ("merges.txt", "a b c\n", "damaged"),
        ("merges.txt", "nowhere to\n", "damaged"),
        ("tokenizer_config.json", '{"pad_token": "<pad>"}', "<pad>"),
        ("tokenizer_config.json", '{"pad_token": 3}', "without 3"),
    ],
)
def test_damaged_tokenizer_files_are_named(tokenizer, tmp_path, name, content, says):
    tokenizer.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(weights.WeightsError, match=says) as raised:
        ClipTokenizer.from_folder(tmp_path)
    assert "\n" not in str(raised.value)


def test_missing_tokenizer_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.json"):
        ClipTokenizer.from_folder(tmp_path)


# --------------------------------------------------------------------------------------------------------- text tower

SMALL = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=20, projection_dim=24)  # fmt: skip
NO_IDS = dict(bos_token_id=97, eos_token_id=98, pad_token_id=98)


def texts(length: int = 20, seed: int = 0):
    """Ids with the end token (the largest) at different places, and their mask; the padding is the end token too."""
    torch.manual_seed(seed)
    ids, ends = torch.randint(1, 97, (4, length)), [length - 1, 3, 9, 1]
    mask = torch.zeros(4, length, dtype=torch.bool)
    for row, end in enumerate(ends):
        ids[row, 0], ids[row, end:], mask[row, : end + 1] = 97, 98, True
    return ids, mask


def reference_text(act: str):
    """transformers' text model with random weights, and ours with the same tensors under their published names."""
    torch.manual_seed(1)
    settings = transformers.CLIPTextConfig(**SMALL, **NO_IDS, hidden_act=act, attn_implementation="eager")
    reference = transformers.CLIPTextModelWithProjection(settings).eval()
    for parameter in reference.parameters():  # biases and LayerNorms too
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = ClipText(ClipTextConfig(**SMALL, hidden_act=act), projection=True).eval()
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    return reference, weights.load(ours, state)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_text_tower_equals_transformers(act, masked):
    reference, ours = reference_text(act)
    ids, mask = texts()
    mask = mask if masked else None
    expected = reference(ids, attention_mask=mask if mask is None else mask.long(), output_hidden_states=True)
    states = ours.features(ids, mask)
    close(ours(ids, mask), expected.last_hidden_state, 1e-5)
    close(states.last, expected.last_hidden_state, 1e-5)
    close(states.penultimate, expected.hidden_states[-2], 1e-5)
    close(states.embeds, expected.text_embeds, 1e-5)

    probes = [torch.randn_like(t) for t in (states.last, states.penultimate, states.embeds)]
    sum((a * b).sum() for a, b in zip((states.last, states.penultimate, states.embeds), probes)).backward()
    outputs = (expected.last_hidden_state, expected.hidden_states[-2], expected.text_embeds)
    sum((a * b).sum() for a, b in zip(outputs, probes)).backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * largest, name


def test_pooling_takes_the_first_end_token_whatever_the_config_says():
    """Published configs name eos_token_id 2; OpenAI pools at the largest id, of which the first is the end."""
    ids, mask = texts()
    torch.manual_seed(1)
    settings = transformers.CLIPTextConfig(**SMALL, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    reference = transformers.CLIPTextModel(settings).eval()
    state = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in reference.state_dict().items()}
    ours = weights.load(ClipText(ClipTextConfig(**SMALL)), state)
    with torch.no_grad():
        states, expected = ours.features(ids), reference(ids).pooler_output
    close(states.pooled, expected, 1e-5)
    for row, end in enumerate((19, 3, 9, 1)):
        assert torch.equal(states.pooled[row], states.last[row, end])


def test_what_comes_later_or_is_masked_changes_nothing():
    _, ours = reference_text("quick_gelu")
    ids, mask = texts()
    with torch.no_grad():
        states = ours(ids, mask)
        other = ids.clone()
        other[~mask] = 5
        for row in range(4):
            close(ours(other, mask)[row, mask[row]], states[row, mask[row]], 1e-6)
        short = ours(ids[2:3, :10])  # no padding at all
    close(short[0], states[2, :10], 1e-6)


def test_bfloat16_is_close_and_stays_bfloat16():
    _, ours = reference_text("gelu")
    ids, mask = texts()
    with torch.no_grad():
        expected, half = ours(ids, mask), ours.bfloat16()(ids, mask)
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.05)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="21 tokens"):
        ClipText(ClipTextConfig(**SMALL))(torch.zeros(1, 21, dtype=torch.int64))


def test_a_fresh_tower_learns():
    """Embeddings of unit variance at the start, and a few steps tell four prompts apart."""
    torch.manual_seed(0)
    encoder = ClipText(ClipTextConfig(**SMALL))
    embedding = encoder.text_model.embeddings.token_embedding.weight
    assert abs(embedding.std().item() - 1) < 0.1
    ids, mask = texts()
    optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(encoder.features(ids, mask).pooled[:, :4], torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


# ------------------------------------------------------------------------------------------------------- image tower

SMALL_VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
                    patch_size=7, projection_dim=24)  # fmt: skip


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_image_tower_equals_transformers(act):
    torch.manual_seed(1)
    settings = transformers.CLIPVisionConfig(**SMALL_VISION, hidden_act=act)
    reference = transformers.CLIPVisionModelWithProjection(settings).eval()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = ClipVision(ClipVisionConfig(**SMALL_VISION, hidden_act=act))
    weights.load(ours, {name: tensor.clone() for name, tensor in reference.state_dict().items()})
    pixels = torch.randn(2, 3, 28, 28)
    expected = reference(pixels, output_hidden_states=True)
    states = ours.features(pixels)
    close(ours(pixels), expected.image_embeds, 1e-5)
    close(states.embeds, expected.image_embeds, 1e-5)
    close(states.last, expected.last_hidden_state, 1e-5)
    close(states.penultimate, expected.hidden_states[-2], 1e-5)

    probe = torch.randn_like(states.embeds)
    (states.embeds * probe).sum().backward()
    (expected.image_embeds * probe).sum().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * largest, name


def test_image_tower_without_projection_gives_the_pooled_token():
    torch.manual_seed(0)
    encoder = ClipVision(ClipVisionConfig(**SMALL_VISION), projection=False)
    pixels = torch.randn(2, 3, 28, 28)
    assert encoder.features(pixels).embeds is None and torch.equal(encoder(pixels), encoder.features(pixels).pooled)
    with pytest.raises(ValueError, match="28 x 28"):
        encoder(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("side", [(224, 224), (720, 576), (100, 333), (301, 200), (225, 224), (1, 9)])
def test_preprocessing_equals_transformers_to_a_grey_level(side):
    draw = np.random.default_rng(sum(side))
    noise = Image.fromarray(draw.integers(0, 256, (*side[::-1], 3), dtype=np.uint8))
    coarse = noise.resize((max(side[0] // 8, 1), max(side[1] // 8, 1))).resize(side, Image.Resampling.BICUBIC)
    for image in (noise, coarse, coarse.convert("L")):
        reference = transformers.CLIPImageProcessorPil()(image.convert("RGB"), return_tensors="pt").pixel_values[0]
        ours = preprocess(image)
        assert ours.shape == (3, 224, 224) and ours.dtype == torch.float32
        grey = (ours - reference).abs().amax((1, 2)) * torch.tensor(STD)
        assert grey.max() <= 1 / 255 + 1e-6
    mid = preprocess(Image.new("RGB", side, (124, 117, 104)))
    close(
        mid,
        (torch.tensor([124, 117, 104]) / 255 - torch.tensor(MEAN)).div(torch.tensor(STD)).view(3, 1, 1) + 0 * mid,
        1e-6,
    )


# --------------------------------------------------------------------------------------------- files of the publishers


@pytest.mark.parametrize(
    "component, projection, count",
    [
        ("clip_vit_large_patch14_text", True, 123_650_304),
        ("sd14_text_encoder", False, 123_060_480),
        ("sd15_text_encoder", False, 123_060_480),
        ("sdxl_text_encoder", False, 123_060_480),
        ("sdxl_text_encoder_2", True, 694_659_840),
        ("kandinsky22_prior_text_encoder", True, 694_659_840),
    ],
)
def test_published_text_encoders_load_strictly(component, projection, count, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(component)))
    encoder = weights.build(ClipText, ClipTextConfig.from_json(tmp_path), projection=projection)
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert shapes == names_and_shapes(component)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count == about(component)["params"]


def test_published_image_encoder_loads_strictly(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config("kandinsky22_prior_image_encoder")))
    encoder = weights.build(ClipVision, ClipVisionConfig.from_json(tmp_path))
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert shapes == names_and_shapes("kandinsky22_prior_image_encoder")
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 1_844_907_264


def test_one_half_of_the_published_clip_loads_strictly(tmp_path):
    """openai/clip-vit-large-patch14 holds both towers; `prefix` takes one, and the config is the nested one."""
    (tmp_path / "config.json").write_text(json.dumps(config("clip_vit_large_patch14_full")))
    text, vision = ClipTextConfig.from_json(tmp_path), ClipVisionConfig.from_json(tmp_path)
    assert text == ClipTextConfig() and vision == ClipVisionConfig()
    whole = names_and_shapes("clip_vit_large_patch14_full") | {
        name: tuple(shape) for name, shape in about("clip_vit_large_patch14_full")["optional"].items()
    }
    whole = {name: torch.empty(shape, device="meta") for name, shape in whole.items()}
    for half, module in [
        ("text_model.", weights.build(ClipText, text)),
        ("vision_model.", weights.build(ClipVision, vision, projection=False)),
    ]:
        assert {n for n in whole if n.startswith(half)} - set(module.state_dict()) == {f"{half}embeddings.position_ids"}
        assert {n: t.shape for n, t in module.state_dict().items()} == {
            n: t.shape for n, t in whole.items() if n.startswith(half) and not n.endswith("position_ids")
        }


def test_loads_what_transformers_saves(tmp_path):
    """A whole CLIP in small, saved with both towers, read by its prefixes."""
    torch.manual_seed(0)
    settings = transformers.CLIPConfig(
        text_config={**SMALL, **NO_IDS, "hidden_act": "gelu"}, vision_config={**SMALL_VISION}, projection_dim=24
    )
    reference = transformers.CLIPModel(settings).eval()
    reference.save_pretrained(tmp_path)
    text = weights.build(ClipText, ClipTextConfig.from_json(tmp_path))
    weights.load(text, weights.read(tmp_path, "model", prefix="text_model."))
    vision = weights.build(ClipVision, ClipVisionConfig.from_json(tmp_path))
    tensors = weights.read(tmp_path, prefix="vision_model.") | weights.read(tmp_path, prefix="visual_projection")
    weights.load(vision, tensors)
    ids, mask = texts()
    with torch.no_grad():
        close(text(ids, mask), reference.text_model(ids, attention_mask=mask.long()).last_hidden_state, 1e-5)
        pixels = torch.randn(2, 3, 28, 28)
        expected = reference.visual_projection(reference.vision_model(pixels).pooler_output)
        close(vision(pixels), expected, 1e-5)


def test_loads_a_saved_text_model_with_projection(tmp_path):
    reference, _ = reference_text("gelu")
    reference.save_pretrained(tmp_path)
    assert all(name.startswith("text_") for name in load_file(tmp_path / "model.safetensors"))
    ours = weights.build(ClipText, ClipTextConfig.from_json(tmp_path), projection=True)
    weights.load(ours, weights.read(tmp_path))
    ids, _ = texts()
    with torch.no_grad():
        close(ours.features(ids).embeds, reference(ids).text_embeds, 1e-5)


def test_wrong_configs_are_named(tmp_path):
    with pytest.raises(weights.WeightsError, match="config.json is missing"):
        ClipTextConfig.from_json(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(weights.WeightsError, match="config.json"):
        ClipTextConfig.from_json(tmp_path)
    with pytest.raises(weights.WeightsError, match="swish"):
        ClipText(ClipTextConfig(**SMALL, hidden_act="swish"))

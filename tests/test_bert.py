"""BERT against transformers' BertModel, value for value and gradient for gradient; WordPiece against transformers'
BertTokenizer, on a vocabulary made here and on a published one; and mT5 as Hunyuan-DiT reads it."""

import json
import random

import pytest
import torch
import transformers
from conftest import assert_gradients_equal, close
from manifests import about, config, names_and_shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanomed import weights
from nanomed.text.bert import OPTIONAL, Bert, BertConfig, load_bert
from nanomed.text.t5 import T5Config, T5Encoder, encoder_half
from nanomed.text.unigram import train_unigram
from nanomed.text.wordpiece import SPECIAL, WordPiece, train_wordpiece

KINDS = {
    "wide": dict(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=72,
                 max_position_embeddings=40),
    "one head": dict(vocab_size=90, hidden_size=12, num_hidden_layers=2, num_attention_heads=1, intermediate_size=20,
                     max_position_embeddings=24, type_vocab_size=3, layer_norm_eps=1e-6),
}  # fmt: skip
REAL = [20, 7, 13, 2]  # tokens of the rows of a batch
PROMPTS = [
    "An endoscopic image of DYED lifted polyps, predominantly blue with speckles of white.",
    "内窥镜图像，左上方有一个息肉。",
    "Generate an image with polyps of size 5-10mm and 11-20mm: naïve Café façade!",
    "",
    "  \t a\nb\u00a0c\u3000d\u200be\ufeff\x00\x07 ",
    "[CLS] a [SEP]b[MASK] [unk] [PAD]",
    "한글 кириллица ไทย हिन्दी עברית ﬁ ＡＢ１ ① Ǆ ß İı \U0001f600\U00020000\uf900",
    "x" * 99 + " " + "x" * 100 + " " + "x" * 101,
    "polyp" * 30,
    "e\u0301 a\u030a o\u0308\u0304 \u1e9b\u0323",
]


def pair(kind: str) -> tuple[transformers.BertModel, Bert]:
    """transformers' encoder at its default initialisation, and ours with the same weights."""
    torch.manual_seed(0)
    reference = transformers.BertModel(transformers.BertConfig(**KINDS[kind]), add_pooling_layer=False).eval()
    ours = Bert(BertConfig(**KINDS[kind]))
    return reference, weights.load(ours, {name: t.clone() for name, t in reference.state_dict().items()}).eval()


def batch(kind: str) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(KINDS[kind]["vocab_size"], (len(REAL), 24), generator=draw)
    return ids, torch.arange(24) < torch.tensor(REAL)[:, None]


# ------------------------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_equal_transformers(kind, masked):
    """To 1e-5 and 1e-4; rows of padding included, for Hunyuan-DiT hands them on."""
    reference, ours = pair(kind)
    ids, mask = batch(kind)
    expected = reference(ids, attention_mask=mask.long() if masked else None).last_hidden_state
    states = ours(ids, mask if masked else None)
    close(states, expected, 1e-5)
    probe = torch.randn_like(states)
    (states * probe).sum().backward()
    (expected * probe).sum().backward()
    assert_gradients_equal(ours, reference, 1e-4)


def test_float64_leaves_no_doubt():
    reference, ours = (network.double() for network in pair("wide"))
    ids, mask = batch("wide")
    with torch.no_grad():
        close(ours(ids, mask), reference(ids, attention_mask=mask.long()).last_hidden_state, 1e-12)


def test_a_token_sees_both_sides_and_no_padding():
    _, ours = pair("wide")
    ids, mask = batch("wide")
    with torch.no_grad():
        states = ours(ids, mask)
        other = ids.masked_fill(~mask, 7)
        assert torch.equal(ours(other, mask)[mask], states[mask])
        later = ids.clone()
        later[0, 10] = (later[0, 10] + 1) % 60
        moved = (ours(later, mask)[0] - states[0]).abs().amax(-1)
    assert (moved[mask[0]] > 1e-6).all()
    with pytest.raises(ValueError, match="41 tokens: this BERT has 40 places"):
        ours(torch.zeros(1, 41, dtype=torch.int64))


def test_bfloat16_is_as_close_to_float32_as_transformers():
    reference, ours = pair("wide")
    ids, mask = batch("wide")
    with torch.no_grad():
        exact = ours(ids, mask)
        expected = reference.bfloat16()(ids, attention_mask=mask.long()).last_hidden_state
        out = ours.bfloat16()(ids, mask)
    assert out.dtype == torch.bfloat16
    error, tolerated = ((y.float() - exact).abs().mean() for y in (out, expected))
    assert error <= 1.2 * tolerated


def test_the_published_encoder_loads_strictly(tmp_path):
    component = "hunyuandit_text_encoder_bert"
    (tmp_path / "config.json").write_text(json.dumps(config(component)))
    encoder = weights.build(Bert, BertConfig.from_json(tmp_path))
    published = names_and_shapes(component)
    left_out = {name: published.pop(name) for name in OPTIONAL}
    assert {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()} == published
    count = sum(p.numel() for p in encoder.parameters()) + sum(torch.Size(shape).numel() for shape in left_out.values())
    assert count == about(component)["params"] and encoder.config == BertConfig()


def test_what_a_config_leaves_unsaid_is_what_transformers_takes(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": null}')
    unsaid = transformers.BertConfig()
    assert all(getattr(unsaid, name) == value for name, value in vars(BertConfig.from_json(tmp_path)).items())


def test_loads_what_transformers_saves(tmp_path):
    """With the pooler and, as in older files, the table of places; in one file, in shards, in another dtype."""
    torch.manual_seed(0)
    reference = transformers.BertModel(transformers.BertConfig(**KINDS["wide"])).eval()
    ids, mask = batch("wide")
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask.long()).last_hidden_state
        reference.save_pretrained(tmp_path / "one")
        tensors = load_file(tmp_path / "one" / "model.safetensors")
        assert OPTIONAL[0] in tensors
        save_file(tensors | {"embeddings.position_ids": torch.arange(40)[None]},
                  tmp_path / "one" / "model.safetensors")  # fmt: skip
        ours = load_bert(tmp_path / "one")
        assert not ours.training
        close(ours(ids, mask), expected, 1e-5)
        reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        close(load_bert(tmp_path / "shards")(ids, mask), expected, 1e-5)
        close(load_bert(tmp_path / "one", torch.bfloat16)(ids, mask), expected, 0.05)
    stated = json.loads((tmp_path / "one" / "config.json").read_text())
    for name, value in dict(hidden_act="relu", position_embedding_type="relative_key", is_decoder=True).items():
        (tmp_path / "one" / "config.json").write_text(json.dumps(stated | {name: value}))
        with pytest.raises(weights.WeightsError, match=name):
            load_bert(tmp_path / "one")
    (tmp_path / "one" / "config.json").write_text(json.dumps(stated | dict(num_hidden_layers=4)))
    with pytest.raises(weights.WeightsError, match="layer.3"):
        load_bert(tmp_path / "one")


# ----------------------------------------------------------------------------------------------------------- tokenizer


def texts(count: int, seed: int = 0) -> list[str]:
    """Prompts in the wild: words, scripts, combining sequences, control characters, very long words."""
    draw, parts = random.Random(seed), " ".join(PROMPTS).split()
    found = list(PROMPTS)
    while len(found) < count:
        some = draw.choices(parts, k=draw.randint(1, 6))
        points = (draw.randrange(0x30000) for _ in range(draw.randint(0, 6)))
        some.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
        found.append(draw.choice(["", " "]).join(some))
    return found


def assert_as_transformers(folder, length: int = 77, **settings) -> WordPiece:
    """Ids and masks of the texts, cut and padded; in a folder with vocab.txt."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"} | settings))
    reference = transformers.BertTokenizer.from_pretrained(folder)
    ours, prompts = WordPiece.from_folder(folder), texts(400)
    expected = reference(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids, mask = ours(prompts, length)
    assert torch.equal(ids, expected.input_ids) and torch.equal(mask, expected.attention_mask.bool())
    whole = reference(prompts)["input_ids"]
    assert ours.lengths(prompts) == [len(tokens) for tokens in whole] and len(ours) == len(reference)
    assert ours.cut == sum(len(tokens) > length for tokens in whole) > 0
    return ours


SPELLINGS = [{}, dict(do_lower_case=False), dict(do_lower_case=False, strip_accents=True), dict(strip_accents=False),
             dict(tokenize_chinese_chars=False)]  # fmt: skip


@pytest.mark.parametrize("settings", SPELLINGS)
def test_ids_equal_transformers_on_a_vocabulary_made_here(settings, tmp_path):
    """Chinese characters, joined and alone; capitals and accents, kept and dropped."""
    pieces = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyzABIé内窥镜图像有一", "##内", "##é", "café", "cafe", "Caf", "##é",
              "polyp", "##polyp", "##s", "图像", "##像", "##x", "x" * 60, "\u2028"]  # fmt: skip
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    ours = assert_as_transformers(tmp_path, 40, **settings)
    ids = ours(["图像"], 8)[0][0].tolist()
    joined = settings.get("tokenize_chinese_chars", True) is False
    assert ids[1:4] == [ours.vocab["图像"], 3, 0] if joined else [ours.vocab["图"], ours.vocab["像"], 3]


def test_ids_equal_transformers_on_a_published_vocabulary(real_data, tmp_path):
    """bert-base-uncased's 30,522 pieces."""
    vocab = (real_data / "bert" / "bert-base-uncased-vocab.txt").read_bytes()
    (tmp_path / "vocab.txt").write_bytes(vocab)
    ours = assert_as_transformers(tmp_path)
    assert ours(["An image of a polyp."], 12)[0].tolist() == [[101, 2019, 3746, 1997, 1037, 26572, 2361, 1012, 102] +
                                                             [0] * 3]  # fmt: skip


def test_what_is_saved_is_read_again(tmp_path):
    """By ours, by transformers, and out of transformers' own tokenizer.json."""
    ours = train_wordpiece(PROMPTS, 400)
    ours.save(tmp_path)
    again, prompts = WordPiece.from_folder(tmp_path), texts(60)
    reference = transformers.BertTokenizer.from_pretrained(tmp_path)
    reference.save_pretrained(tmp_path / "theirs")
    expected = ours(prompts)
    (tmp_path / "theirs" / "vocab.txt").unlink(missing_ok=True)
    for other in (again, WordPiece.from_folder(tmp_path / "theirs")):
        assert all(torch.equal(a, b) for a, b in zip(other(prompts), expected))
    theirs = reference(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(theirs, expected[0])
    assert train_wordpiece(PROMPTS, 400).vocab == ours.vocab and ours.vocab["polyps"] and len(ours) <= 400
    assert ours.vocab["[UNK]"] not in ours(["any word at all is spelled, 123"])[0]


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(weights.WeightsNotFound, match="neither vocab.txt nor tokenizer.json"):
        WordPiece.from_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n")
    with pytest.raises(weights.WeightsError, match=r"damaged .*: a vocabulary without \[SEP\]"):
        WordPiece.from_folder(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(weights.WeightsError, match="damaged tokenizer files"):
        WordPiece.from_folder(tmp_path)
    ours = train_wordpiece(PROMPTS, 100)
    for wrong in (3, "\ud800"):
        with pytest.raises(ValueError, match="not text"):
            ours([wrong])
    with pytest.raises(ValueError, match="length 1"):
        ours(["a"], 1)


# ----------------------------------------------------------------------------------------------------------------- mT5


def test_mt5_equals_transformers_mt5():
    """Hunyuan-DiT's second reader: its files say T5 or mT5, and the network is T5 v1.1's. All places, to 1e-5."""
    settings = dict(vocab_size=90, d_model=16, d_kv=8, d_ff=40, num_layers=3, num_heads=6,
                    feed_forward_proj="gated-gelu")  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.MT5EncoderModel(transformers.MT5Config(**settings)).eval()
    ours = T5Encoder(T5Config(**settings))
    weights.load(ours, encoder_half({name: tensor.clone() for name, tensor in reference.state_dict().items()}))
    ids, mask = batch("one head")
    expected = reference(ids, attention_mask=mask.long()).last_hidden_state
    states = ours(ids, mask)
    close(states, expected, 1e-5)
    probe = torch.randn_like(states)
    (states * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * largest, name


def test_a_prompt_beyond_256_tokens_is_cut_with_its_end_kept() -> None:

    tokenizer = train_unigram(PROMPTS, 80)
    ids, mask = tokenizer(["polyp " * 400, "a"], length=256)
    assert ids[0, -1] == tokenizer.end_id and mask[0].all() and tokenizer.cut == 1 and mask[1].sum() < 4

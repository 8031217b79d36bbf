"""T5's tokenizer: against the sentencepiece library on models trained here and on the published ones, against
transformers, and against recorded ids."""

import hashlib
import io
import json
import random
import re
import struct
import unicodedata

import pytest
import sentencepiece
import torch
import transformers

from nanomed import weights
from nanomed.text import spiece as spieces
from nanomed.text.spiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from nanomed.text.unigram import END, T5Tokenizer, train_unigram

PROMPTS = [
    "An endoscopic image of dyed lifted polyps, predominantly blue with speckles of white.",
    "A dermoscopic image of Melanoma shows a brownish-black irregularly shaped patch with a rough, granular texture.",
    "Generate an image with polyps of size 5-10mm and 11-20mm.",
    "Generate an image not containing a green/black box artefact.",
]
ALPHABETS = [
    "abcdefgh ABCDEFGH 0123456789 .,;:!?'\"-_/()[]{}<>|@#$%^&*+=~`\\",
    " \t\n\r\x0b\x0c\x00\x01\x1f\x7f\x85\x9f\u00a0\u2003\u2028\u3000\ufeff\u200b\u200d\u2060\u00ad",
    "éüñçøßÆŒİıſǅ Àe\u0301 a\u030a o\u0308\u0304u\u0328\u0301 \u1e9b\u0323\u0345\u0344 \uac00\u1100\u1161\u11a8",
    "漢字かナｶﾞ한글العربيةעבריתไทยहिन्दी Кириллица \u0958\u0928\u093c \ufb2c \U0001d15e",
    "😀👩‍⚕️🏽🇩🇪❤️ ①Ⅷ½㎏㍿٣ ﬁ Ａ１ ¨´ﷺ ‴ … \u202eRTL \ud7ff\ue000\ufffd\U0010ffff",
    "▁ ▁▁ a.",
]
PIECES = [
    "polyp",
    "Mucosa",
    "  ",
    "▁",
    "\u2581\u2581",
    "x" * 300,
    "....",
    "!!!!!!!",
    "ha" * 90,
    "pneumonoultramicroscopic",
]


def strings(count: int, seed: int = 0) -> list[str]:
    """Prompts in the wild: words, scripts, combining sequences, emoji, control characters, spaces, very long words.

    None of them holds a special token: there sentencepiece and the tokenizer rightly differ.
    """
    draw = random.Random(seed)
    texts = ["", " ", "\n\t", "\x01", "▁", " ▁ ", *PROMPTS, "word " * 500, "é" * 400, "0" * 1000, "\x00" * 3]
    while len(texts) < count:
        parts = []
        for _ in range(draw.randint(1, 8)):
            kind = draw.randrange(10)
            if kind < len(ALPHABETS):
                parts.append("".join(draw.choices(ALPHABETS[kind], k=draw.randint(1, 12))))
            elif kind == 6:
                parts.append(draw.choice(PIECES))
            elif kind == 7:  # one sign many times: there are many ways to cut it that are equally probable
                parts.append(draw.choice(".!-=_ax0A*~ ") * draw.randint(2, 60))
            elif kind == 8:
                parts.append(" ".join(draw.choices(" ".join(PROMPTS).split(), k=draw.randint(1, 6))))
            else:
                points = (draw.randrange(0x11000) for _ in range(4))
                parts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
        texts.append(draw.choice(["", " "]).join(parts))
    return [text for text in texts if not any(special in text for special in ("</s>", "<pad>", "<unk>", "<extra_id_"))]


def trained(**settings) -> bytes:
    """A small T5-like spiece.model: 0 pads, 1 ends, 2 is unknown."""
    out = io.BytesIO()
    ours = dict(vocab_size=200, normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    corpus = [text for text in strings(200, seed=7) if "\0" not in text] + PROMPTS * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=out, hard_vocab_limit=False, minloglevel=2, num_threads=1,
        character_coverage=0.98, **ours | settings,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return trained()


@pytest.fixture(scope="module")
def folder(spiece, tmp_path_factory):
    """As PixArt's `tokenizer/`: a spiece.model alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "spiece.model").write_bytes(spiece)
    return folder


def clustered(text: str) -> bool:
    """Characters that join into one with a neighbour: marks, joiners, jamo, flags, tones of skin, CR LF. There Rust's
    normaliser takes the whole cluster where sentencepiece takes the longest entry of the model's table."""
    joining = re.compile("[\u1100-\u11ff\u0e33\uff9e\uff9f\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff]|\r\n")
    return any(unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") for c in text) or bool(joining.search(text))


def tied(text: str) -> bool:
    """One sign, or two in turn, at least three times: there are many ways to cut it that are equally probable, and
    the rounding of their sums decides, which is float64 in Rust and float32 in sentencepiece. So with two accents
    that the model spells as a space and a sign each."""
    return bool(re.search(r"(.)\1{2,}|(..)\2{2,}|(\w+ )\3{2,}|\xa8|\xb4|\u2034", text, re.DOTALL))


def assert_as_sentencepiece(model: bytes, texts: list[str]) -> None:
    """The same normalised text and the same ids, of every text but clusters and ties."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = T5Tokenizer(model)
    for text, ids in zip(texts, reference.encode(texts)):
        if not clustered(text):
            assert ours.normalize(text) == reference.normalize(text), repr(text)
        if not clustered(text) and not tied(text):
            assert ours.encode(text) == ids, repr(text)


# ------------------------------------------------------------------------------- the algorithm, as sentencepiece has it


def test_thousands_of_strings_on_a_model_trained_here(spiece):
    texts = strings(5000)
    assert_as_sentencepiece(spiece, texts)


@pytest.mark.parametrize(
    "settings",
    [
        dict(normalization_rule_name="identity"),
        dict(normalization_rule_name="nfkc_cf"),
        dict(remove_extra_whitespaces=False),
        dict(add_dummy_prefix=False),
        dict(byte_fallback=True, vocab_size=460),
        dict(user_defined_symbols=["polyp", "▁image", "é", "½", "<x y>"], control_symbols=["<c>"]),
        dict(split_by_whitespace=False),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_setting_of_a_model_is_followed(settings):
    texts = strings(2000, seed=1)
    assert_as_sentencepiece(trained(**settings), texts + ["a<c>b", "a<x y>b", "imageimage polyps", "<0x41> é"] * 2)


def test_ties_are_broken_by_rounding_and_cost_nothing():
    """Equally probable ways to cut a text: another one than sentencepiece's may be taken, of the same pieces' scores."""  # noqa: E501
    scored = [("▁", -2.07), ("x", -7.31), ("xx", -9.03), ("xxx", -10.69), ("xxxx", -12.17)]
    pieces = [("<unk>", 0.0, UNKNOWN), (END, 0.0, CONTROL), *((text, score, NORMAL) for text, score in scored)]
    message = spieces.write(pieces)
    reference, ours = sentencepiece.SentencePieceProcessor(model_proto=message), T5Tokenizer(message)
    for n in range(1, 400):
        assert sorted(ours.encode("x" * n)) == sorted(reference.encode("x" * n))


def test_far_children_in_the_trie_of_a_normalisation():
    """Distances above 2^21 units are stored in steps of 256, marked by bit 9: here "A" becomes "b"."""
    units = [0] * 1024
    units[0] = 1 << 10 | 0x200  # the root's children are 256 away
    units[256 ^ ord("A")] = 2 << 10 | 0x300 | ord("A")  # a value stands here; children 512 further
    units[256 ^ ord("A") ^ 512] = 1 << 31 | 2  # the value: string number 2 in bytes
    charsmap = struct.pack("<I1024I", 4096, *units) + b"z\0b\0"
    pieces = [("<unk>", 0.0, UNKNOWN), (END, 0.0, CONTROL), ("▁", -2.0, NORMAL), ("b", -3.0, NORMAL)]
    message = spieces.write([*pieces, ("A", -1.0, NORMAL)], charsmap)
    assert_as_sentencepiece(message, ["A", "xA A", "é A", "AA"])
    reference = sentencepiece.SentencePieceProcessor(model_proto=message)
    assert reference.normalize("\0A") == "▁b" and T5Tokenizer(message).normalize("\0A") == "▁\0b"  # NUL stays in Rust
    assert T5Tokenizer(message).normalize("xAA") == "▁xbb"


def test_a_message_survives_being_written_and_read(spiece):
    pieces, _, normal = spieces.parse(spiece)
    again = spieces.write(pieces, normal[2])
    assert spieces.parse(again)[0] == pieces and spieces.parse(again)[2] == {2: normal[2]}
    reference, ours = (sentencepiece.SentencePieceProcessor(model_proto=message) for message in (spiece, again))
    texts = strings(300, seed=3)
    assert ours.encode(texts) == reference.encode(texts)
    assert (ours.pad_id(), ours.eos_id(), ours.unk_id(), ours.bos_id()) == (0, 1, 2, -1)


# ------------------------------------------------------------------------------------------------------ the published


@pytest.mark.parametrize("name", ["t5/spiece.model", "sentencepiece/test_model.model",
                                  "sentencepiece/seqio_test_sentencepiece.model"])  # fmt: skip
def test_published_models_equal_sentencepiece_on_5000_strings(real_data, name):
    texts = strings(5020, seed=2)
    assert_as_sentencepiece((real_data / name).read_bytes(), texts)


def test_every_string_is_as_transformers_has_it(real_data):
    """Combining characters and ties included: the same normaliser and search. Only U+0085, which T5's table leaves
    as it is, is a space there and a character here, as in sentencepiece."""
    reference = transformers.T5Tokenizer.from_pretrained(real_data / "t5")
    tokenizer = T5Tokenizer.from_folder(real_data / "t5")
    texts = [text.replace("\x85", "") for text in strings(5020, seed=2)]
    assert [[*tokenizer.encode(text), 1] for text in texts] == reference(texts).input_ids
    assert [*tokenizer.encode("a\x85b"), 1] != reference("a\x85b").input_ids
    assert_as_sentencepiece((real_data / "t5/spiece.model").read_bytes(), ["a\x85b"])


def test_runs_of_one_sign_that_come_out_otherwise_than_in_sentencepiece(real_data):
    """The shortest of each on T5's pieces; eleven signs up to 399 times. The other three never differ."""
    tokenizer = T5Tokenizer.from_folder(real_data / "t5")
    reference = sentencepiece.SentencePieceProcessor(str(real_data / "t5/spiece.model"))
    shortest = {}
    for sign in ".!-=_ax0A*~":
        differ = (n for n in range(1, 400) if tokenizer.encode(sign * n) != reference.encode(sign * n))
        shortest[sign] = next(differ, None)
    some = {".": 26, "!": 206, "-": 130, "_": 16, "x": 43, "0": 170, "A": 12, "*": 13}
    assert shortest == some | {"=": None, "a": None, "~": None}


def test_every_character_on_the_published_model(real_data):
    """All 1,112,064 code points, in steps that take seconds, each between two letters that it may combine with."""
    points = [p for p in [*range(0x3100), *range(0x3100, 0x110000, 37)] if not 0xD800 <= p < 0xE000]
    assert_as_sentencepiece((real_data / "t5/spiece.model").read_bytes(), [f"a{chr(p)}a" for p in points])


def test_recorded_ids_of_the_published_model(real_data, golden):
    """transformers' ids (with </s>), sentencepiece's ids and normalised texts, and two sentencepiece test models. The
    two texts with special tokens are the only ones that come out otherwise than in sentencepiece alone."""
    tokenizer = T5Tokenizer.from_folder(real_data / "t5")
    cases = json.loads((golden / "t5_hf.json").read_text())["cases"]
    assert len(cases) == 45
    for case in cases:
        ids, mask = tokenizer([case["text"]], length=200)
        assert ids[mask].tolist() == case["ids"], repr(case["text"])
    recorded = json.loads((golden / "t5_sentencepiece.json").read_text())
    assert hashlib.sha256((real_data / "t5/spiece.model").read_bytes()).hexdigest() == recorded["sha256"]
    exceptions = ["<extra_id_0> test", "</s> inside"]
    assert [case["text"] for case in recorded["cases"] if tokenizer.encode(case["text"]) != case["ids"]] == exceptions
    assert all(tokenizer.normalize(case["text"]) == case["normalized"] for case in recorded["cases"])
    for name in ("test_model", "seqio_test_sentencepiece"):
        other = T5Tokenizer((real_data / "sentencepiece" / f"{name}.model").read_bytes())
        cases = json.loads((golden / f"{name}.json").read_text())["cases"]
        assert [case["text"] for case in cases if other.encode(case["text"]) != case["ids"]] == exceptions


def test_published_normalisation_is_not_nfkc(real_data, golden):
    """The code points where the model's own normalisation differs from Unicode's, as recorded from sentencepiece."""
    tokenizer = T5Tokenizer.from_folder(real_data / "t5")
    different = json.loads((golden / "t5_normalizer_vs_nfkc.json").read_text())["diff"]
    assert len(different) == 136
    for point, middle in different.items():
        normal = tokenizer.normalize(f"a{chr(int(point, 16))}a")
        assert normal.startswith("▁") and (middle is None or normal[2:-1] == middle), point


def test_a_vocabulary_of_mt5s_size_loads():
    """250,000 pieces, in the few seconds that reading them by hand takes."""
    pieces = [("<pad>", 0.0, CONTROL), (END, 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN), ("▁", -2.0, NORMAL)]
    tokenizer = T5Tokenizer(spieces.write([*pieces, *((f"▁{i}", -9.0, NORMAL) for i in range(249_996))]))
    assert len(tokenizer.pieces) == 250_000 and tokenizer.encode("249995 7") == [249_999, 11]


def test_the_published_folder_as_transformers_reads_it(real_data):
    """Ids, padding, truncation and special tokens; strings in which transformers' own normaliser is exact."""
    reference = transformers.T5Tokenizer.from_pretrained(real_data / "t5")
    tokenizer = T5Tokenizer.from_folder(real_data / "t5")
    texts = [
        *PROMPTS,
        "",
        "polyp " * 200,
        "a</s>b",
        "<pad><extra_id_0> x<extra_id_99>  y",
        "<unk>",
        "</s></s >",
        "< /s>",
    ]
    expected = reference(texts, padding="max_length", max_length=120, truncation=True, return_tensors="pt")
    ids, mask = tokenizer(texts, length=120)
    assert torch.equal(ids, expected.input_ids) and torch.equal(mask, expected.attention_mask.bool())
    assert len(tokenizer) == len(reference) == 32100 and tokenizer.cut == 1


# ------------------------------------------------------------------------------------------------------ the tokenizer


def test_the_end_is_kept_and_the_cut_is_counted(folder):
    tokenizer = T5Tokenizer.from_folder(folder)
    short, long = "a polyp", "polyp " * 50
    ids, mask = tokenizer([short, long, "", short], length=12)
    assert ids.shape == mask.shape == (4, 12) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    lengths = tokenizer.lengths([short, long, "", short])
    assert mask.sum(1).tolist() == [min(n, 12) for n in lengths] and lengths[2] == 1
    assert tokenizer.cut == 1 and ids[1, -1] == tokenizer.end_id == 1
    for row, real in zip(ids, mask):
        assert row[real][-1] == 1 and (row[~real] == 0).all() and real.int().diff().le(0).all()
    exact, _ = tokenizer([short], length=lengths[0])
    assert torch.equal(exact[0], ids[0][mask[0]]) and tokenizer.cut == 0
    assert tokenizer([], length=4)[0].shape == (0, 4)
    with pytest.raises(ValueError, match="length 0"):
        tokenizer([short], length=0)


@pytest.mark.parametrize("prompt", ["\ud800", None, 3])
def test_what_is_not_text_is_refused(folder, prompt):
    with pytest.raises(ValueError, match="not text"):
        T5Tokenizer.from_folder(folder)(["a polyp", prompt])


def test_special_tokens_in_a_prompt_are_tokens_and_cut_it_in_two(folder):
    tokenizer = T5Tokenizer.from_folder(folder)
    size = len(tokenizer.pieces)
    ids = {"</s>": 1, "<pad>": 0, "<unk>": 2, "<extra_id_0>": size + 99, "<extra_id_99>": size}
    for special, index in ids.items():
        row, mask = tokenizer([f"  a polyp {special}polyps"], length=80)
        assert row[mask].tolist() == [*tokenizer.encode("a polyp"), index, *tokenizer.encode("polyps"), 1]
    plain = ["<extra_id_100>", "</S>", "<s>", "< pad >"]
    rows, mask = tokenizer(plain, length=80)
    reference = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    assert [r[m].tolist()[:-1] for r, m in zip(rows, mask)] == reference.encode(plain)


@pytest.mark.parametrize(
    "name, content, first",
    [
        ("tokenizer_config.json", {"extra_ids": 7}, {"<extra_id_0>": 6, "<extra_id_6>": 0}),
        ("tokenizer_config.json", {"extra_ids": 0}, {}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": {"content": "<mark>"}}}, {"<mark>": 900}),
        ("added_tokens.json", {"<extra_id_1>": 500}, {"<extra_id_1>": 500}),
        ("tokenizer_config.json", {"model_max_length": 120}, {"<extra_id_0>": 99}),
    ],
)
def test_special_tokens_are_those_of_the_folder(folder, spiece, tmp_path, name, content, first):
    (tmp_path / "spiece.model").write_bytes(spiece)
    (tmp_path / name).write_text(json.dumps(content))
    tokenizer = T5Tokenizer.from_folder(tmp_path)
    size = len(tokenizer.pieces)
    for text, index in first.items():
        index = index if index >= 500 else size + index
        assert tokenizer([text], length=2)[0].tolist() == [[index, 1]]
    expected = content.get("extra_ids", 100 if "model_max_length" in content else 1)
    assert len(tokenizer.extra) == expected


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED])
def test_a_vocabulary_with_its_own_sentinels_gets_no_more(kind):
    """mT5's pieces include `▁<extra_id_0>` and the bytes."""
    pieces = [("<pad>", 0.0, CONTROL), (END, 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [("▁", -2.0, NORMAL), ("a", -3.0, NORMAL), ("▁<extra_id_0>", -0.5, kind)]
    tokenizer = T5Tokenizer(spieces.write(pieces) + field(2, b"\x98\x02\x01"))
    assert tokenizer.extra == {} and len(tokenizer) == 262
    ids, mask = tokenizer(["aé <extra_id_0>"], length=10)
    assert ids[mask].tolist() == [259, 260, 3 + 0xC3, 3 + 0xA9, 261, 1]


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(folder, tmp_path):
    tokenizer = T5Tokenizer.from_folder(folder)
    tokenizer.save(tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == (folder / "spiece.model").read_bytes()
    again = T5Tokenizer.from_folder(tmp_path)
    texts = strings(200, seed=4) + ["x <extra_id_3> y"]
    for ours, saved in zip(tokenizer(texts, 40), again(texts, 40)):
        assert torch.equal(ours, saved)
    reference = transformers.T5Tokenizer.from_pretrained(tmp_path)
    expected = reference([*PROMPTS, texts[-1]], padding="max_length", max_length=60, return_tensors="pt")
    ids, mask = again([*PROMPTS, texts[-1]], length=60)
    assert torch.equal(ids, expected.input_ids) and torch.equal(mask, expected.attention_mask.bool())


def test_reads_a_tokenizer_json_alone(folder, spiece, tmp_path):
    """As transformers writes it; not consulted where there is a spiece.model."""
    transformers.T5Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "fast")
    assert not (tmp_path / "fast" / "spiece.model").exists()
    first, second = T5Tokenizer.from_folder(folder), T5Tokenizer.from_folder(tmp_path / "fast")
    texts = strings(500, seed=5) + ["x <extra_id_3> y</s>"]
    assert torch.equal(first(texts, 50)[0], second(texts, 50)[0]) and len(first) == len(second)
    (tmp_path / "fast" / "spiece.model").write_bytes(spiece)
    (tmp_path / "fast" / "tokenizer.json").write_text("not JSON")
    assert torch.equal(T5Tokenizer.from_folder(tmp_path / "fast")(texts, 50)[0], first(texts, 50)[0])


def test_a_trained_vocabulary_spells_every_text_it_saw(tmp_path):
    tokenizer = train_unigram(PROMPTS, pieces=70)
    assert len(tokenizer.pieces) == 70 and len(tokenizer) == 170
    ids, mask = tokenizer(PROMPTS, length=200)
    pieces = [text for text, _, _ in tokenizer.pieces]
    for row, real, text in zip(ids, mask, PROMPTS):
        assert "".join(pieces[i] for i in row[real][:-1]).replace("▁", " ").strip() == text
    assert mask.sum(1).max() < 120 and torch.equal(train_unigram(PROMPTS, pieces=70)(PROMPTS, 200)[0], ids)
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
    assert reference.encode(PROMPTS) == [tokenizer.encode(text) for text in PROMPTS]


# ------------------------------------------------------------------------------------------------ hostile and damaged


def test_missing_files_are_named(tmp_path):
    with pytest.raises(weights.WeightsNotFound, match="spiece.model"):
        T5Tokenizer.from_folder(tmp_path)


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128, *varint(value >> 7)]) if value > 127 else bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text: bytes, score: float = -1.0, kind: int = NORMAL) -> bytes:
    return field(1, field(1, text) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))


SOUND = piece(b"<pad>", 0, CONTROL) + piece(b"</s>", 0, CONTROL) + piece(b"<unk>", 0, UNKNOWN) + piece(b"a")


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "0 pieces"),
        (b"version https://git-lfs.github.com/spec/v1\n", "spiece.model"),
        (b"<!DOCTYPE html><html>", "spiece.model"),
        (SOUND[:-1], "ends inside field 1"),
        (SOUND + b"\x80" * 11, "more than 64 bits"),
        (SOUND + b"\x80", "ends inside a number"),
        (SOUND + b"\x0b", "wire type 3"),
        (SOUND + b"\x0a" + varint(1 << 62), "ends inside field 1"),
        (SOUND + b"\x08\x01", "TypeError"),
        (SOUND + piece(b"\xff\xfe"), "UnicodeDecodeError"),
        (SOUND + piece(b"a"), "2 times"),
        (SOUND + piece(b""), "piece 4 is ''"),
        (SOUND + piece(b"b", float("nan")), "score nan"),
        (SOUND + piece(b"b", kind=9), "kind 9"),
        (SOUND + piece(b"<unk2>", 0, UNKNOWN), "for what is unknown"),
        (piece(b"<unk>", 0, UNKNOWN) + piece(b"a"), "no </s>"),
        (SOUND + field(2, b"\x18\x02"), "of type 2"),
        (SOUND + field(2, b"\xc0\x01\x01"), "ends of words"),
        (SOUND + field(2, b"\x98\x02\x01"), "KeyError"),  # byte fallback without bytes
        (SOUND + field(3, field(2, b"\x10")), "normalisation of 1 bytes"),
        (SOUND + field(3, field(2, struct.pack("<I", 400) + bytes(40))), "with a trie of 400"),
    ],
)
def test_a_damaged_model_is_one_error_that_names_the_file(tmp_path, content, says):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(weights.WeightsError, match="spiece.model") as caught:
        T5Tokenizer.from_folder(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_sound_model_of_these_tests_is_read(tmp_path):
    (tmp_path / "spiece.model").write_bytes(SOUND)
    assert T5Tokenizer.from_folder(tmp_path)(["aba"], length=8)[0].tolist() == [[2, 3, 2, 3, 1, 0, 0, 0]]


def test_truncated_and_altered_models_never_do_worse_than_an_error(spiece, tmp_path):
    """Every outcome is a tokenizer that gives ids, or WeightsError; nothing hangs, nothing else is raised."""
    draw = random.Random(0)
    outcomes = []
    texts = ["a polyp é ① \u1e9b\u0323", "x" * 50]
    for attempt in range(150):
        content = bytearray(spiece[: draw.randrange(len(spiece))] if attempt % 3 == 0 else spiece)
        for _ in range(draw.choice([0, 1, 20, 2000]) if attempt % 3 else 0):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "spiece.model").write_bytes(content)
        try:
            tokenizer = T5Tokenizer.from_folder(tmp_path)
            ids, _ = tokenizer(texts, length=20)
            outcomes.append(0 <= ids.min() and ids.max() < len(tokenizer))
        except weights.WeightsError as error:
            assert "spiece.model" in str(error) and "\n" not in str(error)
            outcomes.append(False)
    assert True in outcomes and False in outcomes


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"extra_ids": -1}'),
        ("tokenizer_config.json", '{"extra_ids": "many"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("added_tokens.json", "3"),
        ("spiece.model", '{"<mark>": -1}'),
    ],
)
def test_damaged_companions_are_named(spiece, tmp_path, name, content):
    (tmp_path / "spiece.model").write_bytes(spiece)
    (tmp_path / (name if name != "spiece.model" else "added_tokens.json")).write_text(content)
    with pytest.raises(weights.WeightsError, match=name):
        T5Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"type": "BPE", "vocab": {}}}',
                                     '{"model": {"vocab": [["a", 0]], "unk_id": 5}}'])  # fmt: skip
def test_a_damaged_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(weights.WeightsError, match="tokenizer.json"):
        T5Tokenizer.from_folder(tmp_path)

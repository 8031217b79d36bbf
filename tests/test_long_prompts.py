"""Prompts that are longer than what is read of one: said with the row and the words that are cut, refused, or read in
pieces that transformers' encoder reads alike."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import close

import nanomed
from nanomed import drawing, systems
from nanomed.run.flags import UsageError
from nanomed.text.lengths import too_long

SHORT = "Generate an image with 2 polyps."
LONG = " ".join(["an image with a polyp located in the upper-left and lower-right"] * 5) + " and the end."


def draw(untrained: Path, out: Path, prompts: list[str], **settings) -> dict[str, bytes]:
    drawing.draw(nanomed.load(untrained), prompts, drawing.Drawing(str(out), **({"steps": 2, "batch": 2} | settings)))
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def test_what_is_cut_is_said_once_with_row_words_and_count(untrained, tmp_path, capsys):
    system = nanomed.load(untrained)
    draw(untrained, tmp_path / "a", [SHORT, LONG, LONG, SHORT])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0] == ("prompts: 1 of 3 distinct prompts have more than the 32 tokens that are read: the rest is cut "
                       "(--long_prompts refuse, chunk)")  # fmt: skip
    (length,), (tokens, rest) = system.lengths([LONG]), too_long([LONG], 32, system.lengths)[LONG]
    assert tokens == length and LONG.endswith(f" {rest}")
    assert said[1].startswith(f"  row 1: {length} tokens, {len(rest.split())} words cut: {rest[:80]!r}")
    # the words that are said to be read are read whole, and the next one is not
    read, ids = LONG.removesuffix(rest).strip(), system.tokenizer([LONG], length=32)[0][0]
    assert torch.equal(system.tokenizer([read], length=32)[0][0][: system.lengths([read])[0] - 1],
                       ids[: system.lengths([read])[0] - 1])  # fmt: skip
    assert system.lengths([read])[0] <= 32 < system.lengths([f"{read} {rest.split()[0]}"])[0]
    assert draw(untrained, tmp_path / "b", [SHORT]) and not capsys.readouterr().out


def test_refuse_writes_nothing(untrained, tmp_path):
    with pytest.raises(UsageError, match=r"--long_prompts refuse.*row 1: \d+ tokens, \d+ words cut"):
        draw(untrained, tmp_path / "a", [SHORT, LONG], long_prompts="refuse")
    assert not (tmp_path / "a").exists()
    assert draw(untrained, tmp_path / "a", [SHORT], long_prompts="refuse")


def test_pieces_are_what_transformers_reads_piece_by_piece(untrained):
    """Each piece is a text of its own, positions and all; what stands behind a prompt's end is not read."""
    system = nanomed.load(untrained)
    c = system.text_encoder.config
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        max_position_embeddings=c.max_position_embeddings, hidden_act=c.hidden_act,
        bos_token_id=system.tokenizer.start_id, eos_token_id=system.tokenizer.end_id,
    )).eval()  # fmt: skip
    own = system.text_encoder.state_dict()
    names = theirs.state_dict().keys()
    theirs.load_state_dict({name: own[name if name in own else f"text_model.{name}"] for name in names
                            if "position_ids" not in name}, strict=False)  # fmt: skip
    system.pieces = 3
    with torch.no_grad():
        cond = system.encode_text([LONG, SHORT])
        tokens = system.tokenizer._encode([LONG])[LONG]
        for j in range(3):
            inner = tokens[30 * j : 30 * (j + 1)]
            ids = torch.tensor([[system.tokenizer.start_id, *inner, system.tokenizer.end_id]])
            part = cond["prompt_embeds"][0, 32 * j : 32 * j + ids.shape[1]]
            close(part, theirs(ids).last_hidden_state[0], 1e-5)
            assert cond["attention_mask"][0, 32 * j : 32 * (j + 1)].tolist() == [True] * ids.shape[1] + [False] * (
                32 - ids.shape[1]
            )
        system.pieces = 1
        alone = system.encode_text([SHORT])
    assert not cond["attention_mask"][1, 32:].any() and cond["prompt_embeds"].isfinite().all()
    close(cond["prompt_embeds"][1, :32], alone["prompt_embeds"][0], 1e-5)


def test_chunk_changes_long_rows_alone_and_is_part_of_what_decides(untrained, tmp_path, capsys):
    prompts = [SHORT, LONG, SHORT]
    cut = draw(untrained, tmp_path / "a", prompts)
    chunk = draw(untrained, tmp_path / "b", prompts, long_prompts="chunk")
    assert "read in up to 3 pieces of 30" in capsys.readouterr().out
    assert [cut[name] == chunk[name] for name in sorted(cut)] == [True, False, True]
    settings = json.loads((tmp_path / "b" / "settings.json").read_text())
    assert settings["drawing"]["long_prompts"] == "chunk"
    with pytest.raises(UsageError, match="other settings"):
        draw(untrained, tmp_path / "b", prompts)
    end = LONG.removesuffix("the end.") + "an instrument."  # a word behind the limit matters now, and did not
    assert draw(untrained, tmp_path / "c", [SHORT, end, SHORT]) == cut
    assert draw(untrained, tmp_path / "d", [SHORT, end, SHORT], long_prompts="chunk") != chunk
    assert draw(untrained, tmp_path / "e", [SHORT], negative=LONG, long_prompts="chunk") != draw(
        untrained, tmp_path / "f", [SHORT], negative=LONG
    )


def test_systems_that_read_one_piece_say_so(tmp_path):
    system = systems.build("medart-tiny")
    prompt = "an endoscopic image " * 60
    with pytest.raises(UsageError, match="--long_prompts chunk: medart-tiny reads one piece"):
        drawing.draw(system, [prompt], drawing.Drawing(str(tmp_path / "a"), long_prompts="chunk"))
    assert not (tmp_path / "a").exists()


def test_training_says_it_refuses_and_reads_pieces(tmp_path, monkeypatch, capsys):
    import numpy as np
    from PIL import Image

    import train

    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(LONG if i == 3 else SHORT)

    def go(*more: str) -> str:
        words = ["train.py", "--model", "msdm-tiny", "--data", f"folder:{data}", "--steps", "1", "--batch", "2",
                 "--score_images", "0", "--test_prompts", "", "--views", "0", "--cache", str(tmp_path / "cache"),
                 "--out", str(tmp_path / "runs"), *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr("time.strftime", lambda *_: f"run-{len(list((tmp_path / 'runs').glob('*')))}")
        assert train.main() == 0
        return capsys.readouterr().out

    with pytest.raises(UsageError, match=r"3\.png: \d+ tokens"):
        go("--long_prompts", "refuse")
    assert not (tmp_path / "runs").exists()
    assert "1 of 2 distinct prompts have more than the 32 tokens" in go()
    said = go("--long_prompts", "chunk")
    assert "3.png" in said and "read in up to 3 pieces of 30" in said

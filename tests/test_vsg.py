"""The Visual Symptom Generator: the paper's rules, a journal that survives any kill, and what marks a caption."""

import csv
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanomed import data
from nanomed.captions import review, vsg
from nanomed.captions.vsg import Journal, Picture, Result, Rules
from nanomed.data.table import DataError
from nanomed.run.flags import UsageError
from nanomed.run.ranks import Ranks

START = "An endoscopic image of dyed lifted polyps"
FEATURES = "specific color, shape, surrounding mucosa, surface texture, bleeding condition"


class Canned:
    """A captioner that says what it was told to, by file name and attempt; no answer is the last one for ever."""

    def __init__(self, answers: dict[str, list[str]], slow: float = 0.0):
        self.answers, self.slow, self.asked = answers, slow, []

    def ask(self, question):
        return f"USER {question}"

    def count(self, text):
        return len(text.split())

    def generate(self, images, texts, keys, **how):
        time.sleep(self.slow)
        self.asked += [(name, attempt, text) for (name, attempt), text in zip(keys, texts)]
        return [self.answers.get(name, [f"{START}."])[:attempt][-1] for name, attempt in keys]


def folder(tmp_path, count=6):
    for i in range(count):
        path = tmp_path / "data" / ("dyed-lifted-polyps" if i % 2 else "normal_z-line") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    return f"folder:{tmp_path / 'data'}"


def rules(shorten=None, limit=12):
    return Rules("An endoscopic image", FEATURES, lambda text: len(text.split()), limit, shorten)


# ---------------------------------------------------------------------------------------------------------- the rules


def test_the_question_is_the_papers_word_for_word():
    asked, opening, features = vsg.question("endoscopy", "dyed lifted polyps")
    assert asked == (
        "An endoscopic image of dyed lifted polyps. Please describe the endoscopic image of dyed lifted polyps using "
        "the following visual features: specific color, shape, surrounding mucosa, surface texture, bleeding "
        "condition, and other relevant details. Start with 'An endoscopic image of dyed lifted polyps' and ensure the "
        "description does not exceed 100 words."
    )
    assert (opening, features) == ("An endoscopic image", FEATURES)
    with pytest.raises(UsageError, match="choose endoscopy, skin"):
        vsg.question("ct", "liver")


@pytest.mark.parametrize("answer, why", [
    (f"\n{START}, red.", ""),
    (" \n ", "empty"),
    (f"{START} with {FEATURES}.", "echo"),
    ("The image shows a polyp.", "opening"),
    (f"{START} " + "and so on " * 9, "long"),
])  # fmt: skip
def test_an_answer_is_refused_for_the_papers_reasons(answer, why):
    assert rules().judge(answer)[1:] == (why, False)


def test_what_is_too_long_is_shortened_and_judged_again():
    long = f"{START} " + "and so on " * 9
    assert rules(lambda text: f"{START}\n red.").judge(long) == (f"{START} red.", "", True)
    assert rules(lambda text: "and so on").judge(long) == ("and so on", "opening", True)
    assert rules(lambda text: text).judge(long)[1:] == ("long", True)
    assert rules(lambda text: 1 / 0).judge(f"{START}.")[1:] == ("", False)  # what is short enough is not touched


def test_refused_answers_are_drawn_again_with_the_others_left_alone(tmp_path):
    pictures = vsg.pictures(folder(tmp_path, 3))
    names = [picture.name for picture in pictures]
    model = Canned({names[0]: ["no", "neither", f"{START} red."], names[1]: ["no"] * 9})
    results = list(vsg.caption(model, pictures, "endoscopy", lambda *said: rules(), 4, 0))
    assert [(r.attempts, bool(r.text)) for r in results] == [(3, True), (4, False), (1, True)]
    assert [x["why"] for x in results[0].refused] == ["opening"] * 2 and len(results[1].refused) == 4
    tries = Counter(name for name, _, _ in model.asked)
    assert [tries[name] for name in names] == [3, 4, 1]
    said = vsg.statistics(results)
    assert "2 of 3 pictures have a caption" in said and "1: 1, 3: 1" in said and "opening: 6" in said
    assert f"{names[1]} (opening 4x)" in said


@pytest.mark.parametrize("text, category, expected", [
    ("An endoscopic image of polyps with a smooth, pink surface.", "polyps", []),
    ("An endoscopic image taken at Oslo University Hospital.", "polyps", ["hospital"]),
    ("An endoscopic image from 12/03/2015.", "polyps", ["date"]),
    ("An endoscopic image; the patient's name is hidden. The label reads: '4411'.", "polyps",
     ["person", "burnt-in text"]),
    ("An endoscopic image of Mr. Smith.", "polyps", ["person"]),
    ("An endoscopic image without any visible polyps.", "polyps", ["contradicts the category"]),
    ("An endoscopic image of normal z-line with an ulcer.", "normal z-line", ["contradicts the category"]),
    ("A dermoscopic image of melanoma, which seems benign.", "melanoma", ["contradicts the category"]),
    ("A dermoscopic image of a benign lesion.", "benign keratosis", []),
    ("An endoscopic image of patient Olsen, a polyp of 0.5-1.0 cm.", "polyps", ["person"]),
    ("An endoscopic image of 3rd of March, from ST OLAVS HOSPITAL.", "polyps", ["date", "hospital"]),
    ("An endoscopic image. May 4 marks, 12 Oct. too.", "polyps", ["date"]),
    ("An endoscopic image with a watermark.", "polyps", ["burnt-in text"]),
    ("An endoscopic image with white text in the upper left corner.", "polyps", ["burnt-in text"]),
    ("An endoscopic image with the label \u201cOlympus\u201d at 14:32.", "polyps", ["burnt-in text"]),
    ("An endoscopic image with texture, large numbers of folds at the top, and a ratio of 3 to 1.", "polyps", []),
    ("An endoscopic image with no evidence of polyps.", "polyps", ["contradicts the category"]),
    ("An endoscopic image of polyps, without bleeding.", "polyps", []),
    ("An endoscopic image of normal cecum with no polyps, ulcers or lesions.", "normal cecum", []),
    ("An endoscopic image of normal cecum, no ulcers but a small polyp.", "normal cecum", ["contradicts the category"]),
    ("An endoscopic image of normal cecum. It is free of inflammation. A lesion is seen.", "normal cecum",
     ["contradicts the category"]),
    ("A dermoscopic image of nevus, not malignant.", "nevus", []),
    ("An endoscopic image of ulcerative colitis without any signs of inflammation.", "ulcerative colitis",
     ["contradicts the category"]),
])  # fmt: skip
def test_captions_that_give_away_or_contradict_are_marked(text, category, expected):
    assert vsg.flags(text, category) == expected


def test_pictures_are_found_in_any_layout(tmp_path):
    spec = folder(tmp_path)
    first = vsg.pictures(spec)[0]
    assert (first.name, first.category) == ("dyed-lifted-polyps/1.png", "dyed lifted polyps")
    assert {p.category for p in vsg.pictures(spec)} == {"dyed lifted polyps", "normal z line"}
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text,category\ndyed-lifted-polyps/1.png,x,lumps\n")
    assert [p.category for p in vsg.pictures(spec)] == ["lumps"]
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text,category\nnormal_z-line/0.png,x,<image> a <5mm_p\n")
    assert [p.category for p in vsg.pictures(spec)] == ["a <5mm p"]  # a mark would be a second image in the prompt
    for wrong in ("folder:/nowhere", f"folder:{tmp_path / 'empty'}"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="no such folder|no images"):
            vsg.pictures(wrong)


# --------------------------------------------------------------------------------------------------------- the journal


def work(out: Path, spec: str, rank: int = 0, world: int = 1, slow: float = 0.0) -> None:
    """What the command does, with a canned captioner."""
    journal, pictures = Journal(out, {"seed": 0}), vsg.pictures(spec)
    done, model = journal.results(), Canned({}, slow)
    todo = [picture for picture in pictures[rank::world] if picture.name not in done]
    for start in range(0, len(todo), 2):
        for result in vsg.caption(model, todo[start : start + 2], "endoscopy", lambda *said: rules(), 3, 0):
            journal.append(result)
    journal.write_csv()


def rows_of(out: Path) -> list[str]:
    with open(out, newline="") as file:
        return [row["file_name"] for row in csv.DictReader(file)]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_at_random_moments_no_row_is_lost_or_doubled(tmp_path):
    """Two processes at a time, killed with SIGKILL after a few milliseconds, again and again; then one to the end."""
    spec, out = folder(tmp_path, 24), tmp_path / "captions.csv"
    context, draw, killed = multiprocessing.get_context("fork"), random.Random(0), 0
    for _ in range(8):
        running = [context.Process(target=work, args=(out, spec, rank, 2, 0.02)) for rank in range(2)]
        for process in running:
            process.start()
        time.sleep(draw.uniform(0.0, 0.06))
        for process in running:
            killed += process.is_alive()
            os.kill(process.pid, signal.SIGKILL) if process.is_alive() else None
            process.join()
    assert killed >= 4
    work(out, spec)
    names = rows_of(out)
    assert len(names) == len(set(names)) == 24
    table = data.with_captions(data.load(_classes(spec)), str(out))  # what --captions reads
    assert all(row.prompts[0].startswith(START) for row in table.rows)


def _classes(spec: str) -> str:
    return spec.replace("folder:", "kvasir:")


def crowd(out: Path, barrier) -> None:
    journal = Journal(out, {})
    barrier.wait()
    for i in range(60):
        journal.append(Result(f"{i}.png", "polyp", f"{START}.", 1, 7))


def test_processes_that_do_the_same_write_each_picture_once(tmp_path):
    """Four at the same moment: the lock decides, line by line."""
    context, out = multiprocessing.get_context("fork"), tmp_path / "captions.csv"
    barrier = context.Barrier(4)
    running = [context.Process(target=crowd, args=(out, barrier)) for _ in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    lines = out.with_name("captions.csv.jsonl").read_text().splitlines()
    assert [process.exitcode for process in running] == [0] * 4
    assert sorted(json.loads(line)["file_name"] for line in lines[1:]) == sorted(f"{i}.png" for i in range(60))


def test_a_process_that_is_done_helps_the_others(tmp_path):
    """Of two, one never starts: the other does its own share first and then all of its, one batch after another."""
    names, journal = [f"{i}.png" for i in range(7)], Journal(tmp_path / "c.csv", {})
    journal.append(Result("2.png", "polyp"))
    order = []
    for batch in journal.open(names, Ranks(0, 2), 2):
        order += batch
        for name in batch:
            journal.append(Result(name, "polyp"))
    assert order[:3] == ["0.png", "4.png", "6.png"] and sorted(order[3:]) == ["1.png", "3.png", "5.png"]
    assert list(Journal(tmp_path / "c.csv", {}).open(names, Ranks(1, 2), 2)) == []
    alone = Journal(tmp_path / "alone.csv", {})
    assert list(alone.open(names, Ranks(), 4)) == [names[:4], names[4:]]  # and what is not written is not asked again


def test_half_a_line_at_the_end_is_cut_off_and_its_picture_done_again(tmp_path):
    spec, out = folder(tmp_path), tmp_path / "captions.csv"
    work(out, spec)
    before = out.read_bytes()
    journal = out.with_name("captions.csv.jsonl")
    content = journal.read_bytes()
    for cut in (1, 20, len(content.splitlines()[-1])):
        journal.write_bytes(content[:-cut])
        out.unlink()
        work(out, spec)
        assert out.read_bytes() == before and journal.read_bytes() == content


def test_an_image_that_is_a_mere_line_is_named(tmp_path):
    """In the middle of a run, by its path and size, and what was done before stays."""
    import nanomed.captions
    from nanomed.captions import tiny

    tiny.save(tiny.build(), tmp_path / "tiny")
    Image.new("RGB", (900, 1)).save(tmp_path / "line.png")
    pictures = [Picture("line.png", tmp_path / "line.png", "")]
    with pytest.raises(DataError, match="line.png: an image of 900 x 1 pixels is too narrow"):
        list(vsg.caption(nanomed.captions.load(tmp_path / "tiny"), pictures, "endoscopy", lambda *a: rules(), 1, 0))


def test_other_settings_and_foreign_files_are_refused(tmp_path):
    spec, out = folder(tmp_path), tmp_path / "captions.csv"
    out.write_text("file_name,text\n")
    with pytest.raises(UsageError, match="was not written by this command"):
        Journal(out, {"seed": 0})
    out.unlink()
    work(out, spec)
    with pytest.raises(UsageError, match=r"made with other settings \(seed\)"):
        Journal(out, {"seed": 1})
    with open(out.with_name("captions.csv.jsonl"), "a") as file:
        file.write("nonsense\n")
    with pytest.raises(DataError, match="jsonl:8: damaged"):
        Journal(out, {"seed": 0}).results()


def test_a_picture_is_written_once_by_whomever(tmp_path):
    journal = Journal(tmp_path / "c.csv", {})
    for text in ("first", "second"):
        journal.append(Result("a.png", "polyp", text, 1, 3))
    assert journal.results()["a.png"].text == "first"
    journal.append(Result("b.png", "polyp"))  # without a caption: known, and not in the CSV
    journal.write_csv()
    assert rows_of(tmp_path / "c.csv") == ["a.png"] and len(journal.results()) == 2


def test_the_review_page_holds_every_caption_as_text(tmp_path):
    """Whatever a caption says, it is shown and never run."""
    results = [Result("a b/1.png", "polyp", 'An "endoscopic" image <script>alert(1)</script>.', 2, 7, ["date"])]
    results.append(Result("2.png", "polyp"))
    pictures = [Picture("a b/1.png", tmp_path / "data" / "a b" / "1.png", "polyp")]
    text = review.page(results, pictures, tmp_path / "captions.csv")
    assert 'src="data/a%20b/1.png"' in text and "&lt;script&gt;alert(1)" in text and "<script>alert" not in text
    assert text.count("<tr data-file") == 1 and 'class="flag">date' in text


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_end_to_end_with_an_untrained_miniature(tmp_path, monkeypatch, capsys):
    """Nothing that it says is a caption, so every picture is listed with its reasons; a second run does nothing."""
    from nanomed.captions import __main__ as command
    from nanomed.captions import tiny

    tiny.save(tiny.build(), tmp_path / "tiny")
    spec, out = folder(tmp_path, 3), tmp_path / "captions.csv"
    words = ["vsg", spec, "--out", str(out), "--model", str(tmp_path / "tiny"), "--attempts", "2", "--batch", "2",
             "--precision", "fp32", "--review"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["captions", *words])
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "0 of 3 pictures have a caption" in said and "no caption" in said
    lines = [json.loads(line) for line in out.with_name("captions.csv.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and [line["attempts"] for line in lines[1:]] == [2, 2, 2]
    assert command.main() == 0 and capsys.readouterr().out == said
    monkeypatch.setattr("sys.argv", ["captions", *words, "--seed", "1"])
    with pytest.raises(UsageError, match="other settings"):
        command.main()


def test_simplify_shortens_what_is_too_long_and_only_that(tmp_path, monkeypatch, capsys):
    import torch
    import transformers

    from nanomed.captions import __main__ as command
    from nanomed.text.unigram import train_unigram

    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                                   decoder_start_token_id=0)  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer = train_unigram(["a red polyp in the colon"], 50)
    tokenizer.save(tmp_path / "t5")
    long = "a red polyp " * 9
    (tmp_path / "c.csv").write_text(f'file_name,text,note\na.png,a red polyp,"x, y"\nb.png,{long},\n')
    argv = ["captions", "simplify", str(tmp_path / "c.csv"), "--model", str(tmp_path / "t5"), "--limit", "16"]
    monkeypatch.setattr("sys.argv", argv)
    assert command.main() == 0 and "1 of 2 captions shortened" in capsys.readouterr().out
    rows = list(csv.DictReader(open(tmp_path / "c.simplified.csv", newline="")))
    assert rows[0] == {"file_name": "a.png", "text": "a red polyp", "note": "x, y"}
    assert rows[1]["text"] != long and tokenizer.lengths([rows[1]["text"]])[0] <= 17


def test_the_captioner_sees_images_by_their_range(tmp_path):
    """12 bits in files of 16, in class folders and in a table: with --range auto white is white."""
    place = tmp_path / "data" / "polyps"
    place.mkdir(parents=True)
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(place / "a.png")
    seen = []

    class Looking(Canned):
        def generate(self, images, texts, keys, **how):
            seen.append([np.asarray(image).max() for image in images])
            return super().generate(images, texts, keys, **how)

    def ask(span):
        pictures = vsg.pictures(f"folder:{tmp_path / 'data'}", span=span)
        list(vsg.caption(Looking({}), pictures, "endoscopy", lambda *a: rules(), 1, 0))

    ask("")
    ask("auto")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\npolyps/a.png,x\n")
    ask("auto")
    assert seen == [[16], [255], [255]]

"""Tables and prompt files: every layout people have, and one clear line for everything that is wrong with them."""

import csv
import io
import random

import pytest
from PIL import Image

from nanomed import data
from nanomed.data import batches, images
from nanomed.data.prompts import read_prompts
from nanomed.data.table import DataError, Row, Table, read_csv, with_paraphrases


def picture(path, color=(200, 100, 80), size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


# -------------------------------------------------------------------------------------------------------- readers


def test_the_teams_own_csv_with_commas_quotes_paraphrases_and_bare_names(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    text = '\ufeffFilename,Prompt,Paraphrase\na,"pink, red","red, pink"\na,two,deux\n'
    (tmp_path / "train_captions.csv").write_text(text, encoding="utf-8")
    (row,) = data.load(f"clef:{tmp_path}").rows
    assert row.prompts == ("pink, red", "two") and row.paraphrases == ("red, pink", "deux")


@pytest.mark.parametrize("name, text", [
    ("metadata.csv", "file_name,text\na.png,one\na.png,two\n"),
    ("metadata.csv", "image;caption\na.png;one\na.png;two\n"),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "one"}\n{"file_name": "a.png", "text": "two"}\n'),
    ("a.txt", "one\ntwo\n"),
])  # fmt: skip
def test_image_folders(tmp_path, name, text):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    (row,) = data.load(f"folder:{tmp_path}").rows
    assert row.prompts == ("one", "two") and row.file == tmp_path / "a.png"


def test_class_folders_caption_themselves_and_split_by_class(tmp_path):
    for name in ("dyed-lifted-polyps", "normal-cecum"):
        for i in range(10):
            picture(tmp_path / name / f"{i}.jpg")
    table = data.load(f"kvasir:{tmp_path}")
    assert {row.prompts for row in table.rows} == {
        ("An endoscopic image of dyed lifted polyps",), ("An endoscopic image of normal cecum",)
    }  # fmt: skip
    train, valid = table.split(0.2, seed=1, by_label=True)
    assert sorted(row.label for row in valid.rows) == ["dyed-lifted-polyps"] * 2 + ["normal-cecum"] * 2
    assert len(train.rows) == 16
    assert data.load(f"skin:{tmp_path}").rows[0].prompts == ("A dermoscopic image of dyed lifted polyps",)


def test_ham10000(tmp_path):
    picture(tmp_path / "HAM10000_images_part_1" / "ISIC_1.jpg")
    text = "lesion_id,image_id,dx,dx_type,age,sex,localization\nL,ISIC_1,mel,histo,50.0,male,back\n"
    (tmp_path / "HAM10000_metadata.csv").write_text(text)
    (row,) = data.load(f"ham10000:{tmp_path}").rows
    assert row.prompts == ("A dermoscopic image of melanoma on the back, age 50, male",) and row.label == "mel"


def test_toy_goes_through_the_same_reader_and_is_written_once(tmp_path):
    first = data.load("toy:5", tmp_path, size=32)
    stamp = first.rows[0].file.stat().st_mtime_ns
    again = data.load("toy:5", tmp_path, size=32)
    assert first == again and again.rows[0].file.stat().st_mtime_ns == stamp and first.name == "clef"


@pytest.mark.parametrize("spec", ["toy:many", "clef", "nothing:here", "clef:"])
def test_unknown_data_sets_are_refused(spec, tmp_path):
    with pytest.raises(DataError, match="toy"):
        data.load(spec, tmp_path)


# ------------------------------------------------------------------------------------------------------ the table


def test_the_split_is_by_image_seeded_and_blind_to_the_order():
    from pathlib import Path

    rows = [Row(Path(f"{i}.jpg"), (f"p{i}",) * 3) for i in range(50)]
    train, valid = Table("t", tuple(rows)).split(0.2, seed=3)
    random.Random(0).shuffle(rows)
    again = Table("t", tuple(rows)).split(0.2, seed=3)
    assert {r.file for r in valid.rows} == {r.file for r in again[1].rows} and len(valid.rows) == 10
    assert not {r.file for r in train.rows} & {r.file for r in valid.rows}
    assert {r.file for r in valid.rows} != {r.file for r in Table("t", tuple(rows)).split(0.2, seed=4)[1].rows}


def test_the_papers_three_uses_of_paraphrases(tmp_path):
    from pathlib import Path

    table = Table("t", (Row(Path("a.jpg"), ("one", "two")),))
    path = tmp_path / "p.csv"
    path.write_text("Prompt,Paraphrase\none,eins\ntwo,zwei\n")
    assert with_paraphrases(table, path, "add").rows[0].prompts == ("one", "two", "eins", "zwei")
    for strategy in ("some", "all"):
        row = with_paraphrases(table, path, strategy).rows[0]
        assert row.prompts == ("one", "two") and row.paraphrases == ("eins", "zwei")
    path.write_text("Prompt,Paraphrase\none,eins\n")
    with pytest.raises(DataError, match="no paraphrase of 'two'"):
        with_paraphrases(table, path, "all")


# ------------------------------------------------------------------------------------------------------- CSV files


@pytest.mark.parametrize("content, message", [
    (b"", "empty"),
    (b"prompt\n", "no prompts"),
    (b"a,b\n1,2\n", "no column prompt"),
    (b'prompt,id\n"unclosed,1\n', r"p\.csv:\d+: .*quotes"),
    (b"prompt,id\nx,1,2\n", r"p\.csv:2: 3 fields where the header has 2"),
    (b"prompt\nx\0y\n", "zero bytes"),
    (b"prompt\n\xff\xfe\n", r"p\.csv:2: not UTF-8"),
    ("prompt\nx\n".encode("utf-16"), "UTF-8"),
    (b"prompt,prompt\nx,y\n", "occurs twice"),
])  # fmt: skip
def test_broken_csv_files_are_refused_with_one_line(tmp_path, content, message):
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_prompts(path)
    assert "\n" not in str(error.value) and "p.csv" in str(error.value)


@pytest.mark.parametrize(
    "content", ["Prompt;Filename\r\na;1\r\nb;2\r\n", "\ufefftext\na\nb\n", "id\tprompt\n1\ta\n2\tb\n"]
)
def test_delimiters_marks_and_column_names_are_recognised(tmp_path, content):
    path = tmp_path / "p.csv"
    path.write_text(content, encoding="utf-8", newline="")
    assert read_prompts(path) == ["a", "b"]


def test_text_files_are_one_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("a, b\n\nc\n\n\n")
    assert read_prompts(tmp_path / "p.txt") == ["a, b", "", "c"]


def test_random_csv_files_come_back_exactly(tmp_path):
    rng = random.Random(0)
    for number in range(200):
        rows = [["".join(rng.choice('ab ,;"\n\té') for _ in range(rng.randrange(9))) for _ in "xyz"] for _ in range(5)]
        rows = [row for row in rows if any(row)]
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows([["x", "y", "z"], *rows])
        path = tmp_path / f"{number}.csv"
        path.write_text(buffer.getvalue(), encoding="utf-8", newline="")
        assert [list(record.values()) for _, record in read_csv(path)] == rows


# -------------------------------------------------------------------------------------------------------- batches


@pytest.fixture
def toy_rows(tmp_path):
    return data.load("toy:6", tmp_path, size=32).rows


def test_batches_are_a_function_of_the_step_alone(toy_rows):
    make = lambda: batches.Batches(toy_rows, 32, 4, seed=1, dropout=0.2)  # noqa: E731
    straight, later = make(), make()
    for step in range(12):
        straight[step]
    a, b = straight[12], later[12]
    assert a["prompt"] == b["prompt"] and (a["image"] == b["image"]).all()


def test_an_epoch_holds_every_pair_once_and_ranks_share_it(toy_rows):
    pairs = sorted(prompt for row in toy_rows for prompt in row.prompts)
    count = len(pairs) - len(pairs) % 4
    one = batches.Batches(toy_rows, 32, 4, seed=1)
    two = [batches.Batches(toy_rows, 32, 2, seed=1, rank=rank, world=2) for rank in (0, 1)]
    seen = [prompt for step in range(count // 4) for prompt in one[step]["prompt"]]
    shared = [prompt for step in range(count // 4) for ranked in two for prompt in ranked[step]["prompt"]]
    assert seen == shared
    assert not [prompt for prompt in set(seen) if seen.count(prompt) > pairs.count(prompt)]


def test_images_are_flipped_only_where_the_prompt_is_dropped(toy_rows):
    """ "upper-left" must stay true: a sample with a prompt is never mirrored."""
    source = batches.Batches(toy_rows, 32, 8, seed=2, dropout=0.5, augment=False)
    upright = {images.msdm_valid(images.open_rgb(row.file), 32).tobytes() for row in toy_rows}
    dropped = kept = flipped = 0
    for step in range(6):
        batch = source[step]
        for image, prompt in zip(batch["image"], batch["prompt"]):
            pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().tobytes()
            if prompt:
                kept += 1
                assert pixels in upright
            else:
                dropped += 1
                flipped += pixels not in upright
    assert kept > 10 and dropped > 10 and flipped > 5

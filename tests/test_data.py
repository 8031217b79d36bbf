"""Tables and prompt files: every layout people have, and one clear line for everything that is wrong with them."""

import csv
import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from nanomed import data
from nanomed.data import images, ranges
from nanomed.data.prompts import read_prompts
from nanomed.data.table import DataError, Row, Table, read_csv, with_paraphrases
from nanomed.evaluation import imagesets
from nanomed.run.ranks import Ranks
from nanomed.training.batches import Batches, Samples


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


@pytest.mark.parametrize(
    "kind, name", [("folder", "metadata.csv"), ("folder", "metadata.jsonl"), ("clef", "captions.csv")]
)
def test_a_data_set_one_folder_deeper_is_named(tmp_path, kind, name):
    picture(tmp_path / "train" / "a.png")
    with pytest.raises(DataError) as error:
        data.load(f"{kind}:{tmp_path}")
    assert "deeper" not in str(error.value)  # there is none to name
    (tmp_path / "train" / name).write_text("file_name,text\na.png,one\n")
    with pytest.raises(DataError) as error:
        data.load(f"{kind}:{tmp_path}")
    deeper = tmp_path / "train"
    assert f"{deeper / name} lies one folder deeper: give {deeper}" in str(error.value)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("spec", ["toy:many", "toy:0", "toy:²", "clef", "nothing:here", "clef:"])
def test_unknown_data_sets_are_refused(spec, tmp_path):
    with pytest.raises(DataError, match="toy"):
        data.load(spec, tmp_path)


def test_the_organisers_csv_names_with_and_without_suffix_are_one_image(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "b.png")
    text = "Prompt;Filename\r\none, two;a.jpg\r\nthree;b\r\nfour;a\r\n"
    (tmp_path / "prompt-gt.csv").write_text(text, newline="")
    rows = data.load(f"clef:{tmp_path}").rows
    assert [row.prompts for row in rows] == [("one, two", "four"), ("three",)]
    assert [row.file for row in rows] == [tmp_path / "images" / "a.jpg", tmp_path / "b.png"]
    assert rows == data.load(f"clef:{tmp_path / 'prompt-gt.csv'}").rows and rows[0].paraphrases == ()


def test_a_row_without_a_paraphrase_keeps_its_own_words(tmp_path):
    """An empty paraphrase in place of a prompt would train the unconditional model."""
    picture(tmp_path / "images" / "a.jpg")
    (tmp_path / "train_captions.csv").write_text("Filename,Prompt,Paraphrase\na,one,eins\na,two,\n")
    assert data.load(f"clef:{tmp_path}").rows[0].paraphrases == ("eins", "two")


@pytest.mark.parametrize("reader, table, text", [
    ("clef", "prompt-gt.csv", "Prompt;Filename\na;there.png\nb;{name}\n"),
    ("folder", "metadata.csv", 'file_name,text\nthere.png,a\n"{name}",b\n'),
    ("folder", "metadata.jsonl", '{{"file_name": "there.png", "text": "a"}}\n{{"file_name": "{name}", "text": "b"}}\n'),
    ("ham10000", "metadata.csv", 'image_id,dx\nthere,nv\n"{name}",nv\n'),
])  # fmt: skip
@pytest.mark.parametrize("name", ["gone.png", "../outside.png", "out.png"])
def test_readers_name_the_line_of_a_missing_or_forbidden_image(tmp_path, reader, table, text, name):
    root = tmp_path / "set"
    picture(root / "there.png")
    picture(tmp_path / "outside.png")
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    (root / table).write_text(text.format(name=name))
    if reader == "ham10000":
        (root / "out.png").unlink()  # its listing refuses the link before any line asks for it
    line = 2 if table.endswith("jsonl") else 3
    with pytest.raises(DataError, match=rf"{table}:{line}: ") as error:
        data.load(f"{reader}:{root}")
    assert "\n" not in str(error.value)
    problems = []
    rows = data.load(f"{reader}:{root}", problems=problems).rows  # the doctor's way: all of them, and the rest is read
    assert [row.file.name for row in rows] == ["there.png"] and len(problems) == 1


@pytest.mark.parametrize("line", ["[1]", '{"file_name": 5, "text": "x"}', '{"file_name": "a.png"}', "{", "[" * 100_000,
                                  '{"file_name": "a.png", "text": [1]}', '{"text": "x"}'])  # fmt: skip
def test_lines_of_json_that_say_nothing_are_refused(tmp_path, line):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"metadata\.jsonl:2: "):
        data.load(f"folder:{tmp_path}")


def test_a_line_of_json_may_hold_several_captions_and_any_character(tmp_path):
    picture(tmp_path / "a.png")
    text = '{"file_name": "a.png", "text": ["one\u2028still one", "two"]}\n'
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert data.load(f"folder:{tmp_path}").rows[0].prompts == ("one\u2028still one", "two")


def test_images_without_any_caption_are_refused_not_trained_on(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="metadata.csv"):
        data.load(f"folder:{tmp_path}")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match="b.png needs it"):
        data.load(f"folder:{tmp_path}")


def test_abbreviated_lesions_are_spelled_out(tmp_path):
    """Med-Art's eight classes as the ISIC archive abbreviates them."""
    spelled = {
        "AK": "actinic keratosis", "BCC": "basal cell carcinoma", "BKL": "benign keratosis", "DF": "dermatofibroma",
        "MEL": "melanoma", "NV": "melanocytic nevus", "SCC": "squamous cell carcinoma", "VASC": "vascular lesion",
    }  # fmt: skip
    for name in spelled:
        picture(tmp_path / name / "1.jpg")
    rows = data.load(f"skin:{tmp_path}").rows
    assert {row.label: row.prompts[0] for row in rows} == {
        name: f"A dermoscopic image of {words}" for name, words in spelled.items()
    }


def test_ham10000_keeps_the_images_of_a_lesion_on_one_side(tmp_path):
    lines = ["lesion_id,image_id,dx"]
    for i in range(60):
        picture(tmp_path / "part_1" / f"ISIC_{i}.jpg")
        lines.append(f"L{i // 3},ISIC_{i},{'mel' if i < 30 else 'nv'}")
    (tmp_path / "HAM10000_metadata").write_text("\n".join(lines))  # as Dataverse names it
    table = data.load(f"ham10000:{tmp_path}")
    for by_label in (False, True):
        train, valid = table.split(0.2, seed=1, by_label=by_label)
        assert len(valid.rows) == 12 and not {row.group for row in train.rows} & {row.group for row in valid.rows}
    assert [row.label for row in valid.rows].count("mel") == 6


# ------------------------------------------------------------------------------------------------------ the table


def test_the_split_takes_the_share_it_is_asked_for():
    rows = tuple(Row(Path(f"{i:02}.jpg")) for i in range(50))
    for share, count in ((0, 0), (0.01, 1), (0.1, 5), (0.99, 49)):  # one is left to train on
        assert len(Table("t", rows).split(share, seed=0)[1].rows) == count
    for share in (-0.1, 1, 20):
        with pytest.raises(DataError, match="share"):
            Table("t", rows).split(share, seed=0)
    assert Table("t", ()).split(0.1, seed=0)[1].rows == ()


def test_the_split_is_by_image_seeded_and_blind_to_the_order():
    rows = [Row(Path(f"{i}.jpg"), (f"p{i}",) * 3) for i in range(50)]
    train, valid = Table("t", tuple(rows)).split(0.2, seed=3)
    random.Random(0).shuffle(rows)
    again = Table("t", tuple(rows)).split(0.2, seed=3)
    assert {r.file for r in valid.rows} == {r.file for r in again[1].rows} and len(valid.rows) == 10
    assert not {r.file for r in train.rows} & {r.file for r in valid.rows}
    assert {r.file for r in valid.rows} != {r.file for r in Table("t", tuple(rows)).split(0.2, seed=4)[1].rows}


def test_the_papers_three_uses_of_paraphrases(tmp_path):
    table = Table("t", (Row(Path("a.jpg"), ("one", "two")),))
    path = tmp_path / "p.csv"
    path.write_text("Prompt,Paraphrase\none,eins\ntwo,zwei\n")
    assert with_paraphrases(table, path, "add").rows[0].prompts == ("one", "two", "eins", "zwei")
    for strategy in ("some", "all"):
        row = with_paraphrases(table, path, strategy).rows[0]
        assert row.prompts == ("one", "two") and row.paraphrases == ("eins", "zwei")
    empty = Table("t", (Row(Path("a.jpg"), ("", "one")),))  # no condition stays no condition
    assert with_paraphrases(empty, path, "all").rows[0].paraphrases == ("", "eins")
    path.write_text("Prompt,Paraphrase\none,  \n")
    with pytest.raises(DataError, match=r"p\.csv:2: an empty paraphrase"):
        with_paraphrases(table, path, "all")
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
    ("prompt\nx\n".encode("utf-16-le"), "zero bytes"),  # without a mark
    ("prompt\nx\n".encode("utf-32"), "zero bytes"),
    (b"\xff\xfep\0r", "damaged"),
    ("prompt\nx\n".encode("utf-16")[:-1], "damaged"),
    (b"\xef\xbb\xbfprompt\n" + 4 * "\u00e9".encode() + b"\n\xe9a\n", r"p\.csv:3: not UTF-8; save"),  # it says UTF-8
    (b"prompt,prompt\nx,y\n", "occurs twice"),
    (b'prompt,id\na,1\n"two\nlines",2\n"never closed,3\n' + b"x,4\n" * 50, r"p\.csv:5: .*quotes"),
    (b'prompt,id\n"a"b,1\n', r"p\.csv:2: .*quotes"),
    (b"prompt,id\n" + b"x" * 200_000 + b",1\n", r"p\.csv:2: field larger"),
    (b"\n\n\n", "empty"),
    (b"Generate an image with a polyp.\nGenerate an image with text.\n", "header"),  # the first would be lost
    (b"prompt\nGenerate an image, please\n", r"p\.csv:2: 2 fields"),
])  # fmt: skip
def test_broken_csv_files_are_refused_with_one_line(tmp_path, content, message):
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_prompts(path)
    assert "\n" not in str(error.value) and "p.csv" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "Prompt;Filename\r\na;1\r\nb;2\r\n",
        "\ufefftext\na\nb\n",
        "id\tprompt\n1\ta\n2\tb\n",
        "prompt,id\ra,1\rb,2\r",
        "PROMPT\na\n\nb\n",
        "line\na\nb",
        '"prompt","x;y;z"\na,1\nb,2\n',
    ],
)
def test_delimiters_marks_and_column_names_are_recognised(tmp_path, content):
    path = tmp_path / "p.csv"
    path.write_text(content, encoding="utf-8", newline="")
    assert read_prompts(path) == ["a", "b"]


@pytest.mark.parametrize(
    "code, delimiter", [("utf-16", "\t"), ("utf-16-be", "\t"), ("cp1252", ";"), ("cp1252", ","), ("utf-8-sig", ",")]
)
def test_excels_own_files_are_read_wherever_a_table_is(tmp_path, code, delimiter):
    """As metadata, captions, prompts and paraphrases: the words that were typed, whatever Excel made of them."""
    said, other = "Bürste über dem Café", "Größe, 5 µm"
    image, mark = picture(tmp_path / "a.png"), "\ufeff" if code == "utf-16-be" else ""

    def write(name, *rows):
        text = mark + "".join(delimiter.join(f'"{cell}"' for cell in row) + "\r\n" for row in rows)
        (tmp_path / name).write_bytes(text.encode(code))
        return tmp_path / name

    write("metadata.csv", ("file_name", "text"), ("a.png", said))
    table = data.load(f"folder:{tmp_path}")
    assert table.rows[0].prompts == (said,) and table.rows[0].file == image
    captions = write("c.csv", ("file_name", "text"), ("a.png", other))
    assert data.with_captions(table, str(captions)).rows[0].prompts == (other,)
    paraphrases = write("p.csv", ("Prompt", "Paraphrase"), (said, other))
    assert with_paraphrases(table, paraphrases, "all").rows[0].paraphrases == (other,)
    assert read_prompts(paraphrases) == [said]


WEST = [  # as people write, in the letters of Windows
    "Flächige Läsion, Größe 5 mm, Ménière, 37 °C",
    "Un polype sessile à la paroi, très érythémateux",
    "L’image d’une lésion « plane » – côté gauche, sévère… où l’œdème est bénin",
    "Pólipo sésil de 5 mm en el ángulo, pequeña lesión",
    "Lesão plana na mucosa do cólon, não sangrante",
    "Un polipo più piccolo, così com’è, di qualità",
    "Små røde sår på slimhinden, æble",
    "En liten förändring på höger sida, blå",
    "Een geïnfecteerde laesie, reünie",
    "a patient’s polyp – 5 µm, 20 € “as seen”",
]


@pytest.mark.parametrize("text", WEST)
def test_windows_letters_of_western_languages_are_read(tmp_path, text):
    path = tmp_path / "p.csv"
    path.write_bytes(f"prompt;id\r\n{text};1\r\n".encode("cp1252"))
    assert read_prompts(path) == [text]


@pytest.mark.parametrize("code, text, told", [
    ("cp1252", "Une lésion à côté, très petite", None),
    ("cp1252", "très", "byte 0xe8 could mean è or č"),  # alone it could be Croatian
    ("cp1252", "5 mm³, 2 cm² ± 3 m³, nódulo", None),
    ("cp1250", "mały polip", ""),
    ("cp1250", "był", "byte 0xb3 could mean ³ or ł"),
    ("cp1252", "não, câncer", "byte 0xe3 could mean ã or ă"),
    ("cp1250", "Malý polyp, část střeva", ""),
    ("cp1250", "Polip w części okrężnicy, mały", ""),
    ("cp1250", "A vastagbél középső része", ""),
    ("cp1250", "Leziune în colonul transvers, mică", ""),
    ("cp1251", "полип толстой кишки", ""),
    ("cp1253", "πολύποδας του εντέρου", ""),
    ("cp1254", "kalın bağırsakta şişlik", ""),
    ("cp1257", "gļotādā ir balta viena", "could mean ï or ļ"),
    ("cp1257", "ėda", "could mean ë or ė"),
    ("cp1257", "storosios žarnos polipas, mažas", ""),
    ("mac_roman", "une lésion bénigne", ""),
    ("mac_roman", "große Läsion", ""),
    ("mac_roman", "côté", ""),
    ("cp850", "une lésion bénigne", ""),
    ("cp850", "Größe", ""),
    ("shift_jis", "内視鏡 polyp", ""),
    ("gbk", "内窥镜图像 polyp", ""),
])  # fmt: skip
def test_other_letters_are_refused_with_their_line_and_never_misread(tmp_path, code, text, told):
    path = tmp_path / "p.csv"
    path.write_bytes(f"prompt;id\r\nplain;0\r\n{text};1\r\n".encode(code))
    if told is None:
        assert read_prompts(path) == ["plain", text]
        return
    with pytest.raises(DataError, match=rf"p\.csv:3: not UTF-8.*{told}.*save the file as UTF-8") as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


def test_prompts_keep_commas_repetitions_and_emptiness(tmp_path):
    """An empty prompt asks for an unconditional image; the order is the order of the file."""
    (tmp_path / "p.csv").write_text('prompt\n"pink, red"\n""\n"pink, red"\n"a ""quoted"" word"\n')
    assert read_prompts(tmp_path / "p.csv") == ["pink, red", "", "pink, red", 'a "quoted" word']


def test_a_line_separator_within_a_prompt_is_no_new_prompt(tmp_path):
    (tmp_path / "p.txt").write_text(
        "\ufeffone\u2028still one\r\ntwo\x0cstill two\rthree\n", encoding="utf-8", newline=""
    )
    assert read_prompts(tmp_path / "p.txt") == ["one\u2028still one", "two\x0cstill two", "three"]


def test_many_rows_are_read_in_seconds(tmp_path):
    (tmp_path / "p.csv").write_text("id,prompt\n" + "".join(f'{i},"a, {i}"\n' for i in range(100_000)))
    prompts = read_prompts(tmp_path / "p.csv")
    assert len(prompts) == 100_000 and prompts[-1] == "a, 99999"


def test_any_bytes_give_prompts_or_a_data_error(tmp_path):
    """Random files of the characters that CSV stumbles over: never another error, and always the file's name."""
    rng, path, read = random.Random(0), tmp_path / "p.csv", 0
    pieces = [
        b",",
        b";",
        b"\t",
        b'"',
        b"\n",
        b"\r",
        b"\r\n",
        b"prompt",
        b"text",
        b"a b",
        b"",
        b"\xc3\xa9",
        b"\xe9",
        b"\0",
        b" ",
    ]
    for _ in range(1500):
        path.write_bytes(
            rng.choice([b"", b"prompt,id\n", b"prompt\n"]) + b"".join(rng.choices(pieces, k=rng.randrange(12)))
        )
        try:
            assert all(isinstance(prompt, str) for prompt in read_prompts(path))
            read += 1
        except DataError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert 100 < read < 1400


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
    make = lambda: Batches(toy_rows, Samples(32, 1, dropout=0.2), 4)  # noqa: E731
    straight, later = make(), make()
    for step in range(12):
        straight[step]
    a, b = straight[12], later[12]
    assert a["prompt"] == b["prompt"] and (a["image"] == b["image"]).all()


def test_an_epoch_holds_every_pair_once_and_ranks_share_it(toy_rows):
    pairs = sorted(prompt for row in toy_rows for prompt in row.prompts)
    count = len(pairs) - len(pairs) % 4
    one = Batches(toy_rows, Samples(32, 1), 4)
    two = [Batches(toy_rows, Samples(32, 1), 2, Ranks(rank, 2)) for rank in (0, 1)]
    seen = [prompt for step in range(count // 4) for prompt in one[step]["prompt"]]
    shared = [prompt for step in range(count // 4) for ranked in two for prompt in ranked[step]["prompt"]]
    assert seen == shared
    assert not [prompt for prompt in set(seen) if seen.count(prompt) > pairs.count(prompt)]


@pytest.mark.parametrize("flips", [True, False])
def test_images_are_flipped_only_where_the_prompt_is_dropped(toy_rows, flips):
    """ "upper-left" must stay true: a sample with a prompt is never mirrored; and without `flips` none is."""
    source = Batches(toy_rows, Samples(32, 2, dropout=0.5, flips=flips, augment=False), 8)
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
    assert kept > 10 and dropped > 10 and (flipped > 5 if flips else not flipped)


def test_prompts_that_name_a_place_can_be_drawn_more_often(toy_rows):
    """Every toy image has such a prompt; chance draws one in six. An image that has none keeps what was drawn."""
    drawn = Batches(toy_rows, Samples(32, 3, places=1.0), 64)[0]["prompt"]
    assert all(" located in " in prompt for prompt in drawn)
    silent = [replace(row, prompts=("Generate an image with no polyps.",)) for row in toy_rows]
    assert set(Batches(silent, Samples(32, 3, places=1.0), 8)[0]["prompt"]) == {"Generate an image with no polyps."}


def test_places_come_first_for_as_many_steps_as_asked(toy_rows):
    """On both ranks alike, and by the number of the step, so that a run which goes on at step 3 does the same."""
    for rank in (0, 1):
        early = Batches(toy_rows, Samples(32, 3, places_first=2), 32, Ranks(rank, 2))
        named = [[" located in " in prompt for prompt in early[step]["prompt"]] for step in (2, 1, 0)]
        assert all(named[1]) and all(named[2]) and sum(named[0]) < 16
        plain = Batches(toy_rows, Samples(32, 3), 32, Ranks(rank, 2))
        assert plain[2]["prompt"] == early[2]["prompt"]


# ---------------------------------------------------------------------------------------------- several sets as one


@pytest.fixture
def two(tmp_path):
    """Class folders, and skin lesions of which several images show one."""
    for name in ("polyps", "mel"):
        for i in range(10):
            picture(tmp_path / "classes" / name / f"{i}.png", (i, 0, 0))
    lines = ["lesion_id,image_id,dx"]
    for i in range(30):
        picture(tmp_path / "ham" / f"{i}.png", (0, i, 0))
        lines.append(f"L{i // 3},{i},{'mel' if i < 15 else 'nv'}")
    (tmp_path / "ham" / "HAM10000_metadata.csv").write_text("\n".join(lines))
    return f"kvasir:{tmp_path / 'classes'}", f"ham10000:{tmp_path / 'ham'}"


@pytest.mark.parametrize("by_label", [False, None])
def test_several_sets_are_one_and_each_is_split_as_it_would_be_alone(two, by_label):
    tables = [data.load(spec) for spec in two]
    table = data.load("+".join(two))
    assert table.name == "kvasir+ham10000" and len(table.rows) == 50
    assert [row.file for row in table.rows] == [row.file for one in tables for row in one.rows]
    assert {row.label for row in table.rows} == {"polyps", "mel", "nv"}  # of both sets there is one mel
    for seed in range(3):
        train, valid = table.split(0.2, seed, by_label)
        alone = [one.split(0.2, seed, by_label) for one in tables]
        assert [row.file for row in valid.rows] == [row.file for _, half in alone for row in half.rows]
        assert [row.file for row in train.rows] == [row.file for half, _ in alone for row in half.rows]


def test_groups_of_one_name_in_two_sets_stay_two(tmp_path):
    for name in "ab":
        lines = ["lesion_id,image_id,dx"]
        for i in range(3):
            picture(tmp_path / name / f"{i}.png")
            lines.append(f"L{i},{i},mel")
        (tmp_path / name / "metadata.csv").write_text("\n".join(lines))
    rows = data.load(f"ham10000:{tmp_path / 'a'}+ham10000:{tmp_path / 'b'}").rows
    assert len({row.group for row in rows}) == 6
    with pytest.raises(DataError, match=r"a/0\.png: is in two of the data sets ham10000 and ham10000"):
        data.load(f"ham10000:{tmp_path / 'a'}+ham10000:{tmp_path / 'b' / '..' / 'a'}")


@pytest.mark.parametrize("pairs", [True, False])
def test_a_weight_repeats_a_sets_samples_in_every_epoch_and_none_that_is_held_out(two, pairs):
    table = data.load(f"{two[0]}*3+{two[1]}")
    train, valid = table.split(0.2, 1, None)
    assert len(train.rows) == 40 and {row.weight for row in valid.rows} == {1}
    batches = Batches(train.rows, Samples(8, 0, pairs=pairs, augment=False), 8)
    assert len(batches.items) == 16 * 3 + 24
    for epoch in range(2):
        drawn = [train.rows[batches.items[i][0]].file.parent.name for i in batches._order(epoch)]
        assert drawn.count("ham") == 24 and drawn.count("mel") == drawn.count("polyps") == 24
    batches.close()
    assert len(Batches(data.load(f"{two[0]}*2").rows, Samples(8, 0), 8).items) == 40  # one set has a weight, too


def test_the_digest_depends_on_every_set_and_weight(two):
    specs = [two[0], two[1], "+".join(two), "+".join(reversed(two)), f"{two[0]}*2+{two[1]}", f"{two[0]}+{two[1]}*2",
             f"{two[0]}*3+{two[1]}"]  # fmt: skip
    assert len({data.load(spec).digest for spec in specs}) == len(specs)
    assert data.load(f"{two[0]}*1").digest == data.load(two[0]).digest


@pytest.mark.parametrize("weight", ["0", "-1", "1.5", "x", "", "01", "9999999", "\u0663", "nan"])
def test_any_other_weight_is_refused_in_one_line(two, weight):
    with pytest.raises(DataError, match="is no whole number from 1 to 999999") as error:
        data.load(f"{two[0]}*{weight}+{two[1]}")
    assert "\n" not in str(error.value) and f"the weight {weight!r} of {two[0]}" in str(error.value)


def test_a_plus_or_a_star_in_the_name_of_a_folder_is_a_name(tmp_path):
    for name in ("a+clef:b", "a*2", "a+b"):
        picture(tmp_path / name / "1.png")
        (tmp_path / name / "1.txt").write_text(name)
        assert data.parts(f"folder:{tmp_path / name}") == [(f"folder:{tmp_path / name}", 1)]
        assert data.load(f"folder:{tmp_path / name}").rows[0].prompts == (name,)
        assert evaluate.named(f"x=folder:{tmp_path / name}") == {"x": [f"folder:{tmp_path / name}"]}
    both = data.load(f"folder:{tmp_path / 'a*2'}*4+folder:{tmp_path / 'a+b'}").rows
    assert [(row.prompts[0], row.weight, row.part) for row in both] == [("a*2", 4, 0), ("a+b", 1, 1)]
    assert data.parts("folder:a+nothing:b*2") == [("folder:a+nothing:b", 2)]
    assert data.parts("toy:5*2+toy+folder:x") == [("toy:5", 2), ("toy", 1), ("folder:x", 1)]
    assert data.only_toy("toy:5*2") and not data.only_toy("toy+folder:x")


def test_ranges_of_several_sets_are_their_own(tmp_path):
    """10 bits beside 12 and beside 8."""
    for name, top in (("a", 1000), ("b", 4000), ("c", None)):
        folder = tmp_path / name
        picture(folder / "1.png")
        if top:
            Image.fromarray(np.full((8, 8), top, np.uint16)).save(folder / "1.png")
        (folder / "1.txt").write_text(name)
    table = data.load("+".join(f"folder:{tmp_path / name}" for name in "abc"))
    assert ranges.of_table(table, "auto") == ["10", "12", ""]
    assert [row.range for row in ranges.ranged(table, ["10", "12", ""]).rows] == ["10", "12", ""]


def test_evaluation_takes_the_same_names_and_refuses_weights(two):
    """As --real A+B does: the images of one behind those of the other."""
    joined = imagesets.find("+".join(two))
    apart = imagesets.union("both", [imagesets.find(spec) for spec in two])
    assert joined.sources == apart.sources and joined.labels == apart.labels and joined.hashes == apart.hashes
    with pytest.raises(DataError, match=r"the weight of kvasir:.*\*3 is for training"):
        imagesets.find(f"{two[0]}*3+{two[1]}")

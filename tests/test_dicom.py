"""DICOM: windows and rescaling as pydicom's own arithmetic has them, MONOCHROME1 inverted, and nothing read that could
name a patient. Where pydicom is missing, a file says what to install."""

import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import evaluate
from nanomed import data
from nanomed.data import __main__ as doctor
from nanomed.data import dicom, images, ranges
from nanomed.data.check import check
from nanomed.data.table import DataError
from nanomed.evaluation import imagesets

SECRET = "Secret^Person"
FILES = Path(pydicom.__file__).parent / "data" / "test_files"  # which the package brings


def write(path, stored, syntax=ExplicitVRLittleEndian, **tags):
    """A file of stored values, with a patient's name, a birthday and numbers in it."""
    stored = np.asarray(stored)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    made = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    made.PatientName, made.PatientID, made.PatientBirthDate = SECRET, f"{SECRET} 1", "19700101"
    made.AccessionNumber = made.StudyDescription = made.InstitutionName = SECRET[:6]
    made.Rows, made.Columns = stored.shape[:2]
    made.SamplesPerPixel, made.PhotometricInterpretation = (3, "RGB") if stored.ndim == 3 else (1, "MONOCHROME2")
    if stored.ndim == 3:
        made.PlanarConfiguration = 0
    made.BitsAllocated = made.BitsStored = 8 * stored.itemsize
    made.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in tags.items():
        setattr(made, name, value)
    made.HighBit = tags.get("HighBit", made.BitsStored - 1)
    made.PixelData = stored.tobytes()
    made.save_as(path, enforce_file_format=True)
    return Path(path)


def table(entries, first, bits, signed=False):
    """A look-up table, as a sequence of one item."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if signed else "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", [int(entry) for entry in entries])
    return [item]


def grey(path, span=""):
    pixels = np.asarray(images.open_rgb(path, span))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(int)


def rounded(values):
    return np.floor(np.clip(values, 0, 255) + 0.5).astype(int)


def by_pydicom(path):
    """0 .. 255 of a file, by its functions: their range is that of the stored bits, rescaled."""
    said = pydicom.dcmread(path)
    shown = apply_voi_lut(apply_modality_lut(said.pixel_array, said), said, prefer_lut=False).astype(float)
    low = -(2 ** (said.BitsStored - 1)) if said.PixelRepresentation else 0
    ends = np.array([low, low + 2**said.BitsStored - 1.0])
    if "RescaleSlope" in said:
        ends = ends * float(said.RescaleSlope) + float(said.RescaleIntercept)
    return (shown - ends.min()) / (ends.max() - ends.min()) * 255


RAMP = np.linspace(0, 4095, 64 * 64).round().reshape(64, 64)


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("kind, rescale", [
    (np.uint16, None), (np.uint16, (1, -1024)), (np.int16, (1, 0)), (np.int16, (2.5, -30.25)), (np.uint8, None),
])  # fmt: skip
def test_windows_and_rescaling_are_pydicoms(tmp_path, function, kind, rescale):
    """Sixteen windows each, inside and across the ends; equal to 1e-9 of 255 in double precision."""
    stored = (RAMP / 16.1 if kind is np.uint8 else RAMP - (2048 if kind is np.int16 else 0)).astype(kind)
    for n, (centre, width) in enumerate(itertools.product((40, 127.5, 900, -200), (1, 2, 80.5, 2000))):
        tags = {"WindowCenter": centre, "WindowWidth": width, "BitsStored": 8 if kind is np.uint8 else 12}
        tags |= {"VOILUTFunction": function} if function else {}
        tags |= dict(zip(("RescaleSlope", "RescaleIntercept"), rescale)) if rescale else {}
        path = write(tmp_path / f"{n}.dcm", stored, **tags)
        expected, ours = by_pydicom(path), dicom.read(path, 10**6).greys
        assert np.abs(ours - expected).max() <= 1e-9 * 255, (centre, width)
        assert (grey(path) == rounded(ours)).all()


def test_the_linear_window_by_hand(tmp_path):
    """PS3.3 C.11.2.1.2: centre 2048 and width 4096 show 12 bits as they are; 2048 and 1 is a threshold."""
    path = write(tmp_path / "x.dcm", RAMP.astype(np.uint16), WindowCenter=2048, WindowWidth=4096)
    assert (grey(path) == rounded(RAMP * 255 / 4095)).all()
    path = write(tmp_path / "x.dcm", RAMP.astype(np.uint16), WindowCenter=[2048, 5], WindowWidth=[1, 9])  # the first
    assert (grey(path) == np.where(RAMP <= 2047, 0, 255)).all()


def test_tables_are_pydicoms(tmp_path):
    """Modality and VOI look-up tables; what lies beyond one is its first or last entry; windows go before tables."""
    stored = RAMP.astype(np.uint16)
    bent = (np.arange(3000) ** 2 // 2300).clip(0, 4095)
    path = write(tmp_path / "m.dcm", stored, BitsStored=12, ModalityLUTSequence=table(bent, 500, 16))
    said = pydicom.dcmread(path)
    assert (dicom.read(path, 10**6).values == apply_modality_lut(said.pixel_array, said)).all()
    assert (grey(path) == rounded(dicom.read(path, 10**6).values * 255 / 65535)).all()
    path = write(tmp_path / "v.dcm", stored, BitsStored=12, VOILUTSequence=table(bent, 500, 12))
    said = pydicom.dcmread(path)
    assert np.abs(dicom.read(path, 10**6).greys - apply_voi_lut(said.pixel_array, said) / 4095.0 * 255).max() < 1e-9
    signed = (RAMP - 2048).astype(np.int16)
    path = write(tmp_path / "s.dcm", signed, BitsStored=12, VOILUTSequence=table(bent, -700, 12, signed=True))
    said = pydicom.dcmread(path)
    assert np.abs(dicom.read(path, 10**6).greys - apply_voi_lut(said.pixel_array, said) / 4095.0 * 255).max() < 1e-9
    both = write(tmp_path / "b.dcm", stored, BitsStored=12, VOILUTSequence=table(bent, 500, 12), WindowCenter=900,
                 WindowWidth=300)  # fmt: skip
    assert np.abs(dicom.read(both, 10**6).greys - by_pydicom(both)).max() < 1e-6


def test_monochrome1_is_inverted(tmp_path):
    """Its least value is white, with a window and without."""
    for tags in ({}, {"WindowCenter": 900, "WindowWidth": 1234}):
        stored = RAMP.astype(np.uint16)
        plain = write(tmp_path / "2.dcm", stored, BitsStored=12, **tags)
        other = write(tmp_path / "1.dcm", stored, BitsStored=12, PhotometricInterpretation="MONOCHROME1", **tags)
        assert (grey(other) == rounded(255 - np.clip(dicom.read(plain, 10**6).greys, 0, 255))).all()
        assert grey(other)[0, 0] == 255 and grey(other)[-1, -1] == 0
    assert (grey(other, "0:4095") == rounded(255 - RAMP * 255 / 4095)).all()


def test_without_a_window_the_stored_bits_are_shown_and_a_range_takes_their_place(tmp_path):
    ten = (RAMP / 4).astype(np.uint16)
    path = write(tmp_path / "x.dcm", ten, BitsStored=12)
    assert (grey(path) == rounded(ten * (255 / 4095))).all() and grey(path).max() == 64
    assert ranges.decided([path], "auto") == "10" and (grey(path, "10") == rounded(ten * (255 / 1023))).all()
    assert "dark or flat" in ranges.dark([path])
    units = write(tmp_path / "ct.dcm", (RAMP / 4).astype(np.int16), RescaleSlope=1, RescaleIntercept=-1024)
    assert (grey(units, "-160:240") == rounded((ten.astype(float) - 1024 + 160) * (255 / 400))).all()
    with pytest.raises(DataError, match=r"ct\.dcm: holds -1024, so --range auto knows no black; say --range LOW:HIGH"):
        ranges.decided([units], "auto")


def test_a_range_of_two_values_replaces_a_window_and_bits_do_not(tmp_path):
    path = write(tmp_path / "x.dcm", RAMP.astype(np.uint16), WindowCenter=100, WindowWidth=50, BitsStored=12)
    assert ranges.of_files([path], "auto") == () and ranges.of_files([path], "12") == ("",)
    assert ranges.of_files([path], "0:4095") == ("0:4095",) and (grey(path, "12") == grey(path)).all()
    assert (grey(path, "0:4095") == rounded(RAMP * 255 / 4095)).all() and ranges.dark([path]) == ""


def test_colours_are_read_in_both_orders(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    path = write(tmp_path / "x.dcm", colours)
    assert (np.asarray(images.open_rgb(path)) == colours).all()
    path = write(tmp_path / "y.dcm", colours, PlanarConfiguration=1)  # all of red, then all of green, then of blue
    planes = np.frombuffer(colours.tobytes(), np.uint8).reshape(3, 7, 5).transpose(1, 2, 0)
    assert (np.asarray(images.open_rgb(path)) == planes).all()


def test_bits_beside_the_stored_ones_are_no_values(tmp_path):
    """Old files keep overlays in them, and some store their bits at the upper end."""
    stored = RAMP.astype(np.uint16)
    path = write(tmp_path / "o.dcm", stored | 0x5000, BitsStored=12)
    assert (dicom.read(path, 10**6).values == RAMP).all()
    path = write(tmp_path / "h.dcm", stored << 4, BitsStored=12, HighBit=15)
    assert (dicom.read(path, 10**6).values == RAMP).all()
    path = write(tmp_path / "s.dcm", ((RAMP - 2048).astype(np.int16) & 0x0FFF), BitsStored=12)
    assert (dicom.read(path, 10**6).values == RAMP - 2048).all()


ODD = {
    "3 frames; export the one": {"NumberOfFrames": 3, "Rows": 1},
    "an enhanced, multi-frame object; export the frame": {"SharedFunctionalGroupsSequence": [Dataset()]},
    "PALETTE COLOR is not read; export it as RGB": {"PhotometricInterpretation": "PALETTE COLOR"},
    "its window is 0 wide": {"WindowCenter": 5, "WindowWidth": 0},
    "its VOI LUT function is none that is known": {"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "MAGIC"},
    "no decoder that is installed reads it; pip install pylibjpeg": {"syntax": "1.2.3.4"},
    "damaged DICOM file": {"Rows": 9},
    "more than 64,000,000 pixels": {"Rows": 60000, "Columns": 60000},
}


@pytest.mark.parametrize("told", ODD)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, told):
    path = write(tmp_path / "x.dcm", np.zeros((3, 4), np.uint16), **ODD[told])
    with pytest.raises(DataError, match=told) as error:
        images.open_rgb(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value) and SECRET not in str(error.value)


def test_every_file_that_pydicom_brings_is_an_image_or_one_line_without_a_name(tmp_path, capsys):
    """Damaged ones, plans, reports and waveforms among them; compressed without loss, they are the same image."""
    read = 0
    for path in sorted(FILES.glob("*.dcm")):
        try:
            assert images.open_rgb(path).mode == "RGB"
            read += 1
        except DataError as error:
            said = pydicom.dcmread(path, force=True)
            names = [str(said.get(tag, "")) for tag in ("PatientName", "PatientID")]
            line = str(error).removeprefix(f"{path}: ")
            assert line != str(error) and "\n" not in line and not any(name and name in line for name in names)
    assert read > 30 and capsys.readouterr().err == ""
    same = [images.open_rgb(FILES / f"MR_small{how}.dcm").tobytes() for how in ("", "_RLE", "_bigendian", "_implicit")]
    assert len(set(same)) == 1


def test_any_bytes_give_an_image_or_a_data_error(tmp_path):
    """Real files with bytes changed at random places, most of them in the tags, or cut off."""
    rng, path, read = random.Random(0), tmp_path / "x.dcm", 0
    whole = [(FILES / name).read_bytes() for name in ("CT_small.dcm", "MR_small_RLE.dcm", "SC_rgb_small_odd.dcm")]
    for n in range(300):
        data = bytearray(whole[n % 3])
        for _ in range(rng.randrange(1, 12)):
            data[rng.randrange(128, 2500) % len(data)] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if n % 5 == 0 else data)
        ranges.deep([path], "0:9")
        try:
            assert images.open_rgb(path, rng.choice(["", "0:100", "16"])).mode == "RGB"
            images.extremes(path)
            dicom.header(path)
            read += 1
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert 50 < read < 290


def test_no_tag_that_could_name_a_patient_is_parsed(tmp_path):
    found = dicom._opened(write(tmp_path / "x.dcm", RAMP.astype(np.uint16)))
    assert {pydicom.datadict.keyword_for_tag(tag) for tag in found.keys()} <= {*dicom.TAGS, "SpecificCharacterSet"}
    private = {"PN", "DA", "DT", "TM", "UI", "AE", "LO", "LT", "ST", "UT", "SH", "AS"}
    kinds = {tag: pydicom.datadict.dictionary_VR(tag) for tag in dicom.TAGS}
    assert not {tag for tag, kind in kinds.items() if kind in private}  # names, dates, identifiers and free text


# --------------------------------------------------------------------------------------------------------- data sets


@pytest.fixture
def folder(tmp_path):
    """Four DICOM files with captions, one of which admits to names in its pixels."""
    folder = tmp_path / "set"
    folder.mkdir()
    lines = ["file_name,text"]
    for i in range(4):
        tags = {"BurnedInAnnotation": "YES"} if i == 3 else {"WindowCenter": 900 + i, "WindowWidth": 800}
        write(folder / f"{i}.dcm", np.roll(RAMP, 9 * i).astype(np.uint16), BitsStored=12, **tags)
        lines.append(f"{i},chest {i}")  # without the suffix
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_data_set_of_dicom_files(folder, tmp_path, capsys, monkeypatch):
    rows = data.load(f"folder:{folder}").rows
    assert [row.file.name for row in rows] == [f"{i}.dcm" for i in range(4)]
    found = {finding.what: finding.where for finding in check(f"folder:{folder}")[1]}
    assert set(found) == {
        "says that a name may be burnt into its pixels",
        "no window in it, so all of its range is shown",
    }
    images_of = imagesets.find(str(folder))
    seen = imagesets.survey(images_of, tmp_path / "cache")
    assert seen.columns["size"].tolist() == [[64, 64]] * 4 and set(seen.columns["kind"].tolist()) == {2}
    for main, words in ((doctor.main, ["check", folder]), (evaluate.main, [
        "--real", folder, "--fake", folder, "--metrics", "colour", "--intervals", "no", "--out", tmp_path / "out",
        "--cache", tmp_path / "cache",
    ])):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["x.py", *map(str, words)])
        main()
    said = capsys.readouterr()
    everything = (
        said.out
        + said.err
        + "".join(
            path.read_text(errors="replace")
            for path in tmp_path.rglob("*")
            if path.suffix in (".json", ".html", ".jsonl")
        )
    )
    assert len(everything) > 5000 and "Secret" not in everything and "19700101" not in everything


def test_without_pydicom_a_file_says_what_to_install(folder, monkeypatch, capsys):
    """At once, and not when training comes to it."""
    monkeypatch.setattr(dicom, "find_spec", lambda name: None)
    told = rf"{folder / '0.dcm'}: DICOM is read by pydicom, which is not installed: pip install nanomed\[dicom\]"
    with pytest.raises(DataError, match=told):
        data.load(f"folder:{folder}")
    with pytest.raises(DataError, match=told):
        images.open_rgb(folder / "0.dcm")
    bad = [finding.where for finding in check(f"folder:{folder}")[1] if finding.what == "cannot be read"]
    assert len(bad) == 4 and all("pip install nanomed[dicom]" in where for where in bad)
    with pytest.raises(DataError, match=r"4 of 4 images cannot be read.*nanomed\[dicom\]"):
        found = imagesets.find(str(folder))
        imagesets.sound(found, imagesets.survey(found, folder.parent / "cache"), skip_bad=False)

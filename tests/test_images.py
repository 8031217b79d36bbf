"""Image files: every mode comes out as stated, everything damaged or hostile is refused, and the papers' transforms
are torchvision's to the byte."""

import io
import os
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from nanomed.data import images
from nanomed.data.table import DataError

X, Y = np.meshgrid(np.arange(16), np.arange(16))
RAMP = (16 * Y + X).astype(np.uint8)  # 0 .. 255, each once
COLORS = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)


def read(path) -> np.ndarray:
    image = images.open_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey(values) -> np.ndarray:
    return np.repeat(np.asarray(values, float)[..., None], 3, -1)


# -------------------------------------------------------------------------------------------------------------- modes


def over_black(color, alpha):
    return color.astype(float) * alpha.astype(float)[..., None] / 255


def cmyk(c, m, y, k):
    """What is left of white under each ink."""
    return np.stack([(255 - k) * (255 - ink) / 255 for ink in (c, m, y)], -1)


def ycbcr(y, cb, cr):
    """JFIF 1.02, section 7."""
    cb, cr = cb - 128.0, cr - 128.0
    return np.clip(np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1), 0, 255)


def lab(lightness, a, b):
    """CIE L*a*b* with the white of D50, to sRGB by the Bradford-adapted matrix and the sRGB curve."""
    fy = (lightness / 255 * 100 + 16) / 116
    f = np.stack([fy + (a - 128.0) / 500, fy, fy - (b - 128.0) / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.96422, 1.0, 0.82521)
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(xyz @ np.array(matrix).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def with_palette(transparency=None):
    image = Image.fromarray(RAMP, "L").convert("P")
    image.putpalette(COLORS.reshape(-1, 3).tobytes())
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


DARK = RAMP.astype(float) / 2 + 64
FULL = (RAMP.astype(np.uint16) * 257).astype(np.uint16)
KEYED = np.where((COLORS == COLORS[3, 3]).all(-1)[..., None], 0, COLORS)
GOLDEN = {  # name: (an image, the format it is kept in, the pixels it must have, how far rounding may lead)
    "1": (Image.fromarray(RAMP > 100), "PNG", grey((RAMP > 100) * 255), 0),
    "L": (Image.fromarray(RAMP), "PNG", grey(RAMP), 0),
    "LA": (Image.merge("LA", [Image.fromarray(RAMP.T.copy()), Image.fromarray(RAMP)]), "PNG",
           over_black(grey(RAMP.T), RAMP), 1),
    "P": (with_palette(), "PNG", COLORS, 0),
    "P, one color transparent": (with_palette(51), "PNG", KEYED, 0),
    "P, an alpha for each color": (with_palette(bytes(range(255, -1, -1))), "PNG", over_black(COLORS, 255 - RAMP), 1),
    "RGB": (Image.fromarray(COLORS), "PNG", COLORS, 0),
    "RGB, one color transparent": (Image.fromarray(COLORS), "PNG", KEYED, 0),
    "RGBA": (Image.fromarray(np.dstack([COLORS, RAMP])), "PNG", over_black(COLORS, RAMP), 1),
    "CMYK": (Image.merge("CMYK", [Image.fromarray(c.copy()) for c in (*np.moveaxis(COLORS, -1, 0), RAMP // 3)]), "TIFF",
             cmyk(*np.moveaxis(COLORS.astype(float), -1, 0), RAMP // 3), 1),
    "YCbCr": (Image.fromarray(COLORS, "YCbCr"), "TIFF", ycbcr(*np.moveaxis(COLORS.astype(float), -1, 0)), 2),
    "LAB": (Image.merge("LAB", [Image.fromarray(c.astype(np.uint8)) for c in (DARK, 120 + X, 120 + Y)]), "TIFF",
            lab(DARK.astype(np.uint8).astype(float), 120.0 + X, 120.0 + Y), 2),
    "I;16": (Image.fromarray(FULL), "PNG", grey(RAMP), 0),
    "I;16B": (Image.frombytes("I;16B", (16, 16), FULL.astype(">u2").tobytes()), "TIFF", grey(RAMP), 0),
    "I to 65535": (Image.fromarray(FULL.astype(np.int32)), "TIFF", grey(RAMP), 0),
    "I to 255": (Image.fromarray(RAMP.astype(np.int32)), "TIFF", grey(RAMP), 0),
    "I beyond": (Image.fromarray(RAMP.astype(np.int32) * 1000 - 5000), "TIFF", grey(RAMP), 0),
    "F in [0, 1]": (Image.fromarray((RAMP / 510).astype(np.float32)), "TIFF", grey(RAMP / 2), 0.5),
    "F of a wider range": (Image.fromarray((RAMP * 3.0 - 7).astype(np.float32)), "TIFF", grey(RAMP), 0),
    "F just above 1": (Image.fromarray((RAMP / 254).astype(np.float32)), "TIFF", grey(RAMP), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_pixels_of_every_mode(tmp_path, name):
    image, kind, expected, tolerance = GOLDEN[name]
    path = tmp_path / f"x.{kind.lower()}"
    key = {"transparency": tuple(COLORS[3, 3].tolist())} if name == "RGB, one color transparent" else {}
    image.save(path, format=kind, **key)
    with Image.open(path) as stored:  # the file holds the mode that the test is about
        assert stored.mode == name.split()[0].strip(",")
    error = np.abs(read(path) - expected)
    assert error.max() <= tolerance + 0.5 * bool(tolerance), error.max()


def test_sixteen_bits_keep_their_greys(tmp_path):
    """Pillow's own conversion to RGB clips 99.6 % of this ramp to white."""
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "r.png")
    pixels = read(tmp_path / "r.png")
    assert len(np.unique(pixels)) >= 250 and pixels.min() == 0 and pixels.max() == 255


def test_pixels_that_are_no_number_are_black_and_spoil_no_other(tmp_path):
    values = (RAMP / 255).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "n.tif")
    pixels = read(tmp_path / "n.tif")
    assert pixels[0, 0, 0] == 0 and pixels[0, 1, 0] == 255 and pixels[0, 2, 0] == 0
    assert (pixels[1:] == grey(RAMP)[1:]).all()


def test_cmyk_jpegs_are_not_inverted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    red, green, blue = read(tmp_path / "c.jpg")[4, 4]
    assert red > 200 and green < 60 and blue < 60


STORED = {  # how a camera stores an upright picture under each EXIF orientation (TIFF 6.0, tag 274)
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
def test_exif_orientation_is_obeyed(tmp_path, suffix, orientation):
    upright = np.random.default_rng(0).integers(0, 255, (2, 3, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    path, exif = tmp_path / f"o.{suffix}", Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(path, exif=exif, **options)
    assert np.abs(read(path) - upright).max() <= (3 if suffix == "jpg" else 0)  # a JPEG of constant 8 x 8 blocks


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0))]
    for name in ("a.png", "a.webp", "a.tif"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "w" in name else {})
        )
        assert (read(tmp_path / name) == (255, 0, 0)).all()


# ------------------------------------------------------------------------------------------------- damage and malice


def encoded(suffix: str, size: int = 48) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_truncated_files_are_named(tmp_path, suffix):
    content = encoded(suffix)
    for i in range(20):
        cut = tmp_path / f"cut{i}.{suffix}"
        cut.write_bytes(content[: i * (len(content) - 40) // 19])
        with pytest.raises(DataError, match=cut.name) as error:
            images.open_rgb(cut)
        assert "\n" not in str(error.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.filterwarnings("ignore")  # Pillow comments on the TIFF tags it meets
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_any_bytes_give_an_image_or_a_data_error(tmp_path, suffix):
    """Flipped bytes, mostly in the header where sizes and offsets are."""
    rng, content, path = random.Random(0), encoded(suffix, 16), tmp_path / f"x.{suffix}"
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 8])):
            changed[rng.randrange(min(len(changed), rng.choice([64, len(changed)])))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            assert images.open_rgb(path).mode == "RGB"
        except DataError as error:
            assert str(path) in str(error)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), *chunks, (b"IEND", b""))
    packed = [struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_bombs_are_refused_by_their_header(tmp_path):
    """0.2 s of CPU each, and no allocation: the size is read before any pixel."""
    jpeg = bytearray(encoded("jpg"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 65500, 65500)
    bombs = {
        "65535.png": png(65535, 65535),
        "14000.png": png(14000, 14000, (b"IDAT", zlib.compress(bytes(1000)))),
        "8001.png": png(8001, 8001, (b"IDAT", zlib.compress(bytes(1000)))),  # below the limit of Pillow itself
        "65500.jpg": bytes(jpeg),
    }
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
        start = time.process_time()
        with pytest.raises(DataError, match=f"{name}: more than 64,000,000 pixels"):
            images.open_rgb(tmp_path / name)
        assert time.process_time() - start < 0.2, name


def test_other_bombs_cost_little(tmp_path):
    """100 MB of compressed text is refused, the first of 10,000 frames is read, a thin strip is no bomb: 0.2 s each."""
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 1))
    pixel = zlib.compress(b"\0\1\2\3")
    frame = struct.pack(">IIIIHHBB", 1, 1, 0, 0, 1, 10, 0, 0)
    frames = [(b"acTL", struct.pack(">II", 10_000, 0)), (b"fcTL", struct.pack(">I", 0) + frame), (b"IDAT", pixel)]
    for i in range(1, 10_000):
        frames.append((b"fcTL", struct.pack(">I", 2 * i - 1) + frame))
        frames.append((b"fdAT", struct.pack(">I", 2 * i) + pixel))
    files = {
        "text.png": png(1, 1, text, (b"IDAT", pixel)),
        "after.png": png(1, 1, (b"IDAT", pixel), text),
        "frames.png": png(1, 1, *frames),
        "strip.png": png(30000, 1, (b"IDAT", zlib.compress(bytes(90001)))),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        start = time.process_time()
        if name in ("text.png", "after.png"):
            with pytest.raises(DataError, match=name):
                images.open_rgb(tmp_path / name)
        else:
            read(tmp_path / name)
        assert time.process_time() - start < 0.2, name


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_pipes_devices_folders_and_disguises_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "g.gif")
    (tmp_path / "g.gif").rename(tmp_path / "g.png")
    (tmp_path / "page.png").write_text("<html>404</html>")
    (tmp_path / "empty.png").write_bytes(b"")
    refused = {
        "pipe.png": "not a regular file", "null.png": "not a regular file", "folder.png": "not a regular file",
        "circle.png": "damaged", "g.png": "not a PNG", "page.png": "not a PNG", "empty.png": "not a PNG",
        "absent.png": "no such file", "x" * 300 + ".png": "damaged",
    }  # fmt: skip
    for name, message in refused.items():
        with pytest.raises(DataError, match=f"{name}: {message}"):
            images.open_rgb(tmp_path / name)


# -------------------------------------------------------------------------------------------------------------- names


@pytest.fixture
def fenced(tmp_path):
    """A folder `in` with links to its inside and its outside, and a secret beside it."""
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "a.png").write_bytes(b"x")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "circle").symlink_to(root / "circle")
    (root / "within.png").symlink_to(root / "a.png")
    return root


@pytest.mark.parametrize("name", [
    "../secret.png", "/etc/passwd", "C:\\x", "C:x", "a/../../b", "sub/../../secret.png", "a\0b", "~", "~/x", "", "..",
    "..\\x", "out.png", "up/secret.png", "circle/x", "x" * 300,
])  # fmt: skip
def test_names_that_leave_the_folder_are_refused(fenced, name):
    for call in (lambda: images.inside(fenced, name), lambda: images.find(name, (fenced,))):
        with pytest.raises(DataError) as error:
            call()
        assert "\n" not in str(error.value)


def test_no_generated_name_reaches_outside(fenced, tmp_path):
    rng, accepted = random.Random(0), 0
    pieces = ["..", "/", "a.png", ".", "\\", "~", "C:", "\0", "sub", "up", "secret.png", "out.png", "circle", " ", "é"]
    for _ in range(2000):
        name = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 7)))
        try:
            path = images.inside(fenced, name)
        except DataError:
            continue
        accepted += 1
        assert "circle" in name or path.resolve().is_relative_to(fenced.resolve()), name
    assert 100 < accepted < 1500


def test_links_that_stay_inside_are_followed(fenced):
    assert images.find("within.png", (fenced,)) == fenced / "within.png"
    assert images.find("a", (fenced / "sub", fenced)) == fenced / "a.png"


def test_names_that_no_disk_can_hold_are_not_found(fenced):
    """JSON can write half a character."""
    with pytest.raises(DataError, match=r"no image '\\ud800.png'"):
        images.find("\ud800.png", (fenced,))


def test_a_listing_refuses_links_out_and_skips_hidden_files(fenced):
    (fenced / "._a.png").write_bytes(b"x")
    problems = []
    assert images.listing(fenced, "*", problems) == [fenced / "a.png", fenced / "within.png"]
    assert len(problems) == 1 and "out.png" in str(problems[0])
    with pytest.raises(DataError, match="out.png"):
        images.listing(fenced, "*")


# --------------------------------------------------------------------------------------------------------- transforms


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(40, 20), (20, 41), (33, 20), (35, 20), (37, 20), (24, 24)])
def test_square_crops_and_squashing_are_torchvisions(size):
    from torchvision import transforms as reference

    image, side = noise(*size), min(size)
    centre = reference.Compose([reference.CenterCrop(side), reference.Resize(16)])
    assert np.array_equal(images.msdm_valid(image, 16), np.asarray(centre(image)))
    assert np.array_equal(images.squash(image, 16), np.asarray(reference.Resize((16, 16))(image)))


@pytest.mark.parametrize("size", [(5, 2), (2, 5), (6, 2), (3, 3)])
def test_padding_is_black_with_the_odd_pixel_right_or_below(size):
    from torchvision.transforms import functional as reference

    image = noise(*size)
    (width, height), side = size, max(size)
    left, top = (side - width) // 2, (side - height) // 2
    expected = reference.pad(image, [left, top, side - width - left, side - height - top])
    assert np.array_equal(np.asarray(images.padded(image)), np.asarray(expected))


def test_the_training_transform_is_torchvisions():
    """The same crop, order and factors: the same bytes."""
    from torchvision.transforms import functional as reference

    image = noise(31, 24)
    ours = images.msdm_train(image, 16, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    left, top = int(rng.integers(31 - 24 + 1)), int(rng.integers(1))
    expected = reference.resize(reference.crop(image, top, left, 24, 24), 16)
    apply = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation)
    for i in rng.permutation(3):
        expected = apply[i](expected, rng.uniform(0.6, 1.4))
    assert np.array_equal(ours, np.asarray(expected)) and ours.shape == (16, 16, 3)


def test_jitter_spreads_as_torchvisions():
    """Mean and spread of a grey image's brightness over 2,000 draws: U(0.6, 1.4) twice over (contrast and saturation
    leave a constant grey alone), so mean 1 and standard deviation 0.8 / sqrt(12)."""
    image = Image.new("RGB", (4, 4), (100, 100, 100))
    rng = np.random.default_rng(0)
    values = np.array([np.asarray(images.color_jitter(image, rng)).mean() / 100 for _ in range(2000)])
    assert values.mean() == pytest.approx(1, abs=0.02) and values.std() == pytest.approx(0.8 / 12**0.5, rel=0.05)
    assert values.min() >= 0.59 and values.max() <= 1.41


def test_random_crops_reach_both_edges():
    image = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (20, 1, 3)))
    rng, lefts = np.random.default_rng(0), set()
    for _ in range(300):
        state = rng.bit_generator.state
        images.msdm_train(image, 20, rng)
        again = np.random.default_rng()
        again.bit_generator.state = state
        lefts.add(int(again.integers(21)))
    assert lefts == set(range(21))


def test_unit_range():
    unit = images.to_unit(np.array([[[0, 51, 255]]], np.uint8))
    assert unit.shape == (3, 1, 1) and unit.flatten().tolist() == pytest.approx([-1, -0.6, 1], abs=1e-6)

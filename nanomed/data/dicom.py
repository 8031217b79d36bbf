"""DICOM files to greys and colours, where pydicom is installed (`pip install nanomed[dicom]`).

stored      whole numbers of BitsStored bits below HighBit, or floats
rescaled    stored * RescaleSlope + RescaleIntercept, or by a Modality LUT Sequence (PS3.3 C.11.1)
shown       through the first window by its VOI LUT Function, else through a VOI LUT Sequence (C.11.2), else all
            that the stored bits can mean, from black to white
inverted    MONOCHROME1, whose least value is white (C.7.6.3.1.2)

Only the tags below are ever parsed, so no name, date or identifier of a patient can come into a prompt, a log or a
message. One frame a file: more are refused, and so are enhanced objects, whose windows lie in other places.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nanomed.data.table import DataError

SUFFIX = ".dcm"
TAGS = [
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
    "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter",
    "WindowWidth", "VOILUTFunction", "VOILUTSequence", "BurnedInAnnotation", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "PixelData", "FloatPixelData", "DoubleFloatPixelData",
]  # fmt: skip
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # which pydicom hands on as RGB


@dataclass(frozen=True)
class Header:
    """What a file says of its image, besides the pixels."""

    size: tuple[int, int]  # width and height
    grey: bool
    bits: int  # that are used
    windowed: bool  # whether the file says what to show
    burnt_in: bool  # whether it says that names may stand in the pixels


@dataclass(frozen=True)
class Picture:
    """`values` (H, W), float64 after rescaling, `greys` (H, W) of them in 0 .. 255 as the file wants them shown; or
    uint8 colours (H, W, 3) and no greys. `inverted`: white is the least value, in `greys` too."""

    values: np.ndarray
    greys: np.ndarray | None = None
    inverted: bool = False


def installed() -> bool:
    """Whether files can be read at all."""
    return find_spec("pydicom") is not None


def header(path: Path) -> Header:
    """What a file says of its image; DataError where it is none that is read here."""
    with _named(path):
        found = _opened(path, pixels=False)
        return Header(
            (int(found.Columns), int(found.Rows)),
            found.PhotometricInterpretation in GREY,
            int(found.get("BitsStored") or 32),
            _has_window(found) or bool(found.get("VOILUTSequence")),
            str(found.get("BurnedInAnnotation", "")).upper() == "YES",
        )


def read(path: Path, most: int) -> Picture:
    """The pixels of a file; DataError, naming it, where they cannot be had. `most` pixels are read."""
    with _named(path):
        found = _opened(path)
        if int(found.Rows) * int(found.Columns) > most:
            raise DataError(f"more than {most:,} pixels; make it smaller")
        stored = _decoded(found)
        if found.PhotometricInterpretation in COLOUR:
            if stored.dtype != np.uint8:
                raise DataError(f"colours of {found.BitsStored} bits; 8 are read")
            return Picture(stored)
        values = rescaled(_used(stored, found), found)
        return Picture(values, shown(values, found), found.PhotometricInterpretation == "MONOCHROME1")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is wrong within, with the file's name before it. Of errors that are not from here the kind is told and no
    word, for it may quote the file."""
    if not installed():
        raise DataError(f"{path}: DICOM is read by pydicom, which is not installed: pip install nanomed[dicom]")
    import pydicom

    warnings.filterwarnings("ignore", module=r"pydicom\.")  # they may quote it, too
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except pydicom.errors.InvalidDicomError:
        raise DataError(f"{path}: not a DICOM file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from None
    except Exception as error:
        raise DataError(f"{path}: damaged DICOM file ({type(error).__name__}); get the file again") from None


def _opened(path: Path, pixels: bool = True) -> Any:
    """The tags of a file that holds one still image."""
    import pydicom

    if path.exists() and not path.is_file():
        raise DataError("not a regular file")
    found = pydicom.dcmread(path, specific_tags=TAGS, stop_before_pixels=not pixels)
    kind = str(found.get("PhotometricInterpretation", ""))
    if not kind or found.get("Rows") is None or found.get("Columns") is None:
        raise DataError("a DICOM file without an image; leave it out")
    if (frames := int(found.get("NumberOfFrames") or 1)) > 1:
        raise DataError(f"{frames} frames; export the one that is meant as a file of its own")
    if "SharedFunctionalGroupsSequence" in found or "PerFrameFunctionalGroupsSequence" in found:
        raise DataError("an enhanced, multi-frame object; export the frame that is meant as a file of its own")
    if kind not in (*GREY, *COLOUR):
        raise DataError(f"{kind if kind.isprintable() else 'what it holds'} is not read; export it as RGB")
    return found


def _decoded(found: Any) -> np.ndarray:
    """Stored values (H, W), or colours (H, W, 3)."""
    from pydicom.pixels import get_decoder, pixel_array

    syntax = getattr(found.file_meta, "TransferSyntaxUID", None)
    if syntax is None:
        raise DataError("says no transfer syntax, so its pixels have no meaning; get the file again")
    try:
        if get_decoder(syntax).is_available:
            return pixel_array(found, correct_unused_bits=False)  # which would cut off values at the upper end
    except (NotImplementedError, RuntimeError):  # nothing knows the format; or not this kind of it
        pass
    name = syntax.name if syntax.name != str(syntax) else "nothing that is known"
    raise DataError(
        f"compressed as {name}, and no decoder that is installed reads it; "
        f"pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or export it uncompressed"
    )


# ----------------------------------------------------------------------------------------------------- the arithmetic


def _used(stored: np.ndarray, found: Any) -> np.ndarray:
    """Stored values without the bits beside them, where old files keep overlays; the sign is that of the highest."""
    allocated, used = int(found.BitsAllocated), int(found.get("BitsStored", 0))
    if stored.dtype.kind not in "iu" or allocated != 8 * stored.itemsize or not 0 < used < allocated:
        return stored
    above = allocated - 1 - int(found.get("HighBit", used - 1))
    if not 0 <= above <= allocated - used:
        raise DataError("its high bit has no meaning")
    return (stored << above) >> (allocated - used)


def rescaled(stored: np.ndarray, found: Any) -> np.ndarray:
    """PS3.3 C.11.1: stored values to those that windows speak of, such as Hounsfield units; float64."""
    if tables := found.get("ModalityLUTSequence"):
        return _looked_up(stored, tables[0])[0]
    return stored.astype(np.float64) * float(found.get("RescaleSlope", 1)) + float(found.get("RescaleIntercept", 0))


def shown(values: np.ndarray, found: Any) -> np.ndarray:
    """Rescaled values to 0 .. 255 as a file wants them shown; not yet inverted."""
    if _has_window(found):
        centre, width = (float(np.ravel(found[tag].value)[0]) for tag in ("WindowCenter", "WindowWidth"))
        return windowed(values, centre, width, str(found.get("VOILUTFunction") or "LINEAR"))
    if tables := found.get("VOILUTSequence"):
        looked_up, bits = _looked_up(values, tables[0])
        return looked_up * (255 / (2**bits - 1))
    if values.size and found.get("ModalityLUTSequence"):
        low, high = 0.0, 2.0 ** int(found.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    elif "PixelData" in found:
        used, signed = int(found.BitsStored), int(found.PixelRepresentation)
        ends = rescaled(np.array([-(2 ** (used - 1)), 2 ** (used - 1) - 1] if signed else [0, 2**used - 1]), found)
        low, high = ends.min(), ends.max()
    else:  # floats have no last value
        low, high = np.nanmin(values), np.nanmax(values)
    return (values - low) * (255 / max(high - low, 1e-12))


def windowed(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3: values to 0 .. 255 through a window.

    LINEAR         black at centre - 1/2 - (width - 1) / 2 and below, white above centre - 1/2 + (width - 1) / 2
    LINEAR_EXACT   the same with centre and width as they are
    SIGMOID        255 / (1 + exp(-4 (x - centre) / width))

    Raises DataError for a width that has no meaning, or another function.
    """
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise DataError("its VOI LUT function is none that is known")
    if not width > 0 or (function == "LINEAR" and width < 1):
        raise DataError(f"its window is {width:g} wide, which has no meaning")
    if function == "SIGMOID":
        return 255 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width == 0:
        return np.where(values <= centre, 0.0, 255.0)
    return np.clip((values - centre) / width + 0.5, 0, 1) * 255


def _has_window(found: Any) -> bool:
    return all(found.get(tag) not in (None, "") and np.size(found.get(tag)) for tag in ("WindowCenter", "WindowWidth"))


def _looked_up(values: np.ndarray, table: Any) -> tuple[np.ndarray, int]:
    """(values through a table of PS3.3 C.11.1.1, the bits of its entries): the first entry for all that lies below,
    the last one for all above."""
    count, first, bits = (int(number) for number in table.LUTDescriptor)
    entries = table.LUTData
    if isinstance(entries, bytes):
        entries = np.frombuffer(entries, "<u2" if len(entries) >= 2 * (count or 65536) else "u1")
    entries = np.asarray(entries, np.float64)[: count or 65536]
    return entries[np.clip(np.round(values.astype(np.float64)) - first, 0, len(entries) - 1).astype(int)], bits

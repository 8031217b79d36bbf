"""HAM10000 and sets like it: images and a metadata CSV with `image_id` and `dx`."""

from pathlib import Path

from nanomed.data.images import inside
from nanomed.data.table import DataError, Row, Table, column, read_csv

DIAGNOSES = {
    "akiec": "actinic keratosis", "bcc": "basal cell carcinoma", "bkl": "benign keratosis", "df": "dermatofibroma",
    "mel": "melanoma", "nv": "melanocytic nevus", "vasc": "vascular lesion", "scc": "squamous cell carcinoma",
}  # fmt: skip


def load(folder: str | Path) -> Table:
    """One row an image; the caption says the diagnosis and, where they are known, the place, age and sex."""
    folder = Path(folder).expanduser()
    found = sorted(folder.glob("*metadata*.csv")) or sorted(folder.glob("*.csv"))
    if not found:
        raise DataError(f"{folder}: no metadata CSV with image_id and dx")
    path = found[0]
    records = read_csv(path)
    if not records or not {"image_id", "dx"} <= records[0][1].keys():
        raise DataError(f"{path}:1: columns image_id and dx are needed")
    return Table("ham10000", tuple(_row(folder, path, line, record) for line, record in records))


def _row(folder: Path, path: Path, line: int, record: dict[str, str]) -> Row:
    name = record["image_id"]
    for place in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        try:
            files = [inside(place, candidate) for candidate in (f"{name}.jpg", f"{name}.png", name)]
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from None
        for file in files:
            if file.is_file():
                return Row(file, (_caption(record),), label=record["dx"])
    raise DataError(f"{path}:{line}: no image {name!r} in {folder}")


def _caption(record: dict[str, str]) -> str:
    caption = f"A dermoscopic image of {DIAGNOSES.get(record['dx'], record['dx'])}"

    def known(name: str) -> str:
        key = column(record, (name,))
        value = record[key].strip().lower() if key else ""
        return "" if value in ("", "unknown", "nan", "na") else value

    if place := known("localization"):
        caption += f" on the {place}"
    if age := known("age"):
        caption += f", age {age.removesuffix('.0')}"
    if sex := known("sex"):
        caption += f", {sex}"
    return caption

"""HAM10000 and sets like it: images and a metadata CSV with `image_id` and `dx`."""

from pathlib import Path

from nanomed.data.images import listing
from nanomed.data.table import DataError, Row, Table, column, read_csv, report

DIAGNOSES = {
    "akiec": "actinic keratosis", "ak": "actinic keratosis", "bcc": "basal cell carcinoma", "bkl": "benign keratosis",
    "df": "dermatofibroma", "mel": "melanoma", "nv": "melanocytic nevus", "vasc": "vascular lesion",
    "scc": "squamous cell carcinoma",
}  # fmt: skip


def load(folder: str | Path, problems: list[DataError] | None = None) -> Table:
    """One row an image; the caption says the diagnosis and, where they are known, the place, age and sex.

    Images lie in the folder or one folder below it. Several images of one lesion (`lesion_id`) are one group, which a
    split does not tear: 10,015 images of HAM10000 show 7,470 lesions. With `problems`, lines that cannot be used are
    noted there instead of raised, and left out.
    """
    folder = Path(folder).expanduser()
    found = [path for path in sorted(folder.glob("*metadata*")) if path.suffix in ("", ".csv", ".tab", ".tsv")]
    found = found or sorted(folder.glob("*.csv"))
    if not found:
        raise DataError(f"{folder}: no metadata CSV with image_id and dx")
    path = found[0]
    records = read_csv(path, problems)
    if not records or not {"image_id", "dx"} <= records[0][1].keys():
        raise DataError(f"{path}:1: columns image_id and dx are needed")

    files: dict[str, Path] = {}
    for file in listing(folder, "*", problems) + listing(folder, "*/*", problems):
        files.setdefault(file.name, file)
        files.setdefault(file.stem, file)
    rows = {}
    for line, record in records:
        name, group = record["image_id"].strip(), record.get("lesion_id", "")
        if name not in files:
            report(DataError(f"{path}:{line}: no image {name!r} in {folder} or a folder in it"), problems)
        elif files[name] in rows:
            report(DataError(f"{path}:{line}: {name} has a row above already"), problems)
        else:
            rows[files[name]] = Row(files[name], (_caption(record),), label=record["dx"], group=group)
    return Table("ham10000", tuple(rows.values()))


def _caption(record: dict[str, str]) -> str:
    caption = f"A dermoscopic image of {DIAGNOSES.get(record['dx'].lower(), record['dx'])}"

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

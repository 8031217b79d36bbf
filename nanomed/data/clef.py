"""ImageCLEFmed MEDVQA-GI: `images/` and a CSV with `Prompt;Filename`, one line for each prompt of an image.

The organisers' file is `prompt-gt.csv` (semicolons, CRLF, names with .jpg). The team's own files are comma-separated
`train_captions.csv` and `valid_captions.csv` with an optional column `Paraphrase` and names with or without .jpg.
"""

from pathlib import Path

from nanomed.data.images import inside
from nanomed.data.table import DataError, Row, Table, column, read_csv

NAMES = ("prompt-gt.csv", "train_captions.csv", "captions.csv")


def load(folder: str | Path) -> Table:
    """One row an image, its prompts in the order of the file. `folder` may also be the CSV itself."""
    folder = Path(folder).expanduser()
    if folder.is_file():
        path, folder = folder, folder.parent
    else:
        found = [folder / name for name in NAMES if (folder / name).is_file()]
        if not found:
            raise DataError(
                f"{folder}: none of {', '.join(NAMES)} is there; give the data set's folder or its CSV file"
            )
        path = found[0]
    records = read_csv(path)
    if not records:
        raise DataError(f"{path}: no rows below the header")
    first = records[0][1]
    prompt, name, other = (
        column(first, ("Prompt",)),
        column(first, ("Filename", "file_name")),
        column(first, ("Paraphrase",)),
    )
    if prompt is None or name is None:
        raise DataError(f"{path}:1: columns Prompt and Filename are needed, not {', '.join(first)}")

    images: dict[str, list[tuple[str, str]]] = {}
    lines: dict[str, int] = {}
    for line, record in records:
        key = record[name].strip()
        images.setdefault(key, []).append((record[prompt], record[other] if other else ""))
        lines.setdefault(key, line)
    rows = []
    for key, said in images.items():
        file = _find(folder, key, path, lines[key])
        rows.append(Row(file, tuple(p for p, _ in said), tuple(q for _, q in said) if other else ()))
    return Table("clef", tuple(rows))


def _find(folder: Path, name: str, path: Path, line: int) -> Path:
    """The image of a name, in `images/` or beside the CSV, with or without its suffix."""
    for root in (folder / "images", folder):
        for candidate in (name, f"{name}.jpg", f"{name}.jpeg", f"{name}.png"):
            try:
                file = inside(root, candidate)
            except DataError as error:
                raise DataError(f"{path}:{line}: {error}") from None
            if file.is_file():
                return file
    raise DataError(f"{path}:{line}: no image {name!r} in {folder / 'images'}")

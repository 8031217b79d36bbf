"""ImageCLEFmed MEDVQA-GI: `images/` and a CSV with `Prompt;Filename`, one line for each prompt of an image.

The organisers' file is `prompt-gt.csv` (semicolons, CRLF, names with .jpg). The team's own files are comma-separated
`train_captions.csv` and `valid_captions.csv` with an optional column `Paraphrase` and names with or without .jpg.
"""

from pathlib import Path

from nanomed.data.images import find
from nanomed.data.table import DataError, Row, Table, column, deeper, read_csv, report

NAMES = ("prompt-gt.csv", "train_captions.csv", "captions.csv", "metadata.csv")


def load(folder: str | Path, problems: list[DataError] | None = None) -> Table:
    """One row an image, its prompts in the order of the file. `folder` may also be the CSV itself.

    With `problems`, lines that cannot be used are noted there instead of raised, and left out.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        path, folder = folder, folder.parent
    else:
        found = [folder / name for name in NAMES if (folder / name).is_file()]
        if not found:
            raise DataError(
                f"{folder}: none of {', '.join(NAMES)} is there; give the data set's folder or its CSV file"
                + deeper(folder, NAMES)
            )
        path = found[0]
    records = read_csv(path, problems)
    if not records:
        raise DataError(f"{path}: no rows below the header")
    first = records[0][1]
    prompt, name, other = (
        column(first, ("Prompt", "text")),
        column(first, ("Filename", "file_name")),
        column(first, ("Paraphrase",)),
    )
    if prompt is None or name is None:
        raise DataError(f"{path}:1: columns Prompt and Filename are needed, not {', '.join(first)}")

    files: dict[str, Path | None] = {}  # a name is looked up once
    images: dict[Path, list[tuple[str, str]]] = {}
    for line, record in records:
        key = record[name].strip()
        if key not in files:
            files[key] = None
            try:
                files[key] = find(key, (folder / "images", folder))
            except DataError as error:
                report(DataError(f"{path}:{line}: {error}"), problems)
        if file := files[key]:
            said = record[prompt]
            images.setdefault(file, []).append((said, (record[other] if other else "") or said))
    rows = []
    for file, said in images.items():
        prompts, paraphrases = zip(*said)
        rows.append(Row(file, prompts, paraphrases if other and paraphrases != prompts else ()))
    return Table("clef", tuple(rows))

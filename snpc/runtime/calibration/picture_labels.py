"""Classes of the pictures in a folder, from a table."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration.file_sources import picture_files
from snpc.types import IntArray


def read_picture_labels(folder: Path, table: Path) -> IntArray:
    """[pictures]: the class of every picture in ``folder``, in the order in which ``load_calibration`` reads them.

    ``table``: a CSV whose first two columns are the picture's file name, relative to the folder, and its class, a
    number; a first row of headings is passed by. Raises UserError where it cannot be read, or lacks a picture.
    """
    pictures = picture_files(folder) if folder.is_dir() else []
    if not pictures:
        raise UserError(f"{folder}: --labels {table.name} has classes of pictures, and this is no folder of pictures")
    classes = dict(read_classes(table))
    names = [picture.relative_to(folder).as_posix() for picture in pictures]
    missing = [name for name in names if name not in classes]
    if missing:
        raise UserError(f"{table}: has no class of {missing[0]} ({len(missing)} of {len(names)} pictures of {folder})")
    return np.asarray([classes[name] for name in names], np.int64)


def read_classes(table: Path) -> list[tuple[str, int]]:
    """(file name, class) of every row."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {table}: cannot be read as a table ({error})") from None
    found = []
    for number, row in enumerate(rows, 1):
        if len(row) > 1 and row[1].strip().lstrip("-").isdecimal():
            found.append((row[0].strip(), int(row[1])))
        elif number > 1:
            raise UserError(f"{table}: row {number} is not a file name and a class: {','.join(row)[:60]}")
    return found

"""Rows from files, folders and the hub, one at a time: however large a source is, only a batch of it is in memory.

JSON arrays are the exception: JSON has no way to read half of one.
"""

import glob
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from megatron_gppo.config import SourceConfig
from megatron_gppo.data.errors import BadRowError, DataError

EXTENSIONS = (".jsonl", ".json", ".parquet", ".arrow")
KNOWN = ".jsonl, .json, .parquet or .arrow"
ROWS_PER_READ = 1000
UTF8_BOM = b"\xef\xbb\xbf"
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
SAVE_TO_DISK_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")  # Dataset.save_to_disk's own


class Row(NamedTuple):
    """A row as it was read."""

    place: str  # file and line or row, both from 1, for errors
    origin: str  # the source's name: the data_source of rows that have none
    fields: dict[str, Any]


def read_source(source: SourceConfig, field: str) -> Iterator[Row | BadRowError]:
    """The rows in the order of the files, and what cannot be read of them as errors that the caller raises or skips.

    field: the configuration's name of the source, for messages. Raises DataError when a file as a whole cannot be read.
    """
    if source.hub is not None:
        yield from _read_hub(source, field)
        return
    paths = files_of(source, field)
    assert source.path is not None
    folder = Path(source.path)
    for path in paths:
        origin = source.name or (folder.resolve().name if folder.is_dir() else path.stem)
        yield from _read_file(path, origin)


def files_of(source: SourceConfig, field: str) -> list[Path]:
    """The files that a path, folder or glob names, sorted. Raises DataError when there are none."""
    assert source.path is not None
    path = Path(source.path)
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = _files_in(path, source, field)
    else:
        paths = sorted(Path(match) for match in glob.glob(source.path, recursive=True) if Path(match).is_file())
        if not paths:
            raise DataError(f"{field} = {source.path}: no such file. Fix: give the path of an existing file or folder")
    for path in paths:
        if path.suffix not in EXTENSIONS:
            raise DataError(
                f"{field} = {path}: unknown extension {path.suffix!r}. Fix: convert it to {KNOWN}, or load it with "
                "`datasets` and save it as one"
            )
    return paths


def _files_in(folder: Path, source: SourceConfig, field: str) -> list[Path]:
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in EXTENSIONS
        and path.name not in SAVE_TO_DISK_FILES
        and not path.name.startswith("cache-")  # of Dataset.map
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise DataError(f"{field} = {folder}: no {KNOWN} file in this folder. Fix: give a folder that has some")
    by_split = {path: _split_of(path.relative_to(folder)) for path in paths}
    if source.split is not None:
        chosen = [path for path in paths if by_split[path] == source.split]
        if not chosen:
            raise DataError(
                f"{field} = {folder}: no file or folder in it is called {source.split}; there are "
                f"{', '.join(str(path.relative_to(folder)) for path in paths[:5])}. Fix: change split"
            )
        return chosen
    if len(splits := {split for split in by_split.values() if split is not None}) > 1:
        raise DataError(
            f"{field} = {folder}: holds several splits: {', '.join(sorted(splits))}. Fix: choose one, as "
            f"{{path: {folder}, split: {sorted(splits)[-1]}}}"
        )
    return paths


def _split_of(path: Path) -> str | None:
    """The split that a file's folders or name tell, as in test/0.parquet and test-00000-of-00002.parquet."""
    for part in path.parts:
        word = re.split(r"[-_.]", part)[0]
        if word in SPLITS:
            return word
    return None


def _read_file(path: Path, origin: str) -> Iterator[Row | BadRowError]:
    # IterableDataset reads the file itself, where load_dataset asks the hub first (and waits, where there is none).
    if path.suffix == ".parquet":
        return _read_tables(path, origin, datasets.IterableDataset.from_parquet, "Parquet")
    if path.suffix == ".arrow":
        return _read_tables(path, origin, datasets.IterableDataset.from_file, "Arrow stream")
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(UTF8_BOM).lstrip()
    # Whatever it is called: JSON lines under the name .json exist, and so do arrays under .jsonl.
    return _read_json_array(path, origin) if start.startswith(b"[") else _read_json_lines(path, origin)


def _read_json_lines(path: Path, origin: str) -> Iterator[Row | BadRowError]:
    # As lines of text, not with the JSON reader of `datasets`: that one loses line numbers, fails on blank lines,
    # turns answers that look like dates into timestamps, and lets a row's type depend on the other rows. As Latin-1,
    # which maps bytes to characters one to one, so that a line that is not UTF-8 spoils no other.
    lines = datasets.IterableDataset.from_text(glob.escape(str(path)), encoding="latin-1")
    for number, line in enumerate(lines, start=1):
        content = line["text"].encode("latin-1")
        if number == 1:
            content = content.removeprefix(UTF8_BOM)
        if not content.strip():
            continue
        place = f"{path}, line {number}"
        try:
            yield _row(place, origin, json.loads(content.decode()))
        except UnicodeDecodeError:
            yield BadRowError(place, "not valid UTF-8. Fix: save the file as UTF-8")
        except json.JSONDecodeError as error:
            yield BadRowError(place, f"not valid JSON ({error}). Fix: write one JSON object a line")
        except RecursionError:
            yield BadRowError(place, "nested too deeply. Fix: write each row as {...}")


def _read_json_array(path: Path, origin: str) -> Iterator[Row | BadRowError]:
    try:
        # What is not UTF-8 becomes lone surrogates inside of strings, which the schema refuses row by row.
        rows = json.loads(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{path}: not a valid JSON array ({error}). Fix: write one array of objects, or one object a line"
        ) from None
    for number, fields in enumerate(rows, start=1):
        yield _row(f"{path}, row {number}", origin, fields)


def _row(place: str, origin: str, fields: Any) -> Row | BadRowError:
    if not isinstance(fields, dict):
        return BadRowError(place, f"holds {kind(fields)}, not an object. Fix: write each row as {{...}}")
    return Row(place, origin, fields)


def _read_tables(path: Path, origin: str, reader: Any, form: str) -> Iterator[Row | BadRowError]:
    numbers = itertools.count(1)
    try:
        rows = reader(glob.escape(str(path)) if form == "Parquet" else str(path))
        for table in rows.with_format("arrow").iter(batch_size=ROWS_PER_READ):
            for fields in _rows_of(table):
                number = next(numbers)
                place = f"{path}, row {number}"
                if fields is None:
                    yield BadRowError(place, "not valid UTF-8. Fix: write the file again from valid text")
                else:
                    yield Row(place, origin, fields)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise DataError(f"{path}: not a readable {form} file ({error}). Fix: write or copy it again") from error


def _rows_of(table: Any) -> list[dict[str, Any] | None]:
    """A pyarrow table's rows; None for one that holds text that is not UTF-8, which only reading it reveals."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        if table.num_rows == 1:
            return [None]
        return [row for index in range(table.num_rows) for row in _rows_of(table.slice(index, 1))]


def _read_hub(source: SourceConfig, field: str) -> Iterator[Row]:
    assert source.hub is not None
    split = source.split or "train"
    origin = source.name or source.hub.rpartition("/")[2]
    try:
        rows = datasets.load_dataset(source.hub, source.subset, split=split, streaming=True)
        for number, fields in enumerate(rows, start=1):
            yield Row(f"hub {source.hub}, split {split}, row {number}", origin, fields)
    except (OSError, ValueError) as error:  # what `datasets` raises where it has no network, data set, subset or split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{field}.hub = {source.hub}, split {split}: cannot be read ({reason}). Fix: correct hub, subset and split; "
            "without a connection, download it elsewhere and set path instead"
        ) from error


def kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null" if value is None else f"of type {type(value).__name__}")

"""Read the rows of a data set, whatever it is stored in, as mappings.

JSONL, JSON and Parquet files, a saved `datasets` directory, a data set of the hub, or rows that are in memory already.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_home.errors import DataError

from .problems import RowError

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, object]
_DATASET_FILES = ("state.json", "dataset_dict.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one source."""

    name: str
    """The file's stem, or what else names the source; rows without a `source` column get it."""
    folder: Path | None
    """Where relative image paths begin; None: in the working directory."""
    rows: Iterable[tuple[int, Row | RowError]]
    """(number from 0, the row or why it could not be read)."""


def read_rows(source: "str | os.PathLike[str] | Sequence[Row] | Dataset") -> Rows:
    """Open a source; files are read while `rows` is iterated.

    Args:
        source: a .jsonl, .json or .parquet file; a directory that `Dataset.save_to_disk` wrote; the id of a data set on
            the hub, as "name" or "name:split" (default: its `train` split); a `datasets.Dataset`; or a list of rows.
    Raises:
        DataError: there is no such file, or it is of none of these kinds.
    """
    if isinstance(source, (str, os.PathLike)):
        path, split = _existing(os.fspath(source))
        if path is None:
            return _hub_rows(os.fspath(source))
        if path.is_dir():
            return _saved_rows(path, split)
        if path.suffix not in _READERS:
            raise DataError(f"{path}: expected a file that ends in {', '.join(_READERS)}, found {path.suffix!r}.")
        return Rows(name=path.stem, folder=path.parent, rows=_READERS[path.suffix](path))
    if hasattr(source, "cast_column"):
        return Rows(name=_dataset_name(source), folder=None, rows=_dataset_rows(source))
    if isinstance(source, Sequence):
        return Rows(name="rows", folder=None, rows=starmap(_checked_row, enumerate(source)))
    raise DataError(
        f"rows come as a {type(source).__name__}. Expected a path, the id of a data set, a list of mappings or a "
        "datasets.Dataset."
    )


def _existing(text: str) -> tuple[Path | None, str | None]:
    """The path `text` names, and the split after its last colon, if there is one."""
    path = Path(text).expanduser()
    if path.exists():
        return path, None
    stem, _, split = text.rpartition(":")
    if stem and Path(stem).expanduser().is_dir():
        return Path(stem).expanduser(), split
    if path.suffix in _READERS or text.startswith((".", "/", "~")):
        raise DataError(f"{text}: no such file.")
    return None, None


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row | RowError]]:
    with path.open("rb") as lines:
        for index, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # also bytes that are no UTF-8
                yield index, RowError("not JSON", str(error))
            else:
                yield _checked_row(index, row)


def _read_json(path: Path) -> Iterator[tuple[int, Row | RowError]]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, found a {type(rows).__name__}. One row per line is .jsonl.")
    yield from starmap(_checked_row, enumerate(rows))


def _read_parquet(path: Path) -> Iterator[tuple[int, Row | RowError]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f'{path}: Parquet needs pyarrow. Install it with `pip install "metis_home[train]"`.') from error
    try:
        with parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield index, row
                    index += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _saved_rows(path: Path, split: str | None) -> Rows:
    if not any((path / name).exists() for name in _DATASET_FILES):
        raise DataError(
            f"{path}: is a directory without {' or '.join(_DATASET_FILES)}. Expected one that Dataset.save_to_disk "
            "wrote; pass a .jsonl, .json or .parquet file itself."
        )
    found = _datasets().load_from_disk(str(path))
    dataset = _one_split(found, split, str(path))
    return Rows(name=path.name, folder=path, rows=_dataset_rows(dataset))


def _hub_rows(name: str) -> Rows:
    name, _, split = name.partition(":")
    datasets = _datasets()
    try:
        found = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: neither a file nor a data set that can be loaded: {error}") from error
    return Rows(name=name.rsplit("/")[-1], folder=None, rows=_dataset_rows(_one_split(found, split or None, name)))


def _one_split(found: Any, split: str | None, name: str) -> Any:
    if not isinstance(found, dict):
        if split is not None:
            raise DataError(f"{name}: holds one data set without splits; asked for split {split!r}.")
        return found
    split = split or ("train" if "train" in found else None)
    if split not in found:
        raise DataError(f"{name}: has the splits {', '.join(found)}. Name one, as in {name}:{next(iter(found))}.")
    return found[split]


def _dataset_rows(dataset: Any) -> Iterator[tuple[int, Row | RowError]]:
    """The rows of a `datasets.Dataset`, images as files or bytes: they are decoded when they are needed."""
    datasets = _datasets()
    plain = datasets.Image(decode=False)
    for column, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, plain)
        elif isinstance(inner, datasets.Image):
            dataset = dataset.cast_column(column, [plain] if isinstance(feature, list) else type(feature)(plain))
    yield from enumerate(dataset)


def _dataset_name(dataset: Any) -> str:
    return getattr(getattr(dataset, "info", None), "dataset_name", None) or "rows"


def _checked_row(index: int, row: object) -> tuple[int, Row | RowError]:
    if isinstance(row, Mapping):
        return index, row
    return index, RowError("not a row", f"expected a mapping of columns, found a {type(row).__name__}")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError('data sets need `datasets`. Install it with `pip install "metis_home[train]"`.') from error
    return datasets


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}

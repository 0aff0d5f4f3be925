"""Records as the data set of a Trainer: encoded when they are asked for, and kept while memory allows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from ...errors import TrainingError
from ..data.records import Record, load_records

if TYPE_CHECKING:
    from ..data.encode import Encoder, Example

GIB = 2**30
Source = Sequence[Record] | Sequence[Mapping[str, object]] | str | Path


class RecordDataset(Dataset):
    """Rows `encoder.example(record)`, with `record_index` = the position in `records` (so several files may mix)."""

    def __init__(self, records: Sequence[Record], encoder: "Encoder", *, cache_gib: float = 0.0) -> None:
        self.records = records
        self.encoder = encoder
        self._room = int(cache_gib * GIB)
        self._kept: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> "Example":
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        example = replace(self.encoder.example(self.records[index]), record_index=index)
        size = _size(example)
        if size <= self._room:
            self._room -= size
            self._kept[index] = example
        return example

    def name(self, index: int) -> str:
        """The record's id, for messages."""
        return self.records[index].id


def as_records(source: Source) -> list[Record]:
    """A list of records from whatever a trainer was given.

    Raises:
        DataError: rows cannot be read. TrainingError: there is no row.
    """
    if isinstance(source, Sequence) and not isinstance(source, str) and all(isinstance(r, Record) for r in source):
        records = [record for record in source if isinstance(record, Record)]
    else:
        records = load_records(source)
    if not records:
        raise TrainingError("the data set has no rows: nothing to train or evaluate on.")
    return records


def _size(example: "Example") -> int:
    """Bytes, roughly: Python keeps 8 per list entry (small integers are shared), tensors say it themselves."""
    pixels = 0 if example.pixel_values is None else example.pixel_values.nbytes
    return pixels + 3 * 8 * len(example.input_ids)

"""Look at every row before anything is trained, and say of each bad one what is wrong with it."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from metis_home.errors import DataError, ProcessorError
from metis_home.media import ImageSource, image_size, load_image

from .conversation import image_sources, texts
from .encode import Encoder
from .formats import format_problem, is_blank, mode_name, split_response
from .problems import Problem, RowError, raise_problems
from .records import Record, scan_records
from .rows import Row

if TYPE_CHECKING:
    from datasets import Dataset

Purpose = Literal["sft", "rl", "evaluate", "prompts"]
# Tokens that would end a message, or stand for an image that is not there.
_RESERVED = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSummary:
    """Tokens of the rows that could be counted."""

    total: int
    images: int
    """Those of `total` that are image tokens."""
    longest: int
    longest_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What a check found."""

    rows: int
    problems: list[Problem]
    modes: dict[str, int] = field(default_factory=dict)
    """Rows per mode; "none" where a row does not say which branch should answer."""
    sources: dict[str, int] = field(default_factory=dict)
    tokens: TokenSummary | None = None
    """None where no encoder was given."""

    @property
    def bad_rows(self) -> int:
        """How many rows have a problem."""
        return len({problem.row for problem in self.problems})

    @property
    def reasons(self) -> dict[str, int]:
        """Problems per reason, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())

    def raise_if_bad(self) -> None:
        """Raise unless every row is good.

        Raises:
            DataError: lists every problem with row number, id and reason.
        """
        raise_problems(self.problems, self.rows)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "bad_rows": self.bad_rows, "reasons": self.reasons}


def check_source(
    source: "str | os.PathLike[str] | Sequence[Row] | Dataset",
    *,
    purpose: Purpose,
    encoder: Encoder | None = None,
    image_root: str | os.PathLike[str] | None = None,
    decode_images: bool = True,
) -> DataReport:
    """Read a data set and check it, rows that cannot even be read included; arguments as in `check_records`.

    Raises:
        DataError: the source itself cannot be read.
    """
    scan = scan_records(source, image_root=image_root)
    report = check_records(scan.records, purpose=purpose, encoder=encoder, decode_images=decode_images)
    return DataReport(
        rows=len(scan.records) + len(scan.problems),
        problems=sorted([*scan.problems, *report.problems], key=lambda problem: problem.row),
        modes=report.modes,
        sources=report.sources,
        tokens=report.tokens,
    )


def check_records(
    records: Sequence[Record], *, purpose: Purpose, encoder: Encoder | None = None, decode_images: bool = True
) -> DataReport:
    """Check everything that would stop a run, or spoil it without a word.

    Always: images that are missing or cannot be read, control tokens in texts, ids that occur twice. For `sft`: a missing
    response, an empty answer, tags that are not those of the row's mode. For `rl` and `evaluate`: a missing answer, and
    one (of several: any) that no prediction could be compared with; for `prompts`: neither. With an encoder: rows that
    exceed its `max_length`.

    Args:
        encoder: counts tokens; without it no row is too long.
        decode_images: decode every image once, which finds files that end early; else only their headers are read.
    Raises:
        DataError: `purpose` is none of the four.
    """
    if purpose not in get_args(Purpose):
        raise DataError(f"purpose must be {', '.join(get_args(Purpose))}; found {purpose!r}.")
    allow_remote = encoder is not None and encoder.processor.allow_remote_media
    broken = _broken_images(records, decode_images, allow_remote)
    problems, counts, first_row_of = [], {}, dict[str, int]()
    for record in records:
        found = [*_image_problems(record, broken), *_text_problems(record)]
        if purpose != "prompts":
            found += _response_problems(record) if purpose == "sft" else _gold_problems(record)
        if record.id in first_row_of:
            found.append(RowError("duplicate id", f"row {first_row_of[record.id]} has the id {record.id!r} too"))
        first_row_of.setdefault(record.id, record.index)
        if encoder is not None and not any(key in broken for key in _image_keys(record)):
            count = encoder.count(record)
            used = count.total if purpose == "sft" else count.prompt
            counts[record.index] = (used, count.images)
            if encoder.max_length is not None and used > encoder.max_length:
                what = "image tokens do not fit" if count.images > encoder.max_length else "too long"
                found.append(
                    RowError(what, f"{used} tokens ({count.images} of images), max_length {encoder.max_length}")
                )
        problems += [problem.at(record.index, record.id) for problem in found]
    return DataReport(
        rows=len(records),
        problems=problems,
        modes=dict(Counter("none" if record.mode is None else mode_name(record.mode) for record in records)),
        sources=dict(Counter(record.source for record in records)),
        tokens=_summary(counts),
    )


def _text_problems(record: Record) -> Iterator[RowError]:
    for text in [*texts(record.messages), *([record.response] if record.response else [])]:
        found = next((token for token in _RESERVED if token in text), None)
        if found is not None:
            yield RowError("control token", f"a text holds {found}, which the model would take for its own")
            return


def _response_problems(record: Record) -> Iterator[RowError]:
    if record.response is None:
        yield RowError(
            "no response", "expected response, or reasoning and answer, or an answer with mode non_thinking; found none"
        )
        return
    problem = format_problem(record.response, record.mode)
    if problem is not None:
        parts = split_response(record.response)
        blank = parts is not None and is_blank(parts.answer)
        yield RowError("empty answer" if blank else "wrong tags", problem)


def _gold_problems(record: Record) -> Iterator[RowError]:
    if not any(gold.strip() for gold in record.golds):
        yield RowError("empty answer", "expected a solution or an answer to compare with; found none")
        return
    from metis_home.training.judging import record_problem

    problem = record_problem(record)
    if problem is not None:
        yield RowError("unparseable gold", problem)


def _image_problems(record: Record, broken: dict[object, RowError]) -> Iterator[RowError]:
    for key in dict.fromkeys(_image_keys(record)):
        if key in broken:
            yield broken[key]


def _image_keys(record: Record) -> Iterator[object]:
    """What tells images apart: the path or address, else the object."""
    for source in image_sources(record.messages):
        yield source if isinstance(source, str) else id(source)


def _broken_images(records: Sequence[Record], decode: bool, allow_remote: bool) -> dict[object, RowError]:
    """What is wrong with each image that cannot be used; every file is looked at once."""
    sources = {
        key: source
        for record in records
        for key, source in zip(_image_keys(record), image_sources(record.messages), strict=True)
    }

    def problem_of(source: object) -> RowError | None:
        try:
            open_image = load_image if decode else image_size
            open_image(cast(ImageSource, source), allow_remote=allow_remote)
        except ProcessorError as error:
            return RowError(_image_reason(source), str(error))
        return None

    with ThreadPoolExecutor(_THREADS) as threads:  # Pillow decodes without the interpreter's lock
        found = zip(sources, threads.map(problem_of, sources.values()), strict=True)
        return {key: problem for key, problem in found if problem is not None}


def _image_reason(source: object) -> str:
    if isinstance(source, str) and not source.startswith("data:"):
        if "://" in source:
            return "remote image"
        if not Path(source).expanduser().exists():
            return "missing image"
    return "unreadable image"


def _summary(counts: dict[int, tuple[int, int]]) -> TokenSummary | None:
    if not counts:
        return None
    longest_row = max(counts, key=lambda row: counts[row][0])
    return TokenSummary(
        total=sum(used for used, _ in counts.values()),
        images=sum(images for _, images in counts.values()),
        longest=counts[longest_row][0],
        longest_row=longest_row,
    )

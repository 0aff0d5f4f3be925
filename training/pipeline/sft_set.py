"""From pass rates to the rows of Stage-SFT: what RL left open is taught, what it solved is left alone.

    p = 1        dropped, nothing to learn
    0 < p < 1    the model's own correct answers (self-distilled)
    p = 0        a stronger expert's answer, if it is correct
    and non-thinking rows mixed in by ratio

Source: Metis-RISE (arXiv 2506.13056) for the three cases; Metis-HOME (arXiv 2510.20519) for the non-thinking part, about
as many rows as thinking ones.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from metis_home.branch import Branch
from metis_home.errors import DataError

from ..data.conversation import texts
from ..data.formats import format_problem, mode_name
from ..data.records import write_rows
from ..evaluation.fingerprint import image_contents, question_fingerprint
from ..judging import verify_record
from .portable import portable_row

if TYPE_CHECKING:
    from ..data.records import Record

Pick = Literal["shortest", "all"]
BINS = 10


@dataclass(slots=True, kw_only=True)
class SftSetReport:
    """What became of every prompt."""

    prompts: int = 0
    without_rate: int = 0
    """Prompts without a pass rate: left out, where that is allowed."""
    solved: int = 0
    """p = 1: dropped."""
    sometimes: int = 0
    """0 < p < 1."""
    never: int = 0
    """p = 0."""
    unjudged: int = 0
    """No answer could be judged."""
    held_out: int = 0
    """Left out because `exclude` asks the same question about the same images."""
    self_distilled: int = 0
    """Rows of the model's own."""
    expert: int = 0
    """Rows of the expert's."""
    expert_missing: int = 0
    """Prompts with p = 0 for which the expert has no answer."""
    expert_wrong: int = 0
    """Prompts with p = 0 whose expert answers are all wrong."""
    expert_badly_formatted: int = 0
    """Prompts with p = 0 whose correct expert answers are all not strictly in the thinking format."""
    badly_formatted: int = 0
    """Correct answers of the model that are not strictly in the thinking format: not used."""
    duplicates: int = 0
    """Correct answers that say the same as another one of their prompt."""
    sometimes_without_row: int = 0
    """Prompts with 0 < p < 1 whose correct answers are all badly formatted."""
    non_thinking: int = 0
    """Non-thinking rows mixed in."""
    histogram: list[int] = field(default_factory=lambda: [0] * (BINS + 2))
    """Prompts by pass rate: p = 0, ten equal bins of (0, 1), p = 1."""
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)
    """{source: {solved, sometimes, never, self, expert}}."""

    @property
    def thinking(self) -> int:
        """Thinking rows, of either origin."""
        return self.self_distilled + self.expert

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.thinking + self.non_thinking


def read_pass_rates(paths: Sequence[Path]) -> dict[str, dict[str, object]]:
    """Read files of `metis-home pass-rates`, {id: line}.

    Raises:
        DataError: a file cannot be read, is something else, or an id has two lines.
    """
    found: dict[str, dict[str, object]] = {}
    for path in paths:
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: the pass rates cannot be read: {error}") from error
        place: dict[str, int] = {}
        for number, line in enumerate(lines, start=1):
            problem = _line_problem(line)
            if problem is not None:
                raise DataError(
                    f"{path}, line {number}: {problem}. This is no file of pass rates; expected what `metis-home "
                    "pass-rates` writes."
                )
            name = line["id"]
            if name in place:
                raise DataError(
                    f"{path}: lines {place[name]} and {number} both have the id {name!r}. Give every row its own id, "
                    "and sample again."
                )
            if name in found:
                raise DataError(f"{path}: id {name!r} has pass rates in another file already. Pass each file once.")
            place[name] = number
        found |= {line["id"]: line for line in lines}
    return found


def rated(
    records: "Sequence[Record]", rates: Mapping[str, Mapping[str, object]], *, partial: bool = False
) -> "list[Record]":
    """The records that have a pass rate, once it is sure that the rates are of these very questions and golds.

    Args:
        partial: some records may have none; else all must.
    Raises:
        DataError: records without a pass rate (none has one), or whose question, images or gold is not what was sampled.
    """
    found = [record for record in records if record.id in rates]
    missing = [record.id for record in records if record.id not in rates]
    if missing and not (partial and found):
        hint = " --partial leaves them out." if found else ""
        raise DataError(
            f"{len(missing)} of {len(records)} rows have no pass rate, the first is {missing[0]!r}. Were they sampled "
            f"from other data, or from a part of it?{hint}"
        )
    for what, differs in (
        ("gold", lambda record, line: line["answer"] != record.answer),
        ("question or image", lambda record, line: line["question"] != question_fingerprint(record)),
    ):
        other = [record for record in found if differs(record, rates[record.id])]
        if other:
            raise DataError(
                f"{len(other)} of {len(records)} rows have another {what} than the row of that id that was sampled, the "
                f"first is row {other[0].index} ({other[0].id}). Use the data that the pass rates are of, or sample again."
            )
    return found


def never_solved(
    records: "Sequence[Record]", rates: Mapping[str, Mapping[str, object]], *, partial: bool = False
) -> "list[Record]":
    """The records with p = 0: those an expert is asked about.

    Raises:
        DataError: as `rated`.
    """
    return [record for record in rated(records, rates, partial=partial) if rates[record.id]["pass_rate"] == 0]


def build_sft_set(
    records: "Sequence[Record]",
    rates: Mapping[str, Mapping[str, object]],
    out: Path,
    *,
    expert: Mapping[str, Sequence[str]] | None = None,
    non_thinking: "Sequence[Record]" = (),
    ratio: float = 1.0,
    pick: Pick = "shortest",
    exclude: "Sequence[Record]" = (),
    partial: bool = False,
    seed: int = 0,
) -> SftSetReport:
    """Write the rows of Stage-SFT to `out` (JSONL, by rename), shuffled by `seed`.

    Every row says where it is from: `origin` is self, expert or direct, `pass_rate` the prompt's.

    Args:
        records: the prompts, with their golds.
        rates: `read_pass_rates` of the same prompts.
        expert: {id: responses in the thinking format}, tried in order; the first correct one is taken.
        non_thinking: rows with a response in the non-thinking format.
        ratio: non-thinking rows per thinking row; Metis-HOME has about 1. All of them where there are fewer.
        pick: of several correct answers of its own, the shortest, or all that differ.
        exclude: held-out rows; a prompt that asks the same about the same images is left out.
        partial: prompts without a pass rate are left out; else they are an error.
    Raises:
        DataError: as `rated`; an image cannot be read; or nothing to write.
    """
    known = rated(records, rates, partial=partial)
    report = SftSetReport(prompts=len(records), without_rate=len(records) - len(known))
    held_out = {_question(record) for record in exclude}
    rows: list[dict[str, object]] = []
    for record in known:
        if _question(record) in held_out:
            report.held_out += 1
            continue
        rows += _thinking_rows(record, rates[record.id], expert or {}, pick, report, out)
    rows += _direct_rows(non_thinking, held_out, round(ratio * len(rows)), seed, report, out)
    if not rows:
        raise DataError(f"no row is left: {_sentence(report)}")
    random.Random(seed).shuffle(rows)
    write_rows(out, rows)
    return report


def _thinking_rows(
    record: "Record",
    line: Mapping[str, object],
    expert: Mapping[str, Sequence[str]],
    pick: Pick,
    report: SftSetReport,
    out: Path,
) -> list[dict[str, object]]:
    rate = line["pass_rate"]
    counts = report.by_source.setdefault(
        record.source, dict.fromkeys(("solved", "sometimes", "never", "self", "expert"), 0)
    )
    if rate is None:
        report.unjudged += 1
        return []
    assert isinstance(rate, int | float)
    report.histogram[_bin(rate)] += 1
    if rate == 1:
        report.solved += 1
        counts["solved"] += 1
        return []
    if rate > 0:
        report.sometimes += 1
        counts["sometimes"] += 1
        responses, origin = _own(line, pick, report), "self"
        report.self_distilled += len(responses)
        report.sometimes_without_row += not responses
    else:
        report.never += 1
        counts["never"] += 1
        responses, origin = _experts(record, expert.get(record.id, ()), report), "expert"
        report.expert += len(responses)
    counts[origin] += len(responses)
    named = len(responses) > 1
    return [
        {
            **portable_row(record, out),
            **({"id": f"{record.id}#{number}"} if named else {}),
            "response": response,
            "mode": mode_name(Branch.THINKING),
            "origin": origin,
            "pass_rate": rate,
        }
        for number, response in enumerate(responses)
    ]


def _own(line: Mapping[str, object], pick: Pick, report: SftSetReport) -> list[str]:
    completions = line["completions"]
    assert isinstance(completions, list)
    correct = [completion for completion in completions if completion["correct"]]
    tidy = [completion for completion in correct if format_problem(completion["text"], Branch.THINKING) is None]
    report.badly_formatted += len(correct) - len(tidy)
    distinct: dict[str, dict[str, object]] = {}
    for completion in sorted(tidy, key=lambda completion: (completion["tokens"], completion["text"])):
        distinct.setdefault(_normalised(completion["text"]), completion)
    report.duplicates += len(tidy) - len(distinct)
    chosen = [str(completion["text"]) for completion in distinct.values()]
    return chosen[:1] if pick == "shortest" else chosen


def _experts(record: "Record", responses: Sequence[str], report: SftSetReport) -> list[str]:
    correct = [response for response in responses if verify_record(response, record).correct]
    tidy = [response for response in correct if format_problem(response, Branch.THINKING) is None]
    report.expert_missing += not responses
    report.expert_wrong += bool(responses) and not correct
    report.expert_badly_formatted += bool(correct) and not tidy
    return tidy[:1]


def _direct_rows(
    records: "Sequence[Record]", held_out: set[object], wanted: int, seed: int, report: SftSetReport, out: Path
) -> list[dict[str, object]]:
    usable = [record for record in records if _question(record) not in held_out]
    report.held_out += len(records) - len(usable)
    for record in usable:
        problem = "no response" if record.response is None else format_problem(record.response, Branch.NON_THINKING)
        if problem is not None:
            raise DataError(f"non-thinking row {record.index} ({record.id}): {problem}")
    chosen = random.Random(seed).sample(usable, min(wanted, len(usable)))
    report.non_thinking = len(chosen)
    return [
        {
            **portable_row(record, out),
            "response": record.response,
            "mode": mode_name(Branch.NON_THINKING),
            "origin": "direct",
        }
        for record in chosen
    ]


def _question(record: "Record") -> object:
    """What tells two questions apart: their words and their images."""
    words = tuple(_normalised(text) for text in texts(record.messages))
    return words, tuple(image_contents(record))


def _normalised(text: object) -> str:
    return re.sub(r"\s+", " ", str(text)).strip().lower()


def _line_problem(line: object) -> str | None:
    """What is wrong with a line of pass rates; None: nothing."""
    if not isinstance(line, dict):
        return f"expected a mapping, found a {type(line).__name__}"
    missing = [name for name in ("id", "answer", "question", "pass_rate", "completions") if name not in line]
    if missing:
        return f"it lacks {', '.join(missing)}"
    if not isinstance(line["id"], str):
        return f"id must be a text, found {line['id']!r}"
    rate = line["pass_rate"]
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1):
        return f"pass_rate must be a number from 0 to 1, or null; found {rate!r}"
    kinds = {"text": str, "correct": bool | None, "tokens": int}
    for completion in line["completions"] if isinstance(line["completions"], list) else [None]:
        if not isinstance(completion, dict) or any(
            not isinstance(completion.get(name, ...), kind) for name, kind in kinds.items()
        ):
            return "completions must be a list of mappings with text, correct and tokens"
    return None


def _bin(rate: float) -> int:
    if rate == 0:
        return 0
    return BINS + 1 if rate == 1 else 1 + min(BINS - 1, int(rate * BINS))


def _sentence(report: SftSetReport) -> str:
    kinds = Counter(solved=report.solved, sometimes=report.sometimes, never=report.never, unjudged=report.unjudged)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())

"""Pass rates: sample N answers to each prompt, verify each, and keep all of it.

    p = (correct answers) / (answers that could be judged)

Source: Metis-RISE (arXiv 2506.13056): what the RL-trained model solves always, sometimes and never decides what it is
taught next. N is not published; 8 is ours.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from metis_home.branch import Branch
from metis_home.errors import DataError

from ..data.check import check_records
from ..evaluation.fingerprint import question_fingerprint, row_fingerprint
from ..judging import verify_record
from ..rollouts.types import Sampling, make_prompt
from .shards import ShardFile

if TYPE_CHECKING:
    from ..data.encode import Encoder
    from ..data.records import Record
    from ..rollouts.engine import RolloutEngine
    from ..rollouts.types import Rollout
    from ..verifier import Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a run will do at most."""

    prompts: int
    rollouts: int
    prompt_tokens: int
    max_new_tokens: int
    """Tokens that are generated if every answer is as long as allowed."""

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts x {self.rollouts // max(1, self.prompts)} samples = {self.rollouts} rollouts; "
            f"{self.prompt_tokens} prompt tokens, at most {self.max_new_tokens} new ones"
        )


def cost_of(records: "Sequence[Record]", encoder: "Encoder", *, samples: int, max_new_tokens: int) -> Cost:
    """Count what `pass_rates` would do, without generating."""
    rollouts = samples * len(records)
    return Cost(
        prompts=len(records),
        rollouts=rollouts,
        prompt_tokens=sum(encoder.count(record).prompt for record in records),
        max_new_tokens=rollouts * max_new_tokens,
    )


def pass_rates(
    engine: "RolloutEngine",
    encoder: "Encoder",
    records: "Sequence[Record]",
    *,
    samples: int,
    sampling: Sampling,
    out: Path,
    settings: dict[str, object],
    seed: int = 0,
    prompts_per_unit: int = 16,
    rank: int = 0,
    world_size: int = 1,
    verify: "Callable[[str, Record], Verdict]" = verify_record,
    say: Callable[[str], None] = logger.info,
) -> bool:
    """Sample, verify and write one line per prompt to `out` (JSONL): id, pass_rate, samples, correct, completions.

    The work is cut into units of `prompts_per_unit` prompts; unit u is done by rank u % world_size, with random numbers
    that depend on `seed` and u only. So a run that was stopped goes on where it was and ends with the same file. One that
    is complete already, with the same settings, is left as it is.

    Args:
        samples: N, answers per prompt.
        settings: what the run depends on beside this call (model, data), compared when it is resumed.
        verify: judges an answer to a record, for example a judge model's verdict instead of the rules'.
        say: gets a line about the time left now and then.
    Returns:
        Whether `out` is complete (False where other ranks are still at work).
    Raises:
        DataError: as `check_prompts`. OutputError: `out` was made or begun with other settings.
    """
    check_prompts(records, decode_images=False)
    units = [records[start : start + prompts_per_unit] for start in range(0, len(records), prompts_per_unit)]
    file = ShardFile(
        out,
        rank,
        world_size,
        {
            **settings,
            "samples": samples,
            "sampling": _plain(sampling),
            "seed": seed,
            "prompts_per_unit": prompts_per_unit,
            "rows": rows_digest(records),
        },
    )
    if file.is_complete():
        say(f"{out} is complete already, with the same settings")
        return True
    file.open()
    mine = [number for number in range(len(units)) if number % world_size == rank]
    todo = [number for number in mine if number not in file.units]
    if len(todo) < len(mine):
        say(f"{len(mine) - len(todo)} of {len(mine)} units are there already")
    for number, seconds_left in _timed(todo):
        if seconds_left is not None:
            say(f"unit {number + 1} of {len(units)}, about {seconds_left / 60:.1f} minutes left")
        engine.seed(unit_seed(seed, number))
        prompts = [make_prompt(record, encoder, index=record.index) for record in units[number]]
        groups = engine.generate(prompts, samples, sampling)
        file.add(number, [_line(record, group, verify) for record, group in zip(units[number], groups, strict=True)])
    return file.finish(len(units))


def unit_seed(seed: int, unit: int) -> int:
    """Seed of one unit of work; units of one run do not share random numbers."""
    return xxhash.xxh64(f"{seed}/{unit}".encode()).intdigest() >> 1


def rows_digest(records: "Sequence[Record]") -> str:
    """Tells whether two lists of records ask the same and are judged the same."""
    digest = xxhash.xxh128()
    for record in records:
        digest.update(f"{record.id}\0{row_fingerprint(record)}\0".encode())
    return digest.hexdigest()


def _line(
    record: "Record", group: "Sequence[Rollout]", verify: "Callable[[str, Record], Verdict]"
) -> dict[str, object]:
    completions = []
    for rollout in group:
        verdict = verify(rollout.text, record)
        # An answer that a limit cut is not a solution, whatever stands in it.
        correct = verdict.correct if rollout.finished or verdict.correct is None else False
        completions.append(
            {
                "text": rollout.text,
                "correct": correct,
                "extracted": verdict.extracted,
                "tokens": rollout.policy_tokens,
                "finished": rollout.finished,
                "branch": None if rollout.branch is None else int(rollout.branch),
            }
        )
    judged = [completion["correct"] for completion in completions if completion["correct"] is not None]
    return {
        "id": record.id,
        "index": record.index,
        "source": record.source,
        "answer": record.answer,
        "question": question_fingerprint(record),
        "samples": len(group),
        "correct": sum(bool(correct) for correct in judged),
        "judged": len(judged),
        "pass_rate": sum(bool(correct) for correct in judged) / len(judged) if judged else None,
        "completions": completions,
    }


def check_prompts(records: "Sequence[Record]", *, decode_images: bool = True) -> None:
    """Raise where answers could not be sampled, judged, or told apart.

    Args:
        decode_images: look into every image, as one does before a long run; else only at its header.
    Raises:
        DataError: there are no rows; or golds that are missing or cannot be judged, images that cannot be read, ids that
            occur twice: all such rows are listed.
    """
    if not records:
        raise DataError("there are no rows. Is it the right file?")
    check_records(records, purpose="rl", decode_images=decode_images).raise_if_bad()


def _timed(units: list[int]) -> Iterator[tuple[int, float | None]]:
    """Each unit with the seconds that are probably left; None for the first, of which nothing is known."""
    started = time.monotonic()
    for done, unit in enumerate(units):
        yield unit, (time.monotonic() - started) / done * (len(units) - done) if done else None


def _plain(sampling: Sampling) -> dict[str, object]:
    plain = asdict(sampling)
    if isinstance(sampling.branch, Branch):
        plain["branch"] = int(sampling.branch)
    return plain

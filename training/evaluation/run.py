"""`evaluate`: answer every row in every wanted mode, verify, write down, sum up."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metis_home.branch import Branch
from metis_home.errors import DataError
from metis_home.prompts import MAX_NEW_TOKENS, SYSTEM_PROMPT
from metis_home.responses import parse_response
from metis_home.training.data.records import Record
from metis_home.training.judging import verify_record

from .answering import BATCH_TOKENS, Answerer, Generated, Prompt
from .completions import MODES, Completion, CompletionFile, Mode, check_rows, open_run, write_json, write_text
from .fingerprint import model_fingerprint, row_fingerprint
from .images import image_references
from .provenance import describe_environment, describe_settings
from .report import EvaluationReport, comparisons, mode_reports, router_reports, select
from .view import html_view

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from metis_home.processing import MetisHomeProcessor

logger = logging.getLogger(__name__)
Thinking = bool | str | Sequence[bool | str]
Progress = Callable[[str, int, int], None]


def evaluate(
    model: "PreTrainedModel",
    processor: "MetisHomeProcessor",
    records: Sequence[Record],
    *,
    thinking: Thinking = "auto",
    out_dir: str | os.PathLike[str],
    system_prompt: str | None = SYSTEM_PROMPT,
    max_new_tokens: int = MAX_NEW_TOKENS,
    threshold: float | None = None,
    batch_tokens: int = BATCH_TOKENS,
    limit: int | None = None,
    overwrite: bool = False,
    plots: bool = True,
    model_name: str | None = None,
    data_name: str | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Answer records greedily and measure accuracy, thinking ratio, tokens, seconds and the router.

    Writes to `out_dir`: `completions.jsonl` (grows batch by batch), `run.json`, and at the end `report.json`, `view.html`
    and plots. Called again with the same model, data and settings it generates only what is missing; further modes, and
    a higher `limit`, add to what is there.

    Args:
        model: a two-branch model, or a dense Qwen2.5-VL. For a dense one "auto" is the plain prompt, "on" and "off" only
            write `<think>` and `<think></think>` into it, and a report's `reasoned` stands for its thinking ratio.
        processor: of this model; a `MetisHomeProcessor` serves dense ones too.
        records: rows to answer; those without `answer` are answered and counted, not scored.
        thinking: "auto", "on" (or True), "off" (or False), or a list of them.
        system_prompt: for conversations that have none; "" or None: the chat template's own.
        max_new_tokens: longest answer, in tokens.
        threshold: for "auto"; default: the generation config's `router_threshold`, else 0.5.
        batch_tokens: size of a batch: rows x (longest prompt + max_new_tokens).
        limit: answer only the first rows.
        overwrite: forget the answers in `out_dir`.
        plots: draw PNG files (needs matplotlib).
        model_name, data_name: for the report; default: the model's own name, the records' sources.
        progress: called with (mode, answers so far, answers in all).
    Raises:
        DataError: no records, or two with the same id. OutputError: `out_dir` holds another run.
        BranchError: an unknown mode, or a threshold outside [0, 1]. ProcessorError: an image cannot be used.
    """
    modes = check_modes(thinking)
    fingerprints = _fingerprints(records)
    answerer = Answerer(
        model,
        processor,
        system_prompt=system_prompt,
        max_new_tokens=max_new_tokens,
        threshold=threshold,
        batch_tokens=batch_tokens,
    )
    directory = Path(out_dir)
    name = model_name or str(getattr(model, "name_or_path", "") or type(model).__name__)
    settings = describe_settings(answerer)
    identity = {"architecture": model.config.model_type, "fingerprint": model_fingerprint(model)}
    completions = open_run(directory, identity, settings, modes, overwrite=overwrite)
    check_rows(completions, fingerprints)

    wanted = list(records)[:limit]
    _complete(answerer, wanted, modes, completions, fingerprints, progress)

    ids = [record.id for record in wanted]
    present = [
        mode
        for mode in MODES
        if any((mode, id) in completions.rows for id in ids) and not (mode == "auto" and completions.old_threshold)
    ]
    rows = select(completions.rows, ids, present)
    report = EvaluationReport(
        model={"name": name, **identity, "routes": answerer.routes},
        data={
            "name": data_name or ", ".join(dict.fromkeys(record.source for record in wanted)),
            "rows": len(wanted),
            "sources": {source: sum(record.source == source for record in wanted) for source in _sources(wanted)},
        },
        settings=settings,
        environment=describe_environment(model),
        modes=mode_reports(rows),
        router=router_reports(rows, answerer.threshold) if answerer.routes else {},
        comparisons=comparisons(rows),
        notes=_notes(answerer, rows),
        completions=rows,
    )
    write_json(directory / "report.json", report.to_dict())
    write_text(directory / "view.html", html_view(report, directory))
    if plots:
        from .plots import draw_report

        draw_report(report, directory)
    return report


def check_modes(thinking: Thinking) -> list[Mode]:
    """Return the modes in the order auto, on, off, each once.

    Raises:
        DataError: something else than "auto", "on", "off", True or False, or nothing.
    """
    asked = [thinking] if isinstance(thinking, (bool, str)) else list(thinking)
    names = [("on" if item else "off") if isinstance(item, bool) else item for item in asked]
    unknown = [item for item in names if item not in MODES]
    if unknown or not names:
        raise DataError(f'thinking must be "auto", "on", "off" or a list of these; found {thinking!r}')
    return [mode for mode in MODES if mode in names]


def _complete(
    answerer: Answerer,
    records: Sequence[Record],
    modes: Sequence[Mode],
    completions: CompletionFile,
    fingerprints: dict[str, str],
    progress: Progress | None,
) -> None:
    """Generate, verify and write down the answers that are missing."""
    missing = [record for record in records if any((mode, record.id) not in completions.rows for mode in modes)]
    total = len(records) * len(modes)
    done = total - sum((mode, record.id) not in completions.rows for mode in modes for record in missing)
    if done:
        logger.info("%d of %d answers are there already", done, total)
    for window in answerer.windows(missing):
        probability, router_seconds = _routed(answerer, window, completions)
        for mode in modes:
            places = [place for place, prompt in enumerate(window) if (mode, prompt.record.id) not in completions.rows]
            prompts = [window[place] for place in places]
            chances = [probability[place] for place in places]
            for batch in answerer.answer(prompts, mode, chances if answerer.routes else None):  # type: ignore[arg-type]
                completions.append(
                    _completion(
                        prompts[made.position].record,
                        mode,
                        made,
                        fingerprints,
                        chances[made.position],
                        router_seconds[places[made.position]] if mode == "auto" else 0.0,
                        completions.path.parent,
                    )
                    for made in batch
                )
                done += len(batch)
                if progress is not None:
                    progress(mode, done, total)


def _routed(
    answerer: Answerer, window: Sequence[Prompt], completions: CompletionFile
) -> tuple[list[float | None], list[float]]:
    """P(thinking) of every prompt and what it cost; what an earlier run wrote down is not asked again."""
    if not answerer.routes:
        return [None] * len(window), [0.0] * len(window)
    known = {row.id: row.thinking_probability for row in completions.rows.values()}
    unknown = [place for place, prompt in enumerate(window) if known.get(prompt.record.id) is None]
    routed = dict(zip(unknown, answerer.route([window[place] for place in unknown]), strict=True))
    probability = [
        routed[place].thinking_probability if place in routed else known[prompt.record.id]
        for place, prompt in enumerate(window)
    ]
    return probability, [routed[place].seconds if place in routed else 0.0 for place in range(len(window))]


def _completion(
    record: Record,
    mode: Mode,
    made: Generated,
    fingerprints: dict[str, str],
    probability: float | None,
    router_seconds: float,
    directory: Path,
) -> Completion:
    parts = parse_response(made.text, prefix=made.prefix)
    verdict = verify_record(made.prefix + made.text, record)
    return Completion(
        id=record.id,
        index=record.index,
        source=record.source,
        row=fingerprints[record.id],
        thinking=mode,
        prompt=question_text(record),
        images=image_references(record, directory),
        gold=record.gold_text,
        kind=record.kind,
        label=None if record.mode is None else Branch(record.mode).label,
        branch=None if made.branch is None else made.branch.label,
        thinking_probability=probability,
        prefix=made.prefix,
        completion=made.text,
        reasoning=parts["reasoning_content"],
        content=parts["content"],
        extracted=verdict.extracted,
        correct=verdict.correct,
        method=verdict.method,
        reason=verdict.reason,
        prompt_tokens=made.prompt_tokens,
        prefix_tokens=made.prefix_tokens,
        completion_tokens=made.completion_tokens,
        finished=made.finished,
        seconds=made.seconds,
        router_seconds=router_seconds,
    )


def question_text(record: Record) -> str:
    """The text of the turn that is to be answered."""
    content = record.messages[-1]["content"]
    if isinstance(content, list):
        return "\n".join(str(block["text"]) for block in content if isinstance(block, dict) and "text" in block)
    return str(content)


def _fingerprints(records: Sequence[Record]) -> dict[str, str]:
    if not records:
        raise DataError("there are no records to evaluate")
    found: dict[str, str] = {}
    for record in records:
        if record.id in found:
            raise DataError(
                f"two rows have the id {record.id!r} (the second is row {record.index}). Answers are kept by id: give "
                "every row its own, or evaluate the files one by one."
            )
        found[record.id] = row_fingerprint(record)
    return found


def _sources(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.source for record in records))


def _notes(answerer: Answerer, rows: Sequence[Completion]) -> list[str]:
    notes = []
    if not answerer.routes:
        notes.append(
            'This is a dense model: it has no router and no branches. "auto" is the plain prompt; "on" and "off" only '
            "write <think> and <think></think> into it. `reasoned` counts the answers that hold reasoning."
        )
    elif not answerer.model.config.router_trained:
        notes.append("The router of this model has not been trained: its choices mean nothing yet.")
    unscored = len({row.id for row in rows if row.correct is None})
    if unscored:
        notes.append(f"{unscored} rows have no verdict and count for no accuracy; completions.jsonl says why.")
    cut = sum(not row.finished for row in rows)
    if cut:
        notes.append(f"{cut} of {len(rows)} answers were cut at {answerer.max_new_tokens} new tokens.")
    return notes

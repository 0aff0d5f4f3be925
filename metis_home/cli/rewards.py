"""`metis-home check-rewards`."""

import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

if TYPE_CHECKING:
    from metis_home.training.data.records import Record

CHECK_REWARDS_HELP = """Score every gold answer as if a model had written it, and wrong ones too, before any training.

Of several golds of a row each is scored. Exit status 1: a gold cannot be read, or does not score itself; the text of an
option does not choose its own letter; or a wrong answer scores.

Example: metis-home check-rewards rl.jsonl --samples 50
"""
SHOWN = 5  # examples of each problem


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command("check-rewards", help=CHECK_REWARDS_HELP)(check_rewards)


def check_rewards(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A .jsonl, .json or .parquet file, a saved data set, or one on the hub (name[:split]).",
            show_default=False,
        ),
    ],
    samples: Annotated[
        int, typer.Option(min=0, help="Golds that are also replaced by wrong, empty and doubtful answers.")
    ] = 20,
    image_root: Annotated[
        Path | None, typer.Option(help="Where relative image paths begin. Default: the folder of DATA.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score golds as predictions."""
    from metis_home.errors import DataError
    from metis_home.training.data.records import load_records
    from metis_home.training.judging import record_problem, verify_record

    records = load_records(data, image_root=image_root)
    if not records:
        raise DataError(f"{data}: no rows to check.")
    golds = [replace(record, answer=gold) for record in records for gold in record.golds or [""]]
    unread, failed, usable, methods = [], [], [], Counter[str]()
    for record in golds:
        problem = record_problem(record)
        if problem is not None:
            unread.append({**_place(record), "reason": problem})
            continue
        for form, text in _forms(_gold(record)).items():
            verdict = verify_record(text, record)
            if form == "bare":
                methods[verdict.method] += 1
            if verdict.correct is not True:
                failed.append({**_place(record), "form": form, "reason": verdict.reason})
                break
        else:
            usable.append(record)
    confused = [example for record in _one_per_row(usable) for example in _confused_options(record)]
    accepted, tried = _wrong_answers(usable, samples)
    report = {
        "rows": len(records),
        "golds": len(golds),
        "gold_scores_itself": len(usable),
        "methods": dict(sorted(methods.items())),
        "unreadable_golds": len(unread),
        "golds_that_fail": len(failed),
        "options_that_fail": len(confused),
        "wrong_answers_tried": tried,
        "wrong_answers_accepted": len(accepted),
        "examples": {
            "unreadable": unread[:SHOWN],
            "failing": failed[:SHOWN],
            "options": confused[:SHOWN],
            "accepted": accepted[:SHOWN],
        },
    }
    if as_json:
        _say(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)
    if unread or failed or confused or accepted:
        raise typer.Exit(1)


def _forms(gold: str) -> dict[str, str]:
    """The gold as a model would write it."""
    return {
        "bare": gold,
        "thinking": f"<think>Because.</think><answer>{gold}</answer>",
        "non-thinking": f"<think></think><answer>{gold}</answer>",
        "boxed": f"<think>Because.</think><answer>The answer is $\\boxed{{{_bare(gold).strip('$')}}}$</answer>",
    }


def _wrong_answers(golds: "list[Record]", samples: int) -> tuple[list[dict[str, object]], int]:
    """Wrong answers to a seeded sample of golds: those that score all the same, and how many were tried."""
    from metis_home.training.judging import verify_record

    chosen = random.Random(0).sample(golds, min(samples, len(golds)))
    accepted: list[dict[str, object]] = []
    tried = 0
    for record in chosen:
        gold = _bare(_gold(record))
        wrong = {
            "empty": "<think>Because.</think><answer></answer>",
            "only reasoning": f"<think>{gold}",
            "hedged": f"<answer>\\boxed{{{gold} or 123457}}</answer>",
            "denied": f"<answer>not {gold}</answer>",
            **{what: f"<answer>{text}</answer>" for what, text in _other_answers(record, golds).items()},
        }
        for what, text in wrong.items():
            tried += 1
            if verify_record(text, record).correct:
                accepted.append({**_place(record), "what": what, "answer": text[:120]})
    return accepted, tried


def _other_answers(record: "Record", golds: "list[Record]") -> dict[str, str]:
    """What is right elsewhere: in another row, for another option, with the other sign."""
    others = {}
    other = next((one for one in golds if one.index != record.index and not _same(one, record)), None)
    if other is not None:
        others["another row's"] = _gold(other)
    negated = _negated(record)
    if negated is not None:
        others["negated"] = negated
    options = _options(record)
    right = _right_options(record, options)
    return others | {f"option {number + 1}": text for number, text in enumerate(options) if number not in right}


def _negated(record: "Record") -> str | None:
    """The gold with the other sign; None where it has none, or where both signs are the same."""
    from metis_home.training.judging import verify_record

    gold = _bare(_gold(record)).strip("$ ")
    method = verify_record(gold, record).method
    if method not in ("number", "integer", "percent", "expression") or verify_record("0", record).correct:
        return None
    if method == "expression":
        return f"-({gold})"
    return gold.removeprefix("-") if gold.startswith("-") else f"-{gold}"


def _confused_options(record: "Record") -> "list[dict[str, object]]":
    """Options whose own text does not choose their letter: two alike, or one that reads as another's letter."""
    from metis_home.training.judging import verify_record
    from metis_home.training.verifier.kinds import LETTERS

    if verify_record(_gold(record), record).method != "choice":
        return []
    found: list[dict[str, object]] = []
    for letter, text in zip(LETTERS, _options(record), strict=False):
        verdict = verify_record(f"<answer>{text}</answer>", replace(record, answer=letter))
        if not verdict.correct:
            found.append({**_place(record), "form": f"option {letter}", "gold": text[:80], "reason": verdict.reason})
    return found


def _right_options(record: "Record", options: tuple[str, ...]) -> set[int]:
    """Places of the options that the gold names, by letter or by text."""
    from metis_home.training.judging import verify_record
    from metis_home.training.verifier.kinds import LETTERS

    if verify_record(_gold(record), record).method == "choice":
        return {place for place, letter in enumerate(LETTERS[: len(options)]) if verify_record(letter, record).correct}
    return {place for place, text in enumerate(options) if text.strip() == _bare(_gold(record)).strip()}


def _options(record: "Record") -> tuple[str, ...]:
    from metis_home.training.judging import read_options

    return read_options(record.columns.get("options")) or ()


def _one_per_row(golds: "list[Record]") -> "list[Record]":
    return list({record.index: record for record in golds}.values())


def _same(one: "Record", record: "Record") -> bool:
    """Both golds are equal, so one is no wrong answer to the other."""
    from metis_home.training.judging import verify_record

    return any(verify_record(_gold(a), b).correct for a, b in ((one, record), (record, one)))


def _gold(record: "Record") -> str:
    return record.gold_text or ""


def _bare(gold: str) -> str:
    """Without tags and box."""
    from metis_home.training.verifier import extract_answer

    return extract_answer(gold).text or gold


def _place(record: "Record") -> dict[str, object]:
    return {"row": record.index, "id": record.id, "gold": _gold(record)[:80]}


def _print(report: dict[str, object]) -> None:
    _say(f"{report['gold_scores_itself']} of {report['golds']} golds score themselves")
    for method, count in report["methods"].items():  # type: ignore[attr-defined]
        _say(f"  {method:<12} {count}")
    _say(f"{report['wrong_answers_accepted']} of {report['wrong_answers_tried']} wrong answers score")
    titles = {
        "unreadable": "cannot be read",
        "failing": "does not score itself",
        "options": "the text of an option does not choose its letter",
        "accepted": "a wrong answer scores",
    }
    for name, examples in report["examples"].items():  # type: ignore[attr-defined]
        for example in examples:
            detail = example.get("reason") or f"{example['what']}: {example['answer']}"
            form = f" ({example['form']})" if "form" in example else ""
            _say(f"row {example['row']}: {titles[name]}{form}: {example['gold']!r}: {detail}", file=sys.stderr)


def _say(line: str, file: TextIO | None = None) -> None:
    """Print; half a character (a lone surrogate), which no stream takes, is escaped, as JSON escapes it."""
    print(line.encode("utf-8", "backslashreplace").decode("utf-8"), file=file)

"""`metis-home check-rewards`."""

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from metis_home.training.data.records import Record

CHECK_REWARDS_HELP = """Score every gold answer as if a model had written it, and wrong ones too, before any training.

Exit status 1: a gold cannot be read, or does not score itself; or a wrong answer scores.

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
        int, typer.Option(min=0, help="Rows whose answers are also replaced by wrong, empty and doubtful ones.")
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
    unread, failed, methods = [], [], Counter[str]()
    for record in records:
        gold = record.answer or ""
        problem = record_problem(record)
        if problem is not None:
            unread.append({"row": record.index, "id": record.id, "gold": gold[:80], "reason": problem})
            continue
        for form, text in _forms(gold).items():
            verdict = verify_record(text, record)
            if form == "bare":
                methods[verdict.method] += 1
            if verdict.correct is not True:
                failed.append(
                    {"row": record.index, "id": record.id, "gold": gold[:80], "form": form, "reason": verdict.reason}
                )
                break
    bad_rows = {example["row"] for example in (*unread, *failed)}
    usable = [record for record in records if record.index not in bad_rows]
    accepted, tried = _wrong_answers(usable, samples)
    report = {
        "rows": len(records),
        "gold_scores_itself": len(records) - len(bad_rows),
        "methods": dict(sorted(methods.items())),
        "unreadable_golds": len(unread),
        "golds_that_fail": len(failed),
        "wrong_answers_tried": tried,
        "wrong_answers_accepted": len(accepted),
        "examples": {"unreadable": unread[:SHOWN], "failing": failed[:SHOWN], "accepted": accepted[:SHOWN]},
    }
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)
    if unread or failed or accepted:
        raise typer.Exit(1)


def _forms(gold: str) -> dict[str, str]:
    """The gold as a model would write it."""
    return {
        "bare": gold,
        "thinking": f"<think>Because.</think><answer>{gold}</answer>",
        "non-thinking": f"<think></think><answer>{gold}</answer>",
        "boxed": f"<think>Because.</think><answer>The answer is $\\boxed{{{_inside_box(gold)}}}$</answer>",
    }


def _inside_box(gold: str) -> str:
    from metis_home.training.verifier import extract_answer

    return (extract_answer(gold).text or gold).strip("$")


def _wrong_answers(records: "list[Record]", samples: int) -> tuple[list[dict[str, object]], int]:
    """Perturbed answers of a seeded sample of rows, and those that score all the same."""
    from metis_home.training.judging import verify_record
    from metis_home.training.verifier import extract_answer

    chosen = random.Random(0).sample(records, min(samples, len(records)))
    accepted: list[dict[str, object]] = []
    tried = 0
    for record in chosen:
        gold = extract_answer(record.answer or "").text or ""
        other = next((one.answer for one in records if one.answer and not _same(one, record)), None)
        wrong = {
            "empty": "<think>Because.</think><answer></answer>",
            "only reasoning": f"<think>{gold}",
            "hedged": f"<answer>\\boxed{{{gold} or 123457}}</answer>",
            "another row's": None if other is None else f"<answer>{other}</answer>",
        }
        for what, text in wrong.items():
            if text is None:
                continue
            tried += 1
            if verify_record(text, record).correct:
                accepted.append(
                    {"row": record.index, "id": record.id, "gold": gold[:80], "what": what, "answer": text[:120]}
                )
    return accepted, tried


def _same(one: "Record", record: "Record") -> bool:
    """The golds of both rows are equal, so one row's is no wrong answer to the other."""
    from metis_home.training.judging import verify_record

    return any(verify_record(a.answer or "", b).correct for a, b in ((one, record), (record, one)))


def _print(report: dict[str, object]) -> None:
    print(f"{report['gold_scores_itself']} of {report['rows']} golds score themselves")
    for method, count in report["methods"].items():  # type: ignore[attr-defined]
        print(f"  {method:<12} {count}")
    print(f"{report['wrong_answers_accepted']} of {report['wrong_answers_tried']} wrong answers score")
    titles = {"unreadable": "cannot be read", "failing": "does not score itself", "accepted": "a wrong answer scores"}
    for name, examples in report["examples"].items():  # type: ignore[attr-defined]
        for example in examples:
            detail = example.get("reason") or f"{example['what']}: {example['answer']}"
            form = f" ({example['form']})" if "form" in example else ""
            print(f"row {example['row']}: {titles[name]}{form}: {example['gold']!r}: {detail}", file=sys.stderr)

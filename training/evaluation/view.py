"""The answers of a run as one HTML page: image, question, gold, and what each mode answered. Standard library only."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from .completions import Completion
from .report import EvaluationReport

MAX_ROWS = 1000  # a page of more is slow to open; completions.jsonl holds everything

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em; max-width: 1500px; color: #222 }
table { border-collapse: collapse; width: 100% }
td, th { border: 1px solid #ccc; padding: .5em; vertical-align: top; text-align: left }
th { background: #f4f4f4; position: sticky; top: 0 }
img { max-width: 220px; max-height: 220px; display: block; margin-bottom: .4em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0 }
small { color: #666 }
.right { border-left: 5px solid #2a9d4e }
.wrong { border-left: 5px solid #d0433b }
.unscored { border-left: 5px solid #aaa }
"""


def html_view(report: EvaluationReport, directory: Path) -> str:
    """The page's text.

    Args:
        directory: where the page will lie; images are linked relative to it where that is possible.
    """
    modes = list(report.modes)
    by_id: dict[str, dict[str, Completion]] = {}
    for row in report.completions:
        by_id.setdefault(row.id, {})[row.thinking] = row
    shown = list(by_id.values())[:MAX_ROWS]
    more = f"<p>The first {MAX_ROWS} of {len(by_id)} rows.</p>" if len(by_id) > MAX_ROWS else ""
    head = "".join(f"<th>{_text(mode)}</th>" for mode in modes)
    body = "\n".join(_row(answers, modes, directory) for answers in shown)
    notes = "".join(f"<p>{_text(note)}</p>" for note in report.notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(report.model["name"])}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{_text(report.model['name'])} on {_text(report.data['name'])}</h1>\n"
        f"{notes}{more}\n<table><tr><th>row</th><th>question</th>{head}</tr>\n{body}\n</table></body></html>\n"
    )


def _row(answers: dict[str, Completion], modes: Sequence[str], directory: Path) -> str:
    first = next(iter(answers.values()))
    images = "".join(f'<img loading="lazy" src="{_address(image, directory)}" alt="">' for image in first.images)
    about = f"{_text(first.id)}<br><small>{_text(first.source)}"
    if first.label is not None:
        about += f"<br>mode {_text(first.label)}"
    if first.thinking_probability is not None:
        about += f"<br>P(thinking) {first.thinking_probability:.3f}"
    gold = "" if first.gold is None else f"<small>gold</small><pre>{_text(first.gold)}</pre>"
    cells = "".join(_answer(answers.get(mode)) for mode in modes)
    return f"<tr><td>{about}</small></td><td>{images}<pre>{_text(first.prompt)}</pre>{gold}</td>{cells}</tr>"


def _answer(row: Completion | None) -> str:
    if row is None:
        return "<td></td>"
    verdict = {True: "right", False: "wrong", None: "unscored"}[row.correct]
    facts = [verdict, row.method, f"{row.tokens} tokens", *([row.branch] if row.branch else [])]
    facts += [] if row.finished else ["cut"]
    reasoning = (
        f"<details><summary>reasoning</summary><pre>{_text(row.reasoning)}</pre></details>" if row.reasoning else ""
    )
    extracted = "" if row.extracted is None else f"<small>extracted</small><pre>{_text(row.extracted)}</pre>"
    why = "" if row.correct else f"<small>{_text(row.reason)}</small>"
    return (
        f'<td class="{verdict}"><small>{_text(", ".join(facts))}</small>{reasoning}<pre>{_text(row.content)}</pre>'
        f"{extracted}{why}</td>"
    )


def _address(image: str, directory: Path) -> str:
    """A link that works from the page: relative, percent-encoded."""
    if "://" in image:
        return html.escape(image, quote=True)
    relative = os.path.relpath(image, directory) if os.path.isabs(image) else image
    return html.escape(quote(relative.replace(os.sep, "/")), quote=True)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)

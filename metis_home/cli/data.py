"""`metis-home check-data`."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metis_home.errors import DataError
from metis_home.prompts import SYSTEM_PROMPT

if TYPE_CHECKING:
    from metis_home.training.data.check import DataReport
    from metis_home.training.data.encode import Encoder

CHECK_DATA_HELP = """Check every row of a data set before training: images, tags, answers, lengths. Exit status 1: bad rows.

Example: metis-home check-data sft.jsonl --model home-7b --max-length 8192
"""


class PurposeChoice(StrEnum):
    """What the rows are for."""

    SFT = "sft"
    RL = "rl"
    EVALUATE = "evaluate"
    PROMPTS = "prompts"


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command("check-data", help=CHECK_DATA_HELP)(check_data)


def check_data(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A .jsonl, .json or .parquet file, a saved data set, or one on the hub (name[:split]).",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Count tokens with this model's processor.")
    ] = None,
    purpose: Annotated[
        PurposeChoice,
        typer.Option(help="sft: responses and tags; rl, evaluate: answers that can be verified; prompts: neither."),
    ] = PurposeChoice.SFT,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a row, image tokens included; needs --model.")
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="System prompt; '' for the chat template's own. Default: Metis-RISE's.", show_default=False),
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Where relative image paths begin. Default: the folder of DATA.")
    ] = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Read only the headers of images: faster, misses cut files.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a data set."""
    if max_length is not None and model is None:
        raise typer.BadParameter("--max-length counts tokens, and needs --model for that.")

    from metis_home.training.data.check import check_source

    encoder = None if model is None else _encoder(model, system, max_length)
    report = check_source(
        data, purpose=purpose.value, encoder=encoder, image_root=image_root, decode_images=not headers_only
    )

    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        _print_table(report)
    if report.problems:
        print(f"{report.bad_rows} of {report.rows} rows cannot be used", file=sys.stderr)
        raise typer.Exit(1)


def _encoder(model: str, system: str | None, max_length: int | None) -> "Encoder":
    from metis_home.processing import MetisHomeProcessor
    from metis_home.training.data.encode import Encoder

    try:
        processor = MetisHomeProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DataError(f"{model}: no processor can be loaded from it: {error}") from error
    return Encoder(
        processor, system_prompt=(SYSTEM_PROMPT if system is None else system) or None, max_length=max_length
    )


def _print_table(report: "DataReport") -> None:
    lines = [
        ("rows", f"{report.rows:,}, of which {report.rows - report.bad_rows:,} can be used"),
        ("modes", _counts(report.modes)),
        ("sources", _counts(report.sources)),
    ]
    if report.tokens is not None:
        tokens = report.tokens
        share = 100 * tokens.images / max(1, tokens.total)
        lines.append(("tokens", f"{tokens.total:,}, {share:.0f} % of images"))
        lines.append(("longest", f"{tokens.longest:,} tokens, row {tokens.longest_row}"))
    if report.problems:
        lines.append(("problems", _counts(report.reasons)))
    for name, value in lines:
        print(f"{name:<10}{value}")
    for problem in report.problems:
        print(f"row {problem.row:<6} {problem.id:<20} {problem.reason:<30} {problem.detail}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "-"

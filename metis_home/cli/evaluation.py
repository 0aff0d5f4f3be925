"""`metis-home evaluate`, `calibrate` and `think-ratio`: measure, pick the threshold, read result files."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metis_home.errors import DataError
from metis_home.prompts import MAX_NEW_TOKENS

from .answer import AsJson, Device, Dtype, DtypeChoice, System, Threshold
from .models import load_either, load_its_processor, system_prompt_for

if TYPE_CHECKING:
    from metis_home.training.evaluation.calibration import Calibration
    from metis_home.training.evaluation.think_ratio import ThinkRatio

EVALUATE_HELP = """Answer every row of a data set, and measure: accuracy, thinking ratio, tokens, seconds, the router.

A row has `prompt` or `messages`, `image` or `images`, and `answer`; docs/evaluation.md shows more. Several modes are
compared: on always thinks, off never does, auto asks the router. MODEL may also be a dense Qwen2.5-VL, which has no
router: on and off then only write their prefix into the prompt. Started again, it generates only what is missing in DIR.

Example: metis-home evaluate home-7b test.jsonl --thinking auto,on,off --out runs/test
"""
CALIBRATE_HELP = """Pick router_threshold on held-out data, and write it into the model's generation_config.json.

Both branches answer every row once; what every threshold would do follows from that. Pass exactly one target.
Answers that `evaluate` left in DIR (modes on and off) are used.

Example: metis-home calibrate home-7b dev.jsonl --max-mean-tokens 600 --out runs/dev
"""
THINK_RATIO_HELP = """Say how often a model thought, per benchmark and subject, from result files of lmms-eval or VLMEvalKit.

Example: metis-home think-ratio out/home-7b/*_samples_mmmu_val.jsonl --by mmmu_acc.subdomain
"""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, or a hub id.", show_default=False)]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA", help=".jsonl, .json, .parquet, a saved data set, or name[:split].", show_default=False
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Size of a batch: rows x (longest prompt + --max-new-tokens).")]
Limit = Annotated[int | None, typer.Option(min=1, help="Answer only the first rows.")]
MinPixels = Annotated[int | None, typer.Option(min=1, help="Smallest image area. Default: the model's.")]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="Largest image area. Default: the model's.")]
Attention = Annotated[str | None, typer.Option(help="sdpa, flash_attention_2, eager. Default: transformers' choice.")]
ImageRoot = Annotated[Path | None, typer.Option(help="Where relative image paths begin. Default: beside DATA.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Forget the answers in DIR and start again.")]
_BATCH_TOKENS = 32_768


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command("evaluate", help=EVALUATE_HELP)(evaluate)
    app.command("calibrate", help=CALIBRATE_HELP)(calibrate)
    app.command("think-ratio", help=THINK_RATIO_HELP)(think_ratio)


def evaluate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.", show_default=False)],
    thinking: Annotated[
        list[str] | None,
        typer.Option(help="auto, on, off; several with commas or by repeating. Default: auto.", show_default=False),
    ] = None,
    threshold: Threshold = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    batch_tokens: BatchTokens = _BATCH_TOKENS,
    limit: Limit = None,
    image_root: ImageRoot = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    attention: Attention = None,
    dtype: Dtype = DtypeChoice.AUTO,
    device: Device = "auto",
    overwrite: Overwrite = False,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Draw no PNG files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model."""
    modes = _modes(thinking or ["auto"])
    records = _records(data, image_root)
    prompt = system_prompt_for(model, system)
    loaded = load_either(model, dtype=dtype, device=device, attention=attention)
    processor = load_its_processor(model, min_pixels=min_pixels, max_pixels=max_pixels)

    from rich.console import Console

    from metis_home.training.evaluation.run import evaluate as run
    from metis_home.training.evaluation.table import print_report

    with _progress() as progress:
        report = run(
            loaded,
            processor,
            records,
            thinking=modes,
            out_dir=out,
            system_prompt=prompt,
            max_new_tokens=max_new_tokens,
            threshold=threshold,
            batch_tokens=batch_tokens,
            limit=limit,
            overwrite=overwrite,
            plots=not no_plots,
            model_name=model,
            data_name=data,
            progress=progress,
        )
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        print_report(report, _console(Console))
    _say(f"answers, report, plots and a page to look at are in {out}")


def calibrate(
    model: Model,
    data: Data,
    target_thinking_ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="Come as near as possible to this share of thinking queries.")
    ] = None,
    max_mean_tokens: Annotated[
        float | None, typer.Option(min=0, help="Best accuracy at no more tokens per answer than this.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fewest tokens at no less accuracy than this.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the answers and the curve go. Default: calibration-MODEL, here."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the curve; leave the model as it is.")] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    batch_tokens: BatchTokens = _BATCH_TOKENS,
    limit: Limit = None,
    image_root: ImageRoot = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    attention: Attention = None,
    dtype: Dtype = DtypeChoice.AUTO,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Pick the threshold."""
    targets = {"thinking_ratio": target_thinking_ratio, "mean_tokens": max_mean_tokens, "accuracy": min_accuracy}
    given = {kind: value for kind, value in targets.items() if value is not None}
    if len(given) != 1:
        raise typer.BadParameter(
            f"Pass exactly one of --target-thinking-ratio, --max-mean-tokens and --min-accuracy; found {len(given)}."
        )
    ((kind, value),) = given.items()

    from metis_home.training.evaluation.tradeoff import Target

    target = Target(kind=kind, value=value)  # type: ignore[arg-type]
    home = Path(model).expanduser()
    if not dry_run:
        from metis_home.training.evaluation.calibration import check_writable

        check_writable(home)
    records = _records(data, image_root)
    prompt = system_prompt_for(model, system)
    loaded = load_either(model, dtype=dtype, device=device, attention=attention)
    processor = load_its_processor(model, min_pixels=min_pixels, max_pixels=max_pixels)

    from metis_home.training.evaluation.calibration import calibrate as run
    from metis_home.training.evaluation.calibration import write_threshold

    directory = out or Path(f"calibration-{home.name}")
    with _progress() as progress:
        found = run(
            loaded,
            processor,
            records,
            target,
            out_dir=directory,
            progress=progress,
            system_prompt=prompt,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            limit=limit,
            overwrite=overwrite,
            model_name=model,
            data_name=data,
        )
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        _print_calibration(found)
    if dry_run:
        _say(f"dry run: router_threshold of {home} stays {found.current.threshold:g}")
    else:
        changed = write_threshold(home, found.picked.threshold)
        told = ", ".join(changed) or "nothing (it was this threshold already)"
        _say(f"{home / 'generation_config.json'}: changed {told}")
    _say(f"the curve is in {directory / 'calibration.json'} and {directory / 'tradeoff.png'}")


def think_ratio(
    file: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Result files.", show_default=False)],
    router: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.jsonl", help="What our adapter wrote beside them (router_log).")
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="COLUMN", help="The subject; dots lead into nested values.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how often a model thought."""
    from metis_home.training.evaluation.think_ratio import think_ratios

    found = [ratio for path in file for ratio in think_ratios(path, sidecar=router or (), by=by)]
    if as_json:
        print(json.dumps([dataclasses.asdict(ratio) for ratio in found], ensure_ascii=False))
        return
    _print_ratios(found)
    unmatched = sum(ratio.unmatched for ratio in found if ratio.subject == "all")
    if unmatched:
        _say(f"{unmatched} rows are in no --router file; they were judged by their text")


def _modes(given: list[str]) -> list[str]:
    from metis_home.training.evaluation.completions import split_modes

    try:
        return split_modes(given)
    except DataError as error:
        raise typer.BadParameter(f"--thinking: {error}") from None


def _records(data: str, image_root: Path | None) -> list:
    from metis_home.training.data.check import check_records
    from metis_home.training.data.records import load_records

    records = load_records(data, image_root=image_root)
    check_records(records, purpose="evaluate").raise_if_bad()
    return records


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda mode, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("answers", total=None)
        yield lambda mode, done, total: bar.update(task, description=f"answers ({mode})", completed=done, total=total)


def _print_calibration(found: "Calibration") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{found.queries} queries; target: {found.target.kind.replace('_', ' ')} {found.target.value:g}"
    )
    for name in ("", "threshold", "thinking", "tokens", "accuracy"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    rows = [("picked", found.picked), ("now", found.current), *(("", item) for item in _spread(found.curve, 11))]
    for place, (name, item) in enumerate(rows):
        accuracy = "-" if item.accuracy is None else f"{item.accuracy:.4f}"
        cells = (f"{item.threshold:.6g}", f"{item.thinking_ratio:.1%}", f"{item.mean_tokens:.1f}", accuracy)
        table.add_row(name, *cells, end_section=place == 1)
    console = _console(Console)
    console.print(table)
    share = found.accuracy
    if share.low is not None and share.high is not None:
        console.print(f"accuracy of the pick: 95 % interval {share.low:.3f} … {share.high:.3f}", highlight=False)
    if found.tied:
        console.print(f"{found.tied} queries share their probability with another", highlight=False)
    if found.unscored:
        console.print(f"{found.unscored} queries have no verdict and count for no accuracy", highlight=False)
    if found.auto_differs:
        console.print(
            f"{found.auto_differs} answers of mode auto differ from their branch's forced answer: the curve is an "
            "estimate for them",
            highlight=False,
        )


def _print_ratios(found: "list[ThinkRatio]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("benchmark", "subject"):
        table.add_column(name, no_wrap=True)
    for name in ("rows", "thinking", "95 %", "mean P(thinking)", "tokens"):
        table.add_column(name, justify="right")
    for ratio in found:
        share = ratio.thinking
        table.add_row(
            ratio.benchmark,
            ratio.subject,
            str(share.total),
            "-" if share.value is None else f"{share.value:.1%}",
            "" if share.low is None or share.high is None else f"{share.low:.1%} … {share.high:.1%}",
            "-" if ratio.mean_probability is None else f"{ratio.mean_probability:.3f}",
            "-" if ratio.mean_tokens is None else f"{ratio.mean_tokens:.1f}",
        )
    _console(Console).print(table)


def _spread(items: list, count: int) -> list:
    """At most `count` items, evenly spread, first and last among them."""
    if len(items) <= count:
        return items
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _console(console: type):
    """Standard output; wide where it is no terminal, so that files and pipes get whole rows."""
    return console() if sys.stdout.isatty() else console(width=160)


def _say(text: str) -> None:
    print(text, file=sys.stderr)

"""The `metis-home` command: results on stdout, talk on stderr.

Exit status: 0 done, 1 failed (one message on stderr), 2 wrong usage, 130 / 143 stopped by SIGINT / SIGTERM.
Nothing here imports torch: each command imports what it needs when it runs.
"""

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from metis_home.errors import MetisHomeError

from . import answer, checkpoints, data, doctor, evaluation, pipeline, rewards, train

app = typer.Typer(
    name="metis-home",
    help="Hybrid-thinking VLMs: convert, train, route, answer, evaluate.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (checkpoints, data, rewards, train, pipeline, evaluation, answer, doctor):
    module.add_commands(app)

_debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"metis_home {doctor.own_version()}")
        raise typer.Exit()


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    global _debug
    _debug = debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _stop_on_sigterm(signum: int, frame: FrameType | None) -> None:
    # An exception, so that `finally` blocks run and nothing half-written stays behind.
    raise SystemExit(128 + signum)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit status."""
    signal.signal(signal.SIGTERM, _stop_on_sigterm)
    try:
        app(args=arguments, standalone_mode=True)
    except (MetisHomeError, OSError) as error:
        if _debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None

"""`metis-home convert`, `split` and `verify`."""

import typer


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""

"""`metis-home train`: carry out a recipe, or say how much memory it needs."""

import contextlib
import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from metis_home.training.estimate import MemoryEstimate
    from metis_home.training.recipe import Recipe

TRAIN_HELP = """Train as RECIPE says: a YAML file, or the name of a shipped recipe (--list names them).

Settings behind the recipe replace its own: key.sub=value. Several GPUs: start it with torchrun or accelerate launch,
`torchrun --nproc-per-node 8 -m metis_home.cli train RECIPE ...`.

Example: metis-home train home_sft.yaml model.path=home-7b data.train=sft.jsonl training.output_dir=home-7b-sft
"""


def add_commands(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command("train", help=TRAIN_HELP)(train)


def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="YAML file or shipped recipe.")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE...", help="Settings that replace the recipe's.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print the memory it needs and stop.")] = False,
    devices: Annotated[int, typer.Option(min=1, help="For --estimate: how many GPUs share the work.")] = 1,
    device_memory: Annotated[float, typer.Option(min=1, help="For --estimate: memory of a GPU, in GiB.")] = 80.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Use an output directory that holds files.")] = False,
    unsafe_local: Annotated[
        bool, typer.Option("--unsafe-local", help="Tools: where no sandbox can be made, run programs with your rights.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe as it was understood and stop.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="Print the names of the shipped recipes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train."""
    from metis_home.training.recipe import load_recipe, shipped_recipes

    if list_recipes:
        print("\n".join(shipped_recipes()))
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe: a YAML file, or one of `metis-home train --list`.")
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with what is there, --overwrite starts over it: choose one.")
    if unsafe_local:
        settings = [*(settings or []), "training.unsafe_local=true"]
    if estimate:
        # How much memory it takes depends neither on the rows nor on where the output goes.
        stand_ins = {"data.train": "none", "training.output_dir": "none", "model.path": "''"}
        _print_estimate(load_recipe(recipe, settings or [], stand_ins), devices, device_memory, as_json)
        return
    loaded = load_recipe(recipe, settings or [])
    if show:
        print(json.dumps(dataclasses.asdict(loaded), indent=2, default=str))
        return

    from metis_home.training.run import run_recipe

    # What trains logs, some of it to stdout; there, only the result is to be found.
    with contextlib.redirect_stdout(sys.stderr):
        summary = run_recipe(loaded, resume=resume, overwrite=overwrite)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if as_json:
        print(json.dumps(dataclasses.asdict(summary)))
        return
    print(summary.output_dir)
    shown = (
        "loss",
        "lm_loss",
        "router_loss",
        "router_accuracy",
        "eval_loss",
        "eval_router_accuracy",
        "reward",
        "eval_accuracy",
    )
    values = [f"{name} {summary.metrics[name]:.4g}" for name in shown if name in summary.metrics]
    print(f"{summary.steps} steps; {', '.join(values)}", file=sys.stderr)


def _print_estimate(recipe: "Recipe", devices: int, device_memory: float, as_json: bool) -> None:
    from metis_home.training.estimate import GIB, estimate_recipe

    found = estimate_recipe(recipe, devices=devices)
    fits = found.device <= device_memory * GIB
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "device": found.device, "devices": devices, "fits": fits}))
        return
    print(_table(found, devices))
    verdict = "fits into" if fits else "does NOT fit into"
    print(f"{found.device / GIB:.1f} GiB on each of {devices} {verdict} {device_memory:g} GiB.")


def _table(found: "MemoryEstimate", devices: int) -> str:
    from metis_home.training.estimate import GIB

    rows = [
        ("weights", found.weights, "this device's share"),
        ("gradients", found.gradients, ""),
        ("optimizer", found.optimizer, "moments and master weights"),
        ("gathered", found.gathered, "layers that are whole while they are used"),
        ("activations", found.activations, "kept for the backward pass"),
        ("head", found.head, "logits and their gradient"),
        ("reserve", found.reserve, "fragmentation, CUDA context, buffers (ours: 10 % + 1.5 GiB)"),
    ]
    if found.rollouts:
        rows.insert(
            -1,
            ("rollouts", found.rollouts, "while generating, instead of the three before"),
        )
    lines = [f"{found.parameters / 1e9:.2f} B parameters, {found.trainable / 1e9:.2f} B train, {devices} devices"]
    lines += [f"  {name:12} {size / GIB:8.2f} GiB  {note}".rstrip() for name, size, note in rows]
    if found.host:
        lines.append(f"  {'host':12} {found.host / GIB:8.2f} GiB  offloaded, in each process")
    return "\n".join(lines)

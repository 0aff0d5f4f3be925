"""`python -m metis_home.kernels.tune`: measure launch configurations on this GPU and write them into the user's table.

For every kernel and row count it times the candidates around the shipped default, interleaved, on random data, and keeps
the fastest that also computes the right thing. Then it times the implementations (slices, grouped, decode) against each
other and writes the crossover. Nothing else ever tunes: at run time tables are only read.
"""

import argparse
import functools
import itertools
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from . import decode, slices
from .down import down
from .gate_up import gate_up
from .grad_input import grad_a, grad_x
from .grad_weight import grad_weight
from .grouped import backward as grouped_backward
from .grouped import forward as grouped_forward
from .launch_table import Config, device_slug, shape_key, table_for, triton_minor, user_table
from .reference import ExpertWeights, find_runs

logger = logging.getLogger("metis_home.kernels.tune")
GROUPED_ROWS = (256, 512, 1024, 2048, 4096, 8192, 16384)
DECODE_ROWS = (16, 32, 64, 128)


def median_ms(call: Callable[[], object], rounds: int) -> float:
    """Median milliseconds of one call, by device events, after a warm-up that also compiles."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def candidates(kernel: str, default: Config) -> Iterator[Config]:
    """The default, then its neighbours. A kernel's smaller set keeps a full run to minutes."""
    yield default
    grid: Iterable[tuple[int, int, int, int]]
    if kernel.startswith("decode"):
        grid = itertools.product((16, 32, 64), (64, 128, 256), (4, 8), (3, 4, 5))
        names = ("BLOCK_OUT", "BLOCK_IN", "num_warps", "num_stages")
    else:
        blocks = ((128, 128), (256, 64), (128, 64), (64, 128), (128, 256), (64, 256))
        grid = ((rows, out, w, s) for (rows, out), w, s in itertools.product(blocks, (4, 8), (3, 4)))
        names = ("BLOCK_ROWS", "BLOCK_OUT", "num_warps", "num_stages")
    splits = (1, 2, 4, 8) if "SPLIT" in default else (None,)
    for values, split in itertools.product(grid, splits):
        config = default | dict(zip(names, values, strict=True)) | ({} if split is None else {"SPLIT": split})
        if config != default:
            yield config


def best(kernel: str, default: Config, run: Callable[[Config], object], rounds: int) -> tuple[Config, float, float]:
    """(fastest configuration, its milliseconds, the default's). One that does not compile or launch is left out."""
    want = run(default)
    timed: list[tuple[float, Config]] = []
    for config in candidates(kernel, default):
        try:
            _check_equal(run(config), want)
            timed.append((median_ms(functools.partial(run, config), rounds), config))
        except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError, ArithmeticError) as error:
            logger.debug("%s %s: %s", kernel, config, str(error).splitlines()[0])
    fastest = min(timed, key=lambda pair: pair[0])
    return fastest[1], fastest[0], timed[0][0]


def _check_equal(found: Any, want: Any) -> None:
    pairs = zip(found, want, strict=True) if isinstance(found, tuple) else [(found, want)]
    for a, b in pairs:
        if a is not None and (a - b).abs().max() > 0.02 * b.abs().max():
            raise ArithmeticError("wrong result")


def tune(hidden: int, features: int, rounds: int) -> tuple[dict[str, Any], list[str]]:
    """(the table's entries for this shape in bfloat16, lines saying what changed)."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    table, report = table_for(device), []
    entries: dict[str, Any] = {name: {} for name in ("forward", "backward")}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * shape[-1] ** -0.5

    first, second = (
        ExpertWeights(random(features, hidden), random(features, hidden), random(hidden, features)) for _ in range(2)
    )
    experts = (first, second)

    def keep_best(kernel: str, rows: int, run: Callable[[Config], object]) -> None:
        default = table.find(kernel, hidden, features, dtype, rows)
        config, ours, before = best(kernel, default, run, rounds)
        entries.setdefault(kernel, {})[str(rows.bit_length() - 1)] = config
        report.append(f"{kernel} rows={rows}: {before:.4f} -> {ours:.4f} ms {'' if config == default else config}")
        logger.info(report[-1])

    for rows in DECODE_ROWS:
        x, a, ids = random(rows, hidden), random(rows, features), torch.arange(rows, device=device) % 2
        keep_best("decode_gate_up", rows, lambda c: decode.decode_gate_up(x, experts, ids, 1, config=c))  # noqa: B023
        keep_best("decode_down", rows, lambda c: decode.decode_down(a, experts, ids, 1, config=c))  # noqa: B023
    for rows in GROUPED_ROWS:
        x, a, ids = random(rows, hidden), random(rows, features), torch.tensor([0, 1], device=device)
        args = (experts, ids, rows // 2)
        calls: dict[str, Callable[[Config], object]] = {
            "gate_up": lambda c: gate_up(x, *args, keep=False, config=c)[0],  # noqa: B023
            "gate_up_keep": lambda c: gate_up(x, *args, keep=True, config=c),  # noqa: B023
            "down": lambda c: down(a, *args, config=c),  # noqa: B023
            "grad_a": lambda c: grad_a(x, a, a, *args, config=c),  # noqa: B023
            "grad_x": lambda c: grad_x(a, a, *args, config=c),  # noqa: B023
            "grad_w": lambda c: grad_weight(a, x, ids, rows // 2, (True, True), config=c),  # noqa: B023
        }
        for kernel, run in calls.items():
            keep_best(kernel, rows, run)
    for rows in (1, *DECODE_ROWS, *GROUPED_ROWS):
        _choose_implementation(entries, report, experts, random(rows, hidden), rounds)
    return entries, report


def _choose_implementation(entries, report, experts, x_ND, rounds) -> None:
    """Time whole forwards and backwards of a half-half batch; slices win ties, being the simpler."""
    rows, device = x_ND.shape[0], x_ND.device
    half = max(rows // 2, 1)
    ids = torch.tensor([0, 1][: rows // half], device=device)
    runs = tuple(find_runs(ids, half))
    choices: dict[str, Callable[[], object]] = {
        "slices": lambda: slices.forward(x_ND, experts, runs, None, False),
        "grouped": lambda: grouped_forward(x_ND, experts, ids, half, None, False),
    }
    if rows <= decode.MAX_ROWS:
        choices["decode"] = lambda: decode.forward(x_ND, experts, ids, half, None)
    _, gate, up = slices.forward(x_ND, experts, runs, None, True)
    needs = [True] * 7
    backwards = {
        "slices": lambda: _slices_backward(x_ND, experts, runs, gate, up),
        "grouped": lambda: grouped_backward(x_ND, x_ND, experts, ids, half, gate, up, needs),
    }
    for direction, calls in (("forward", choices), ("backward", backwards)):
        times = {name: median_ms(call, rounds) for name, call in calls.items()}
        entries[direction][str(rows.bit_length() - 1)] = min(times, key=lambda name: times[name])
        report.append(f"{direction} rows={rows}: " + ", ".join(f"{name} {ms:.4f} ms" for name, ms in times.items()))
        logger.info(report[-1])


def _slices_backward(x_ND, experts, runs, gate, up):
    _, grad_gate, grad_up, a = slices.input_gradients(x_ND, x_ND, experts, runs, gate, up, True)
    return [
        slices.weight_gradient(grad, values, runs, branch)
        for branch in (0, 1)
        for grad, values in ((grad_gate, x_ND), (grad_up, x_ND), (x_ND, a))
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m metis_home.kernels.tune", description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=3584)
    parser.add_argument("--intermediate-size", type=int, default=18944)
    parser.add_argument("--rounds", type=int, default=20, help="timed calls per candidate")
    parser.add_argument("--out", type=Path, help="default: the user's table, which is found again by itself")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not torch.cuda.is_available():
        print("tune: no GPU that this torch can use", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    entries, report = tune(options.hidden_size, options.intermediate_size, options.rounds)
    out = options.out or user_table(name)
    base = table_for(torch.device("cuda"))
    shapes = dict(base.shapes) | {shape_key(options.hidden_size, options.intermediate_size, torch.bfloat16): entries}
    data = {"target": base.target, "device": device_slug(name), "triton": triton_minor(), "measured": True}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(data | {"shapes": shapes, "report": report}, indent=1), encoding="utf-8")
    partial.replace(out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the studies have in common as programs: arguments, processes of one thread, where it ran, the report's file."""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .stages import Json

ROOT = Path(__file__).resolve().parents[2]


def shared_arguments(description: str, report: str) -> argparse.Namespace:
    """The command line of a study in the folder that the studies of Stage-SFT and of Stage-RL share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "study-sft", metavar="DIR", help="working folder")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results" / report, metavar="FILE")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images", metavar="DIR", help="where plots go")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes of one thread (default: 2)")
    parser.add_argument("--tiny", action="store_true", help="a few steps: tries the machinery, meets no goal")
    return parser.parse_args()


def run_jobs(run: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int) -> list[Any]:
    """`run(*job)` of every job, in order; with several workers each in a process of one thread."""
    if workers == 1:
        return [run(*job) for job in jobs]
    with multiprocessing.get_context("spawn").Pool(workers, initializer=one_thread) as pool:
        return pool.starmap(run, jobs, chunksize=1)


def one_thread() -> None:
    """A worker uses one core."""
    import torch

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)


def environment(**more: object) -> Json:
    """Versions and hardware."""
    import torch
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line for line in lines if line.startswith("model name")), "unknown").split(":")[-1]
    return {
        "metis_home": version("metis_home"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": model.strip(),
        "cores": os.cpu_count(),
        **more,
    }


def write_report(file: Path, report: Json) -> None:
    """Write the report as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")

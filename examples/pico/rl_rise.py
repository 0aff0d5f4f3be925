"""The RISE pipeline of the study: `metis-home rise` on rows of the families, killed once and started again."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metis_home.training.checkpoints import newest_checkpoint
from metis_home.training.data.records import write_rows

from .families import FAMILY_OF

RECIPE = Path(__file__).with_name("rise.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class RiseSettings:
    """How many rows; what else the recipe is told. All numbers are ours."""

    prompts: int = 1200
    """Reasoning rows: RL trains on them, and pass rates are taken on them."""
    non_thinking: int = 1200
    held_out: int = 300
    """Per family."""
    overrides: tuple[str, ...] = ()


def write_rise_data(folder: Path, prompts: Path, families: Path, settings: RiseSettings) -> dict[str, int]:
    """Write prompts.jsonl, expert.jsonl, direct.jsonl and held_out.jsonl.

    The expert is exact: it answers with the families' own derivations. `build-sft` verifies it all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reasoning = _rows(prompts / "rl.jsonl", folder, "reasoning")[: settings.prompts]
    direct = _rows(families / "sft.jsonl", folder, "direct")[: settings.non_thinking]
    held_out = [
        row
        for family in ("direct", "reasoning")
        for row in _rows(families / "test.jsonl", folder, family)[: settings.held_out]
    ]
    expert = [{"id": row["id"], "reasoning": row["derivation"], "answer": row["answer"]} for row in reasoning]
    parts = {"prompts": reasoning, "expert": expert, "direct": direct, "held_out": held_out}
    for name, rows in parts.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in parts.items()}


def run_pipeline(folder: Path, dense: Path, data: Path, settings: RiseSettings) -> dict[str, Any]:
    """Run `metis-home rise`, kill it at Stage-RL's first checkpoint, run it again; what it came to.

    Raises:
        RuntimeError: it ended before it could be killed, or the second run failed.
    """
    out = folder / "out"
    command = [
        *(sys.executable, "-m", "metis_home.cli", "rise", str(RECIPE), f"model={dense}", f"output_dir={out}"),
        *(f"prompts={data / 'prompts.jsonl'}", f"non_thinking={data / 'direct.jsonl'}"),
        *(f"held_out={data / 'held_out.jsonl'}", f"sft_set.expert_file={data / 'expert.jsonl'}"),
        *settings.overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    model = out / "1-rl" / "model"
    before = _cpu_seconds()
    run = subprocess.Popen(command, start_new_session=True, env=environment)
    try:
        while newest_checkpoint(model) is None and run.poll() is None:
            time.sleep(0.01)
        if run.poll() is not None:
            raise RuntimeError(f"the pipeline ended with {run.returncode} before it could be killed, see {out}")
    finally:
        _kill(run)
    checkpoint = Path(str(newest_checkpoint(model)))
    killed_at, written = checkpoint.name, (checkpoint / "trainer_state.json").stat().st_mtime_ns
    was_done = (out / "1-rl" / "done.json").exists()

    again = subprocess.run(command, env=environment, check=False)
    if again.returncode != 0:
        raise RuntimeError(f"the second run of the pipeline failed, see the log.txt files in {out}")
    return {
        "finished": (out / "6-evaluate" / "done.json").exists(),
        "killed_at": killed_at,
        "resumed": not was_done and (checkpoint / "trainer_state.json").stat().st_mtime_ns == written,
        "summary": json.loads((out / "summary.json").read_text()),
        "cpu_seconds_of_commands": _cpu_seconds() - before,
    }


def _kill(run: "subprocess.Popen[bytes]") -> None:
    """End the pipeline and the command it waits for."""
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def _cpu_seconds() -> float:
    """Of children that have ended, theirs included if they waited for them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _rows(file: Path, folder: Path, family: str) -> list[dict[str, Any]]:
    """Rows of a family, with image paths that hold from `folder`."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {**row, "image": os.path.relpath(file.parent / row["image"], folder)}
        for row in rows
        if FAMILY_OF[row["source"]] == family
    ]

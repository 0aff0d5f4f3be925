"""Trainers in processes of their own that take turns, one optimizer step each: a noisy machine disturbs all alike."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO


def take_turns(
    commands: Mapping[str, Sequence[str]], rounds: int, environment: Mapping[str, str]
) -> dict[str, list[dict[str, float]]]:
    """One step of each worker per round, every other round in reverse order; the first round is discarded.

    Args:
        commands: {name: command line of a worker whose trainer has a `turn_callback`}.
        environment: of the workers, beside this process's own.
    Returns:
        {name: what the worker wrote about each of its steps}.
    """
    workers = {
        name: subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        for name, command in commands.items()
    }
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    try:
        for worker in workers.values():
            _line(worker)  # ready: the first step is done
        for index in range(rounds + 1):
            for name in list(workers) if index % 2 else list(workers)[::-1]:
                _write(workers[name], "step\n")
                step = json.loads(_line(workers[name]))
                if index:
                    steps[name].append(step)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return steps


def result_channel() -> TextIO:
    """Where a worker writes its results; whatever its trainer prints goes to stderr from now on."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return channel


def turn_callback(channel: TextIO, describe: Callable[[], dict[str, float]]):
    """A TrainerCallback that waits for its turn before every optimizer step, and says how long the last one took.

    Args:
        describe: further numbers about the step that has just ended.
    """
    from transformers import TrainerCallback

    class Turn(TrainerCallback):
        wall = cpu = 0.0
        is_first = True

        def on_step_end(self, args, state, control, **kwargs) -> None:
            step = {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}
            step |= {"peak_bytes": peak_bytes(), **describe()}
            channel.write("ready\n" if self.is_first else json.dumps(step) + "\n")
            self.is_first = False
            if not sys.stdin.readline():
                control.should_training_stop = True
            self.wall, self.cpu = time.perf_counter(), time.process_time()

    return Turn()


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict[str, object]:
    """What a figure was measured on."""
    import platform
    from datetime import date

    import torch
    import transformers

    return {
        "date": str(date.today()),
        "processor": platform.machine(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "2")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _line(worker: subprocess.Popen) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended with status {worker.wait()}; its message is above")
    return line


def _write(worker: subprocess.Popen, text: str) -> None:
    assert worker.stdin is not None
    worker.stdin.write(text)
    worker.stdin.flush()

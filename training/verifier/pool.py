"""math-verify in a bounded pool of processes, each killed and replaced when an item takes too long.

Why processes: sympy cannot be interrupted from Python, `signal.alarm` works in main threads only (and silently turns all
rewards into zeros elsewhere), and a thread cannot be killed. Why not `multiprocessing`: its spawned workers import the
user's main script again, which starts a second training where `if __name__ == "__main__"` is missing; a forked worker
inherits CUDA. So a worker is a plain program that reads lines on a pipe.
"""

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from metis_home.errors import EngineError

Status = Literal[
    "equal", "different", "prediction_unreadable", "gold_unreadable", "prediction_too_long", "gold_too_long"
]

SECONDS_PER_ITEM = 2.0  # of processor time, so that no reward depends on the machine's load; usual are 1 to 5 ms
WALL_FACTOR = 10.0  # wall clock over processor time at which an item is given up all the same; ours
SECONDS_TO_START = 60.0  # importing sympy, on a busy machine
MEMORY_PER_WORKER = 1 << 30  # bytes of address space
MAX_WORKERS = 8
_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What math-verify said; `..._too_long` in time: the worker was killed, or died, while it read that side."""

    status: Status
    seconds: float


class MathPool:
    """Compare expressions from any thread. Workers start when they are first needed.

    Args:
        workers: most processes at a time; None: half the cores, at most 8.
        seconds: processor time for one item, after which its worker is killed; so it is after `WALL_FACTOR` times as
            long by the wall clock, whatever it waits for.
    """

    def __init__(self, workers: int | None = None, seconds: float = SECONDS_PER_ITEM) -> None:
        self.workers = workers or min(MAX_WORKERS, max(1, (os.cpu_count() or 2) // 2))
        self.seconds = seconds
        self.killed = 0
        self._slots = threading.BoundedSemaphore(self.workers)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._closed = False

    def compare(self, gold: str, prediction: str, tolerance: float | None = None) -> Comparison:
        """Compare two texts, each LaTeX inside `$...$`; blocks until a worker is free, then as long as one
        item may take (`seconds` above).

        Raises:
            EngineError: a worker cannot be started: math-verify is missing, or the pool is closed.
        """
        comparison = self._compare_once(gold, prediction, tolerance)
        if comparison.status == "gold_too_long" and comparison.seconds < self.seconds:
            # It died at once: killed from outside while it was idle, perhaps. Twice in a row is the gold's fault.
            comparison = self._compare_once(gold, prediction, tolerance)
        return comparison

    def close(self) -> None:
        """Kill all workers; those in use too."""
        with self._lock:
            self._closed = True
            workers = [*self._idle, *self._busy]
            self._idle.clear()
        for worker in workers:
            worker.kill()

    def _compare_once(self, gold: str, prediction: str, tolerance: float | None) -> Comparison:
        with self._slots:
            worker = self._take()
            try:
                return worker.compare(gold, prediction, tolerance, self.seconds)
            except BaseException:  # an interrupt between request and reply leaves the pipe out of step
                worker.kill()
                raise
            finally:
                self._give_back(worker)

    def process_ids(self) -> list[int]:
        """Of the workers that live now."""
        with self._lock:
            return [worker.process.pid for worker in (*self._idle, *self._busy) if worker.is_alive()]

    def _take(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise EngineError("the verifier's process pool is closed")
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive():
                    self._busy.add(worker)
                    return worker
        worker = _Worker(self.seconds)
        with self._lock:
            self._busy.add(worker)
        return worker

    def _give_back(self, worker: "_Worker") -> None:
        with self._lock:
            self._busy.discard(worker)
            if worker.is_alive() and not self._closed:
                self._idle.append(worker)
                return
            self.killed += 1
        worker.kill()


class _Worker:
    """One process and the two pipes to it. Used by one thread at a time."""

    def __init__(self, seconds: float) -> None:
        self._unread = b""
        self._number = 0
        # -P: the worker's folder must not come before the standard library on its path.
        # A session of its own: Ctrl-C in the terminal is the trainer's to handle.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        try:
            # The worker's own timers are the second line: they work when this process is gone.
            self._send(
                {
                    "path": [p or os.getcwd() for p in sys.path],
                    "memory": MEMORY_PER_WORKER,
                    "processor": seconds + 1,
                    "wall": WALL_FACTOR * seconds + 1,
                }
            )
            started = time.monotonic()
            hello = self._receive(lambda: started + SECONDS_TO_START - time.monotonic())
        except BaseException:
            self.kill()
            raise
        if hello is None or "ready" not in hello:
            self.kill()
            why = f'{hello["missing"]}. Install it: pip install "metis_home[train]"' if hello else "it did not start"
            raise EngineError(f"math-verify cannot run in its own process ({sys.executable}): {why}")

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def compare(self, gold: str, prediction: str, tolerance: float | None, seconds: float) -> Comparison:
        start, used = time.monotonic(), self._processor_seconds()

        def left() -> float:
            waited, worked = time.monotonic() - start, self._processor_seconds() - used
            return min(WALL_FACTOR * seconds - waited, seconds - worked)

        self._number += 1
        gold_read: bool | None = None
        result: str | None = None
        self._send({"id": self._number, "gold": gold, "prediction": prediction, "tolerance": tolerance})
        while result is None:
            reply = self._receive(left)
            if reply is None:
                self.kill()
                break
            if reply["id"] == self._number:
                gold_read = bool(reply.get("gold_read", gold_read))
                result = reply.get("result")  # type: ignore[assignment]
        return Comparison(_status(gold_read, result), time.monotonic() - start)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _send(self, message: dict[str, object]) -> None:
        assert self.process.stdin is not None
        data = json.dumps(message).encode() + b"\n"
        # At most a few KiB: fits the pipe, never blocks. If the worker died, the missing reply tells.
        with contextlib.suppress(OSError):
            self.process.stdin.write(data)

    def _processor_seconds(self) -> float:
        with contextlib.suppress(psutil.Error):  # it has ended: the closed pipe tells
            times = psutil.Process(self.process.pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def _receive(self, left: Callable[[], float]) -> dict[str, object] | None:
        """The next reply, or None where no seconds are `left` or the worker ended."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                seconds = left()
                if seconds <= 0:
                    return None
                if not selector.select(max(seconds, 0.01)):
                    continue
                data = os.read(self.process.stdout.fileno(), 65536)
                if not data:
                    return None
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


def _status(gold_read: bool | None, result: str | None) -> Status:
    if gold_read is None:
        return "gold_too_long"
    if not gold_read:
        return "gold_unreadable"
    if result is None:
        return "prediction_too_long"
    return {"equal": "equal", "different": "different", "unreadable": "prediction_unreadable"}[result]  # type: ignore[return-value]


_pool: MathPool | None = None
_pool_lock = threading.Lock()


def shared_pool() -> MathPool:
    """The pool of this process; made on first use, closed at exit, never shared with a forked child."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = MathPool()
            atexit.register(_pool.close)
        return _pool


def _forget_after_fork() -> None:
    # The workers' pipes belong to the parent: a child that wrote to them would mix its answers with the parent's.
    global _pool, _pool_lock
    if _pool is not None:
        atexit.unregister(_pool.close)
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)

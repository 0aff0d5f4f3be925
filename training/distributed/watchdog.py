"""Ends a run that hangs, and says where each rank was.

Ranks of a distributed run wait for each other in collectives. If one of them never comes, all the others wait in silence,
with GPUs that look busy. So every process has a watchdog: a thread that knows which stage the process is in. When a stage
takes longer than the limit, the watchdog that sees it first asks the watchdogs of all ranks where they are (through the
process group's key-value store, which needs no collective), prints one report, and every process ends.

    enter("micro-batch 2 of 4", step=17)          each stage, from the main thread
    no new stage for `seconds`                    alarm: this rank's stage and stacks go into the store
    every other watchdog sees the alarm           theirs too
    the first one prints the report of all        every process exits with EXIT_STUCK

A process whose interpreter does not run any more (C code that keeps Python's lock) cannot answer: the report says so, and
`faulthandler`, which needs no lock, prints its stacks and ends it a little later.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch.distributed as dist

from metis_home.errors import TrainingError

logger = logging.getLogger(__name__)

EXIT_STUCK = 70
_ANSWER_SECONDS = 10.0  # how long the others have to answer an alarm
_LAST_RESORT_SECONDS = 60.0  # after that, faulthandler ends a process that did not end itself
_FRAMES, _FRAMES_OF_OTHERS = 30, 2
_ALARM, _DONE = "alarm", "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one rank is."""

    rank: int
    host: str
    pid: int
    stage: str
    seconds: float
    """How long it has been in this stage."""
    stages: int
    """How many stages it has entered: the rank with the fewest is the one that others wait for."""
    facts: dict[str, str]
    """What is known beside the stage: step, rows, ..."""
    stack: str
    """The main thread's stack, innermost call last; then those of other threads."""


class Watchdog:
    """Watches this process, see the module's head. `enter` each stage; `close` when there is nothing more to watch.

    Args:
        seconds: the longest that a stage may take.
        rank, world_size: of this process.
        store: a key-value store that all ranks reach and nothing else uses, or None for a process that is alone.
        poll_seconds: how often the thread looks.
        on_stuck: called with the report instead of ending the process (the other ranks' watchdogs do as theirs say).
        stream: where the report is printed; default: standard error.
    """

    def __init__(
        self,
        seconds: float,
        *,
        rank: int = 0,
        world_size: int = 1,
        store: "dist.Store | None" = None,
        poll_seconds: float = 1.0,
        on_stuck: Callable[[str], None] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.seconds = seconds
        self.rank, self.world_size = rank, world_size
        self._store = store
        self._poll_seconds = min(poll_seconds, seconds / 4)
        self._on_stuck = on_stuck
        self._stream = stream
        self._main_thread = threading.get_ident()
        self._stage: tuple[str, float, dict[str, object]] | None = None
        self._stages = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="metis-watchdog", daemon=True)
        self._thread.start()

    @classmethod
    def of_process_group(cls, seconds: float, **options) -> "Watchdog":
        """The watchdog of this rank of torch.distributed's default group, or of a process that is alone."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls(seconds, **options)
        return cls(seconds, rank=dist.get_rank(), world_size=dist.get_world_size(), store=_side_channel(), **options)

    def enter(self, stage: str, **facts: object) -> None:
        """This process begins `stage`; the clock starts again. Facts are printed with it (`str` of them, if asked)."""
        self._stages += 1
        self._stage = (stage, time.monotonic(), facts)
        if self._on_stuck is None and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self.seconds + _LAST_RESORT_SECONDS, exit=True, file=sys.__stderr__)

    def rest(self) -> None:
        """Nothing is watched until the next `enter`."""
        self._stage = None
        if self._on_stuck is None:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stop watching for good."""
        self.rest()
        self._closed.set()
        if threading.get_ident() != self._thread.ident:
            self._thread.join(timeout=5)

    @property
    def place(self) -> Place:
        """Where this process is now."""
        stage, since, facts = self._stage or ("nothing that is watched", time.monotonic(), {})
        return Place(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            stage=stage,
            seconds=time.monotonic() - since,
            stages=self._stages,
            facts={name: str(value) for name, value in facts.items()},
            stack=self._stack(),
        )

    def _watch(self) -> None:
        while not self._closed.wait(self._poll_seconds):
            current = self._stage
            is_late = current is not None and time.monotonic() - current[1] > self.seconds
            if is_late or self._others_ask():
                self._alarm()
                return

    def _others_ask(self) -> bool:
        try:
            return self._store is not None and self._store.check([_ALARM])
        except Exception as error:
            logger.warning("the watchdogs cannot reach each other any more (%s): each rank reports alone", error)
            self._store = None
            return False

    def _alarm(self) -> None:
        place = self.place
        report = None
        try:
            report = self._shared_report(place) if self._store is not None else report_of([place], 1, self.seconds)
        except Exception as error:  # whatever the store does: this rank's own place must be seen
            report = report_of([place], self.world_size, self.seconds) + f"\n(the other ranks cannot be asked: {error})"
        if report is not None:
            print(report, file=self._stream or sys.__stderr__, flush=True)
        message = report or f"rank {self.rank} was stopped: another rank's watchdog found the run stuck and reports it."
        if self._on_stuck is not None:
            self._on_stuck(message)
            return
        _leave_word_for_torchrun(message.split("\n---")[0])  # the stacks were printed
        os._exit(EXIT_STUCK)

    def _shared_report(self, place: Place) -> str | None:
        """The report, if this rank was the first to see that something is stuck; else None, once it was printed."""
        assert self._store is not None
        self._store.set(f"place/{self.rank}", json.dumps(asdict(place)))
        is_first = self._store.compare_set(_ALARM, "", str(self.rank)).decode() == str(self.rank)
        until = time.monotonic() + _ANSWER_SECONDS
        if not is_first:
            while time.monotonic() < until + _ANSWER_SECONDS and not self._store.check([_DONE]):
                time.sleep(0.1)
            return None
        found = {self.rank: place}
        while len(found) < self.world_size and time.monotonic() < until:
            for rank in range(self.world_size):
                if rank not in found and self._store.check([f"place/{rank}"]):
                    found[rank] = Place(**json.loads(self._store.get(f"place/{rank}")))
            time.sleep(0.1)
        report = report_of(list(found.values()), self.world_size, self.seconds)
        self._store.set(_DONE, "1")
        return report

    def _stack(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        parts = []
        for ident, frame in sorted(sys._current_frames().items(), key=lambda pair: pair[0] != self._main_thread):
            if ident == self._thread.ident:
                continue
            is_main = ident == self._main_thread
            name = "main thread" if is_main else f"thread {names.get(ident, ident)}"
            lines = traceback.format_stack(frame)[-(_FRAMES if is_main else _FRAMES_OF_OTHERS) :]
            parts.append(f"{name}:\n" + "".join(lines).rstrip())
        return "\n".join(parts)


def report_of(places: list[Place], world_size: int, seconds: float) -> str:
    """The text that is printed: a line for each rank, who is behind, then the stacks, equal ones once."""
    places = sorted(places, key=lambda place: place.rank)
    answered = {place.rank for place in places}
    lines = [f"WATCHDOG: no progress for {seconds:g} s. Where each rank is:"]
    for place in places:
        facts = "".join(f", {name} {value}" for name, value in place.facts.items())
        lines.append(
            f"  rank {place.rank} ({place.host}, process {place.pid}): {place.stage}{facts}; "
            f"{place.seconds:.0f} s there, stage number {place.stages}"
        )
    for rank in sorted(set(range(world_size)) - answered):
        lines.append(f"  rank {rank}: no answer; its process is gone, or its interpreter is blocked")
    fewest = min(place.stages for place in places)
    behind = [place.rank for place in places if place.stages == fewest]
    if len(behind) < len(places):
        lines.append(f"Behind the others: rank {', '.join(map(str, behind))}. Look at its stack first.")
    stacks: dict[str, list[int]] = {}
    for place in places:
        stacks.setdefault(place.stack, []).append(place.rank)
    for stack, ranks in stacks.items():
        lines.append(f"--- rank {', '.join(map(str, ranks))}\n{stack}")
    lines.append("The run is ended. docs/distributed.md says what usually causes this.")
    return "\n".join(lines)


def _side_channel() -> "dist.Store":
    """A connection of our own to the default group's store: the main thread may be waiting on the other one."""
    store: Any = dist.distributed_c10d._get_default_store()
    try:
        store = store.clone()
    except (AttributeError, RuntimeError, NotImplementedError):
        logger.debug("this store cannot be cloned; the watchdog shares the process group's connection")
    # Every run of one process group gets fresh keys, the same on all ranks: they start their watchdogs equally often.
    _side_channel.count += 1  # type: ignore[attr-defined]
    return dist.PrefixStore(f"metis-watchdog-{_side_channel.count}", store)  # type: ignore[attr-defined]


_side_channel.count = 0  # type: ignore[attr-defined]


def _leave_word_for_torchrun(message: str) -> None:
    """torchrun prints, for the process that failed first, what stands in this file."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        error = TrainingError(message)
        content: Mapping[str, object] = {
            "message": {
                "message": f"{type(error).__name__}: {message}",
                "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))},
            }
        }
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(content, file)
        except OSError:
            logger.debug("torchrun's error file %s cannot be written", path)

"""Watch a running program: collect what it prints, bound what it uses in all, end it and everything it started."""

from __future__ import annotations

import os
import select
import signal
import time

from . import wire

TYPE_CHECKING = False  # as typing's, without the 10 ms that importing typing takes
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

_PERIOD = 0.02  # seconds between two looks at memory and clocks
_CHUNK = 1 << 16
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Outcome:
    """What became of a program. (A plain class: dataclasses would take 10 ms to import, for every program.)"""

    __slots__ = (
        *("stopped", "exit_code", "signal", "seconds", "cpu_seconds", "peak_bytes", "cpu_limit", "left_behind"),
        "output",
    )

    def __init__(self) -> None:
        self.stopped = ""  # or the limit that ended it: time, memory, output
        self.exit_code: int | None = None
        self.signal: int | None = None
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.peak_bytes = 0  # largest total that was seen
        self.cpu_limit = False  # its first process had used up its processor time when it was killed
        self.left_behind = 0  # processes that were still there when the program ended
        self.output = (bytearray(), bytearray())


def watch(
    child: int,
    pipes: tuple[int, int],
    limits: dict[str, float],
    used_bytes: Callable[[], int],
    kill_all: Callable[[], None],
) -> Outcome:
    """Wait for `child`, stop it at a limit, and return when it and all its descendants are gone.

    Args:
        pipes: where its standard output and error arrive.
        limits: wall_seconds, total_bytes, output_bytes (for each of the two).
        used_bytes: memory of everything that runs in here, in bytes.
        kill_all: sends SIGKILL to everything that runs in here, descendants that moved away included.
    """
    outcome, start = Outcome(), time.monotonic()
    open_pipes = {pipes[0]: outcome.output[0], pipes[1]: outcome.output[1]}
    for fd in pipes:
        os.set_blocking(fd, False)
    next_look = start
    status = None
    while status is None and not outcome.stopped:
        if open_pipes:
            ready = select.select(list(open_pipes), [], [], _PERIOD)[0]
        else:
            ready = []
            time.sleep(_PERIOD)
        for fd in ready:
            state = _read(fd, open_pipes[fd], int(limits["output_bytes"]))
            if state == "full":
                outcome.stopped = "output"
            elif state == "closed":
                del open_pipes[fd]
        now = time.monotonic()
        if now >= next_look and not outcome.stopped:
            next_look = now + _PERIOD
            used = used_bytes()
            outcome.peak_bytes = max(outcome.peak_bytes, used)
            if used > limits["total_bytes"]:
                outcome.stopped = "memory"
            elif now - start > limits["wall_seconds"]:
                outcome.stopped = "time"
        status = _reap(child, outcome, limits["cpu_seconds"])
    outcome.seconds = time.monotonic() - start
    _end(child, status, kill_all, outcome)
    for fd, buffer in open_pipes.items():
        if _read(fd, buffer, int(limits["output_bytes"])) == "full":
            outcome.stopped = outcome.stopped or "output"
    return outcome


def memory_in_use(proc: int, scratch: int) -> int:
    """Anonymous memory of every process but the first, plus the writable file system, in bytes.

    A page that several processes share after a fork is counted for each: the sum is never too small.
    """
    total = 0
    for name in os.listdir(proc):
        if name.isdigit() and name != "1":
            try:
                fd = os.open(f"{name}/statm", os.O_RDONLY, dir_fd=proc)
            except OSError:
                continue  # gone
            try:
                _, resident, shared = os.read(fd, 128).split()[:3]
                total += (int(resident) - int(shared)) * _PAGE
            except (OSError, ValueError):
                pass
            finally:
                os.close(fd)
    return total + file_system_in_use(scratch)


def file_system_in_use(scratch: int) -> int:
    """What the writable file system holds, in bytes."""
    space = os.fstatvfs(scratch)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


def _read(fd: int, buffer: bytearray, limit: int) -> Literal["open", "closed", "full"]:
    """Take what is there, up to `limit` bytes in all."""
    while True:
        try:
            chunk = os.read(fd, _CHUNK)
        except BlockingIOError:
            return "open"
        if not chunk:
            return "closed"
        room = limit - len(buffer)
        buffer += chunk[:room]
        if len(chunk) > room:
            return "full"


def _reap(child: int, outcome: Outcome, cpu_seconds: float) -> int | None:
    """Collect the dead, orphans too; return the child's status once it is among them."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        outcome.cpu_seconds += usage.ru_utime + usage.ru_stime
        if pid == child:
            _note(status, outcome)
            outcome.cpu_limit = usage.ru_utime + usage.ru_stime >= cpu_seconds
            return status


def _end(child: int, status: int | None, kill_all: Callable[[], None], outcome: Outcome) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        kill_all()
        try:
            pid, found, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.001)
            continue
        outcome.cpu_seconds += usage.ru_utime + usage.ru_stime
        if pid == child and status is None:
            status = found
            _note(found, outcome)
        elif os.WIFSIGNALED(found) and os.WTERMSIG(found) == signal.SIGKILL:
            outcome.left_behind += 1  # not the already dead, whom nobody had collected


def _note(status: int, outcome: Outcome) -> None:
    if os.WIFSIGNALED(status):
        outcome.signal = os.WTERMSIG(status)
    else:
        outcome.exit_code = os.WEXITSTATUS(status)


def ignore_signals() -> None:
    """The first process of a process namespace receives from inside only what it has handlers for: have none."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        try:
            signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):
            continue


def report(outcome: Outcome, changed: list[tuple[str, bytes]], kept: list[str], left_out: list[str]) -> bytes:
    """The message that tells the caller: what became of the program, its output, the files it changed."""
    header = {
        **{name: getattr(outcome, name) for name in outcome.__slots__ if name != "output"},
        "kept": kept,
        "left_out": left_out,
    }
    output = [(name, bytes(part)) for name, part in zip(("stdout", "stderr"), outcome.output, strict=True)]
    return wire.pack(header, [*output, *changed])

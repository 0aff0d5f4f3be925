"""The first process of the enclosure: makes its file system, starts the program, watches it, reports, and ends all.

It runs no line of the program, keeps no file of the outside open but its end of the report's pipe, cannot be traced
(not dumpable, and the program has no rights), and receives no signal from inside. When it ends, for whatever reason,
the kernel kills every process of its namespace.
"""

from __future__ import annotations

import os
import signal

from . import collect, confine, kernel, mounts, watch, wire


def run(request: wire.Request, files: wire.Files) -> bytes:
    """Do everything and return the report."""
    limits = request["limits"]
    kernel.make_mounts_private()
    trees = mounts.copy_trees(request["readable"])
    watch.ignore_signals()
    os.setresgid(mounts.INNER_ID, mounts.INNER_ID, mounts.INNER_ID)
    os.setresuid(mounts.INNER_ID, mounts.INNER_ID, mounts.INNER_ID)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    proc = kernel.new_filesystem("proc")  # never attached: nothing inside sees it
    proc = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    mounts.build_root(
        trees,
        request["links"],
        files,
        scratch_bytes=int(limits["scratch_bytes"]),
        scratch_files=int(limits["scratch_files"]),
    )
    before = collect.snapshot(mounts.SCRATCH)
    scratch = os.open(mounts.SCRATCH, os.O_RDONLY | os.O_DIRECTORY)
    outcome = _start_and_watch(request, limits, proc, scratch)
    changed, kept, left_out = collect.collect(
        mounts.SCRATCH, before, max_files=int(limits["scratch_files"]), max_bytes=int(limits["scratch_bytes"])
    )
    return watch.report(outcome, changed, kept, left_out)


def _start_and_watch(request: wire.Request, limits: dict[str, float], proc: int, scratch: int) -> watch.Outcome:
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    child = os.fork()
    if child == 0:
        argv, environment = request["argv"], request["environment"]
        confine.become(argv, environment, limits, (out_write, err_write), enclosed=True)
    os.close(out_write)
    os.close(err_write)
    return watch.watch(
        child,
        (out_read, err_read),
        limits,
        used_bytes=lambda: watch.memory_in_use(proc, scratch),
        kill_all=_kill_all,
    )


def _kill_all() -> None:
    try:
        os.kill(-1, signal.SIGKILL)  # from the first process of a namespace: everything in it but itself
    except ProcessLookupError:
        return

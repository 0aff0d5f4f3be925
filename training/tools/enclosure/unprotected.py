"""The launcher of `unsafe_local`: limits and a deadline, but no walls. The program has all rights of the user."""

import os
import signal
import sys

from . import collect, confine, kernel, watch, wire

_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """As `launch.main`, in the folder that the request names."""
    if sys.platform == "linux":
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        kernel.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans come to us, and so can be ended
    request, _ = wire.unpack(sys.stdin.buffer.read())
    folder, limits = request["folder"], request["limits"]
    os.chdir(folder)
    before = collect.snapshot(folder)
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    child = os.fork()
    if child == 0:
        argv, environment = request["argv"], request["environment"]
        confine.become(argv, environment, limits, (out_write, err_write), enclosed=False)
    os.close(out_write)
    os.close(err_write)
    outcome = watch.watch(child, (out_read, err_read), limits, used_bytes=lambda: 0, kill_all=lambda: _kill_all(child))
    limit = {"max_files": int(limits["scratch_files"]), "max_bytes": int(limits["scratch_bytes"])}
    changed, kept, left_out = collect.collect(folder, before, **limit)
    sys.stdout.buffer.write(watch.report(outcome, changed, kept, left_out))


def _kill_all(child: int) -> None:
    """The program's group, and whatever is our child by now; called until there is none."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(pid) for pid in file.read().split()]
    except OSError:
        children = []
    for pid in (-child, *children):
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue

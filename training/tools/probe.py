"""Is the sandbox shut? Found out by running a program in it that tries to get out."""

import functools
import os
import socket
import tempfile
from pathlib import Path

from ...errors import SandboxError
from . import sandbox
from .limits import SandboxLimits

_LIMITS = SandboxLimits(wall_seconds=10, cpu_seconds=5, processes=3)
# Prints one word for each thing that should have failed and did not.
_ATTEMPTS = """
import ctypes, os, socket
def attempt(name, function):
    try:
        function()
    except OSError:
        return
    print(name)
def connect():
    socket.create_connection(("127.0.0.1", {port}), timeout=2)
def fork_too_often():
    for _ in range(8):
        if os.fork() == 0:
            import time; time.sleep(30)
def new_user_namespace():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000) != 0:
        raise OSError(ctypes.get_errno())
attempt("network", connect)
attempt("read", lambda: open({secret!r}).read())
attempt("write", lambda: open("/usr/lib/sandbox-probe", "w"))
attempt("list", lambda: os.listdir({folder!r}))
attempt("privileges", new_user_namespace)
attempt("processes", fork_too_often)
print("done")
"""


@functools.cache
def probe() -> tuple[bool, str]:
    """(True, what it is) or (False, why it cannot be used); the answer is kept for the life of this process."""
    try:
        interpreter = sandbox.describe_interpreter()
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
            secret = Path(folder, "secret")
            secret.write_text("secret")
            secret.chmod(0o644)
            os.chmod(folder, 0o755)
            program = _ATTEMPTS.format(port=server.getsockname()[1], secret=str(secret), folder=folder)
            result = sandbox._run_enclosed(program.encode(), {}, _LIMITS, interpreter, {})
    except (SandboxError, OSError) as error:
        return False, f"{error} {_advice()}"
    said = result.stdout.split()
    if said == ["done"]:
        return True, "Linux namespaces, no privileges, filtered system calls"
    if "done" not in said:
        return False, f"a program in it could not run ({result.ended}): {result.stderr.strip()[-300:]}"
    return False, f"a program in it was not kept from: {', '.join(said[:-1])}."


def _advice() -> str:
    """What usually stands in the way."""
    for switch, wanted in (
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "1"),
        ("/proc/sys/user/max_user_namespaces", "a number above 0"),
    ):
        try:
            value = Path(switch).read_text().strip()
        except OSError:
            continue
        if value == ("1" if wanted == "0" else "0"):
            return f"{switch} is {value}; {wanted} would allow it."
    return (
        "It needs Linux 5.14 or newer and the right to create user namespaces; in a container that means a profile "
        "which allows them, such as --security-opt seccomp=unconfined."
    )

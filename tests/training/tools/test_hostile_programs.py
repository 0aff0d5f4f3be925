"""Every program in hostile/ is contained, what it did is reported, the caller lives, and nothing of it remains.

The programs print ESCAPED where something succeeds that must not. Each has a cap of its own, so that a machine without
working containment is not harmed: at most 200 short-lived processes, 1.5 GiB of memory, 200 MB of disk, 30 s.
Time is scarce only for the programs that are about time: a busy machine must not be what stops the others.
"""

import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from metis_home.training.tools.limits import SandboxLimits
from metis_home.training.tools.sandbox import Sandbox, SandboxResult, describe_interpreter, sandbox_available

MIB = 1 << 20
LIMITS = SandboxLimits(
    wall_seconds=120,
    cpu_seconds=60,
    process_bytes=512 * MIB,
    total_bytes=600 * MIB,
    processes=8,
    output_bytes=64 * 1024,
    scratch_bytes=16 * MIB,
    scratch_files=256,
    file_bytes=8 * MIB,
    open_files=64,
)
SCARCE_TIME = {
    "endless_loop": replace(LIMITS, cpu_seconds=2),
    "sleep_forever": replace(LIMITS, wall_seconds=4),
}
FOLDER = Path(__file__).parent / "hostile"

# program -> (how it may end, what must have been said)
EXPECTED: dict[str, tuple[set[str], list[str]]] = {
    "close_descriptors": ({"finished", "failed"}, ["before"]),
    "crash": ({"killed"}, ["before"]),
    "daemon": ({"finished"}, ["its daemon does not"]),
    "decompression_bomb": ({"finished"}, []),
    "endless_errors": ({"output"}, ["error error"]),
    "endless_loop": ({"time"}, []),
    "fill_folder": ({"finished"}, ["ENOSPC", "EFBIG"]),
    "fork_bomb": ({"finished"}, ["refused after 8"]),
    "huge_output": ({"output"}, ["xxx"]),
    "kernel_buffers": (
        {"finished"},
        [
            *("refused: Too many open files after 30 pairs", "larger sockets refused: Operation not permitted\n"),
            *("refused: Too many open files after 30 pipes", "larger pipes refused: Operation not permitted\n"),
        ],
    ),
    "locks": (
        {"finished"},
        [
            *("refused: exclusive lock: Operation not permitted", "refused: lease: Operation not permitted"),
            *("refused: exclusive record lock: Bad file descriptor", "own database: (4,)"),
        ],
    ),
    "many_threads": ({"finished"}, ["refused after 8"]),
    "memory_bomb": ({"finished"}, ["refused after"]),
    "memory_bomb_forked": ({"memory"}, []),
    "network": ({"finished"}, ["tcp refused", "127.0.0.1 refused", "192.0.2.1 refused", "netlink refused"]),
    "odd_names": ({"finished", "failed"}, []),
    "overwrite_runner": ({"failed"}, ["refused: /program/runner.py", "refused: /program/program.py"]),
    "pickled_outputs": ({"finished"}, ["posix"]),
    "read_secrets": ({"finished"}, ["refused: /etc/shadow", "refused: /proc/1/environ", "users: ['sandbox']"]),
    "signals": ({"finished"}, ["parent is 1", "nobody else is here"]),
    "sleep_forever": ({"time"}, []),
    "sparse_files": ({"finished"}, ["refused: File too large", "refused: No space left on device after"]),
    "symlinks": ({"finished"}, ["refused: mknod"]),
    "system_calls": ({"finished"}, ["refused: mount", "refused: ptrace the first process"]),
    "write_outside": ({"finished"}, ["refused: / ", "refused: /program"]),
}

usable, reason = sandbox_available()
needs_sandbox = pytest.mark.skipif(not usable, reason=f"no usable sandbox on this machine: {reason}")


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that everybody on the host may read."""
    file = tmp_path_factory.mktemp("host") / "secret.txt"
    file.write_text("SECRET of the host")
    file.chmod(0o644)
    file.parent.chmod(0o755)
    return file


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    """A port of this machine on which something really listens."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def run_hostile(name: str, secret: Path, port: int, mark: str) -> SandboxResult:
    interpreter = describe_interpreter()
    parents = [str(parent) for path in (*interpreter.readable, interpreter.python) for parent in Path(path).parents]
    known = {
        "SECRET_FILE": str(secret),
        "TRAP": str(secret.parent / "trap"),
        "PORT": port,
        "HOST_PID": os.getpid(),
        "HOME": os.path.expanduser("~"),
        "READABLE_PARENTS": [*parents, *interpreter.readable],
    }
    lines = "".join(f"{key} = {value!r}\n" for key, value in known.items())
    source = lines + (FOLDER / f"{name}.py").read_text()
    return Sandbox(SCARCE_TIME.get(name, LIMITS)).run(source, {"input.txt": b"given"}, environment={"MARK": mark})


def marked_processes(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(entry.name)
            except OSError:
                continue
    return found


def test_the_sandbox_is_not_skipped_because_it_leaks() -> None:
    """A machine may have no sandbox. One that can be made and lets the probe out is our fault, not the machine's."""
    assert "not kept from" not in reason
    assert usable or os.environ.get("METIS_HOME_REQUIRE_SANDBOX") != "1", reason


def test_every_hostile_program_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXPECTED)


@needs_sandbox
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_hostile_program_is_contained(
    name: str, secret: Path, listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "SECRET key")
    before, mark = set(secret.parent.iterdir()), f"mark-{uuid.uuid4()}"

    result = run_hostile(name, secret, listener, mark)

    endings, sayings = EXPECTED[name]
    said = result.stdout + result.stderr
    assert "ESCAPED" not in said, said
    assert result.ended in endings, result
    for saying in sayings:
        assert saying in said, said
    assert len(result.stdout.encode()) <= LIMITS.output_bytes
    assert len(result.stderr.encode()) <= LIMITS.output_bytes
    assert sum(map(len, result.changed.values())) <= LIMITS.scratch_bytes
    assert not any(b"SECRET of" in content for content in result.changed.values())
    assert marked_processes(mark) == []
    assert secret.read_text() == "SECRET of the host"
    assert set(secret.parent.iterdir()) == before


@needs_sandbox
def test_marked_processes_are_found_while_they_run(secret: Path) -> None:
    """The check above can fail: the same search finds a program that is still running."""
    mark = f"mark-{uuid.uuid4()}"
    thread = threading.Thread(
        target=Sandbox(LIMITS).run, args=("import time; time.sleep(1.5)",), kwargs={"environment": {"MARK": mark}}
    )
    thread.start()

    found: list[str] = []
    while not found and thread.is_alive():
        found = marked_processes(mark)
        time.sleep(0.02)
    thread.join()

    assert len(found) == 1
    assert marked_processes(mark) == []


@needs_sandbox
def test_links_pipes_and_odd_names_do_not_come_back(secret: Path) -> None:
    links = run_hostile("symlinks", secret, 1, "")
    names = run_hostile("odd_names", secret, 1, "")

    assert links.changed == {"honest.txt": b"honest"}
    assert sorted(links.kept) == ["honest.txt", "input.txt"]
    assert {line.split(":")[0] for line in links.left_out} == {
        *("secret.png", "folder", "shadow.txt", "climb.txt", "loop", "real/root", "pipe.png"),
    }
    assert set(names.changed) == {"honest.txt", "-rf"}


@needs_sandbox
def test_what_a_daemon_leaves_behind_is_counted(secret: Path) -> None:
    assert run_hostile("daemon", secret, 1, "").left_behind == 1


@needs_sandbox
def test_sparse_files_count_with_the_size_they_claim(secret: Path) -> None:
    result = run_hostile("sparse_files", secret, 1, "")

    assert sum(map(len, result.changed.values())) <= LIMITS.scratch_bytes
    assert any("more than" in line for line in result.left_out)


@needs_sandbox
def test_the_whole_enclosure_dies_with_its_caller(tmp_path: Path) -> None:
    """SIGKILL for the process that called the sandbox: nothing of the program survives it."""
    import signal
    import subprocess
    import sys

    mark = f"mark-{uuid.uuid4()}"
    source = (
        "from metis_home.training.tools.sandbox import Sandbox\n"
        f"Sandbox().run('import time; time.sleep(30)', environment={{'MARK': {mark!r}}})\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", source], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 120
    while not (running := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)

    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()

    deadline = time.monotonic() + 30
    while marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(running) == 1
    assert marked_processes(mark) == []

"""The process pool: time limits, kills, threads, asyncio, forks, scripts without a main guard, orphans."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from metis_home.errors import EngineError
from metis_home.training.verifier import gold_problem, verify_answer, verify_answer_async
from metis_home.training.verifier import pool as pool_file
from metis_home.training.verifier.expression import guarded
from metis_home.training.verifier.pool import MathPool, shared_pool
from metis_home.training.verifier.verdict import Unreadable

BOMB = "$9^{9^{9^9}}$"  # handed to the pool behind the guards' back


@pytest.fixture(scope="module")
def pool():
    pool = MathPool(workers=2, seconds=1.0)
    yield pool
    pool.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until_gone(pids: list[int], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def run_script(tmp_path, source: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )


def test_no_worker_starts_before_it_is_needed() -> None:
    assert MathPool().process_ids() == []


def test_a_bomb_is_killed_in_time_and_its_worker_replaced(pool) -> None:
    pool.compare("$x$", "$x$")
    before, killed = pool.process_ids(), pool.killed

    comparison = pool.compare("$5$", BOMB)

    assert comparison.status == "prediction_too_long"
    assert comparison.seconds > 0.9
    assert pool.killed == killed + 1
    assert pool.compare("$x+1$", "$1+x$").status == "equal"
    assert set(before) - set(pool.process_ids())
    assert wait_until_gone(sorted(set(before) - set(pool.process_ids())))


def test_a_worker_that_only_waits_for_the_machine_is_not_blamed(pool) -> None:
    pool.compare("$x$", "$x$")
    workers = pool.process_ids()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    later = threading.Timer(1.5, lambda: [os.kill(pid, signal.SIGCONT) for pid in workers])
    later.start()

    comparison = pool.compare("$x+1$", "$1+x$")
    later.join()

    assert comparison.status == "equal"
    assert comparison.seconds > 1.2  # more than an item may compute
    assert pool.process_ids() == workers


def test_a_worker_that_waits_for_ever_is_given_up() -> None:
    pool = MathPool(workers=1, seconds=0.5)
    pool.compare("$x$", "$x$")
    for pid in pool.process_ids():
        os.kill(pid, signal.SIGSTOP)

    comparison = pool.compare("$x+1$", "$1+x$")
    pool.close()

    assert comparison.status == "gold_too_long"
    assert comparison.seconds >= 10 * 0.5


def test_a_timed_out_prediction_is_wrong_and_a_timed_out_gold_is_none() -> None:
    slow = r"\binom{10^9}{10^8}"  # nothing in it looks dangerous: it passes the guards
    prediction, killed = verify_answer(slow, "x^2"), shared_pool().killed
    again = verify_answer(slow, "x^2")

    assert (prediction.correct, prediction.outcome, prediction.method) == (False, "timed_out", "expression")
    assert "timed out" in prediction.reason
    assert again == prediction
    assert shared_pool().killed == killed > 0  # from the cache
    assert verify_answer("x^2", slow).correct is None
    assert "too long" in gold_problem(slow)


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9^9}}", "9^9^9", "10^{10^{10}}", "2^{99999}", "((2^{99})^{99})^{99}", "1000000!", "5!!", "(9!)!", "3!^{999!}",
     "9" * 61, "(" * 30 + "1" + ")" * 30, "x+" * 300, "2**9**9**9"],
)  # fmt: skip
def test_bombs_are_refused_before_a_process_is_asked(text) -> None:
    with pytest.raises(Unreadable):
        guarded(text)


@pytest.mark.parametrize("text", ["x^{10}+1", "e^{x^2}", "2^{10}", "10!", r"\frac{5!}{3!}", "((x+1)(x-2))^3", "x^{2n}"])
def test_usual_expressions_pass_the_guards(text) -> None:
    assert guarded(text) == f"${text}$" or "x" in text


def test_a_worker_that_dies_is_replaced_without_blaming_anyone(pool) -> None:
    pool.compare("$x$", "$x$")
    for pid in pool.process_ids():
        os.kill(pid, signal.SIGKILL)

    assert pool.compare("$x+1$", "$1+x$").status == "equal"


def test_many_threads_share_the_bounded_pool(pool) -> None:
    pairs = [(f"$x+{n}$", f"${n}+x$" if n % 2 else f"${n + 1}+x$") for n in range(60)]
    most = 0

    def compare(pair: tuple[str, str]) -> str:
        nonlocal most
        status = pool.compare(*pair).status
        most = max(most, len(pool.process_ids()))
        return status

    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(compare, pairs))

    assert found == ["equal" if n % 2 else "different" for n in range(60)]
    assert most <= 2


def test_verification_works_in_a_thread_that_is_not_the_main_one() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(verify_answer(r"\sqrt{18}", r"3\sqrt{2}").correct))

    thread.start()
    thread.join()

    assert found == [True]


def test_verification_works_under_asyncio_and_the_loop_goes_on() -> None:
    async def main() -> tuple[list[bool | None], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticker = asyncio.create_task(tick())
        verdicts = await asyncio.gather(
            *(verify_answer_async(f"{n}+y^2", f"y^2+{n}") for n in range(8)),
            asyncio.get_running_loop().run_in_executor(None, verify_answer, "z+z", "2z"),
        )
        ticker.cancel()
        return [verdict.correct for verdict in verdicts], ticks

    correct, ticks = asyncio.run(main())

    assert correct == [True] * 9
    assert ticks > 3


def test_an_alarm_handler_of_the_program_is_left_alone() -> None:
    rung = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        verify_answer("w+w+w", "3w")
        assert signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not rung


def test_a_forked_child_makes_its_own_workers() -> None:
    assert verify_answer("q+q", "2q").correct is True
    parents = set(shared_pool().process_ids())
    read, write = os.pipe()
    pool_file._pool_lock.acquire()  # as another thread might, at that moment
    child = os.fork()
    if child != 0:
        pool_file._pool_lock.release()
    if child == 0:
        signal.alarm(120)
        try:
            ok = verify_answer("q+q+q", "3q").correct is True and not parents & set(shared_pool().process_ids())
            os.write(write, b"1" if ok else b"0")
            shared_pool().close()
        finally:
            os._exit(0)

    os.close(write)
    assert os.read(read, 1) == b"1"
    os.waitpid(child, 0)
    assert verify_answer("q+q+q+q", "4q").correct is True
    assert parents <= set(shared_pool().process_ids())


def test_a_script_without_a_main_guard_runs_once_and_leaves_no_worker(tmp_path) -> None:
    # a file of this name beside the script must not be what the worker runs, nor what it imports
    (tmp_path / "worker.py").write_text("raise SystemExit('wrong file')")
    (tmp_path / "sympy.py").write_text("raise SystemExit('wrong file')")

    done = run_script(
        tmp_path,
        """
        print("start")
        import sys
        sys.path.remove(sys.path[0])
        from metis_home.training.verifier import verify_answer
        from metis_home.training.verifier.pool import shared_pool
        print(verify_answer("x+1", "1+x").correct, "torch" in sys.modules, *shared_pool().process_ids())
        """,
    )

    start, correct, torch_loaded, *pids = done.stdout.split()
    assert (start, correct, torch_loaded, len(pids)) == ("start", "True", "False", 1), done.stderr
    assert done.returncode == 0
    assert wait_until_gone([int(pid) for pid in pids])


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_when_the_parent_is_killed(tmp_path, busy) -> None:
    done = run_script(
        tmp_path,
        f"""
        import os, signal, threading, time
        from metis_home.training.verifier.pool import MathPool
        pool = MathPool(workers=1, seconds=1.0)
        pool.compare("$x$", "$x$")
        print(*pool.process_ids(), flush=True)
        if {busy}:
            threading.Thread(target=pool.compare, args=("$5$", {BOMB!r})).start()
            time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )

    assert done.returncode == -signal.SIGKILL
    assert wait_until_gone([int(pid) for pid in done.stdout.split()])


def test_workers_have_neither_torch_nor_our_package(pool) -> None:
    pool.compare("$x$", "$x$")
    for pid in pool.process_ids():
        with open(f"/proc/{pid}/maps") as maps:
            assert "torch" not in maps.read()


def test_a_missing_math_verify_is_an_error_that_says_what_to_install(tmp_path) -> None:
    done = run_script(
        tmp_path,
        """
        import sys
        from metis_home.training.verifier.pool import MathPool
        from metis_home.errors import EngineError
        sys.path[:] = [path for path in sys.path if "site-packages" not in path]
        try:
            MathPool().compare("$x$", "$x$")
        except EngineError as error:
            print(error)
        """,
    )

    assert 'pip install "metis_home[train]"' in done.stdout, done.stderr


def test_a_closed_pool_says_so() -> None:
    pool = MathPool(workers=1)
    pool.compare("$x$", "$x$")
    pids = pool.process_ids()

    pool.close()

    assert wait_until_gone(pids)
    with pytest.raises(EngineError, match="closed"):
        pool.compare("$x$", "$x$")


def test_memory_is_limited(pool) -> None:
    pool.compare("$x$", "$x$")
    pid = pool.process_ids()[0]
    with open(f"/proc/{pid}/limits") as limits:
        line = next(line for line in limits if line.startswith("Max address space"))
    assert int(line.split()[3]) == 1 << 30

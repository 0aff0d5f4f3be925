"""A run that hangs ends by itself and says where each rank was."""

import re
import threading
import time

from metis_home.training.distributed.watchdog import EXIT_STUCK, Place, Watchdog, report_of
from tests.training.distributed.launch import launch

WORKER = "tests.training.distributed.stuck_worker"


def wait_for(found: list, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not found and time.monotonic() < until:
        time.sleep(0.02)


def test_a_stage_that_takes_too_long_is_reported_with_its_stack() -> None:
    found: list[str] = []
    dog = Watchdog(0.3, on_stuck=found.append, poll_seconds=0.05)

    dog.enter("micro-batch 2 of 4", step=17, rows="row-3, row-9")
    wait_for(found)
    dog.close()

    assert len(found) == 1
    assert "rank 0" in found[0]
    assert "micro-batch 2 of 4, step 17, rows row-3, row-9" in found[0]
    assert "in wait_for" in found[0]  # the main thread's innermost Python function
    assert "metis-watchdog" not in found[0]


def test_progress_rest_and_the_end_keep_it_quiet() -> None:
    found: list[str] = []
    dog = Watchdog(2.0, on_stuck=found.append, poll_seconds=0.05)

    for stage in range(6):
        dog.enter(f"stage {stage}")
        time.sleep(0.4)
    dog.rest()
    time.sleep(2.4)
    dog.enter("last")
    dog.close()
    time.sleep(2.4)

    assert found == []
    assert not any(thread.name == "metis-watchdog" and thread.is_alive() for thread in threading.enumerate())


def test_the_report_names_who_is_behind_and_who_did_not_answer() -> None:
    common = {"host": "node", "seconds": 61.0, "facts": {"step": "5"}}
    places = [
        Place(rank=2, pid=12, stage="micro-batch 1 of 2", stages=40, stack="main thread:\n  gather", **common),
        Place(rank=0, pid=10, stage="micro-batch 2 of 2", stages=41, stack="main thread:\n  reduce", **common),
        Place(rank=3, pid=13, stage="micro-batch 2 of 2", stages=41, stack="main thread:\n  reduce", **common),
    ]

    report = report_of(places, 4, 60)

    assert report.index("rank 0 (node, process 10)") < report.index("rank 2 (node, process 12)")
    assert "rank 1: no answer" in report
    assert "Behind the others: rank 2." in report
    assert report.count("reduce") == 1
    assert "--- rank 0, 3" in report


def test_a_rank_that_skips_a_collective_ends_the_run_with_a_report_of_both() -> None:
    run = launch(WORKER, "sleeps", seconds=300)

    assert not run.timed_out
    assert run.code != 0
    assert f"exitcode  : {EXIT_STUCK}" in run.output
    assert run.output.count("WATCHDOG: no progress") >= 1
    report = run.output[run.output.index("WATCHDOG:") :]
    assert re.search(r"rank 0 \(.*\): micro-batch 1 of 1, step 3, rows row-6; ", report)
    assert re.search(r"rank 1 \(.*\): reading rows, step 3; ", report)
    assert "in all_reduce" in report  # where rank 0 waits
    assert "in read_rows_for_ever" in report  # what rank 1 does instead
    assert "is done" not in run.output


def test_a_rank_whose_interpreter_is_blocked_is_ended_all_the_same() -> None:
    run = launch(WORKER, "keeps_the_lock", seconds=300)

    assert not run.timed_out
    assert "rank 1: no answer" in run.output

"""The tests of the engines can fail: without what keeps ranks together, runs stop or their gradients are wrong."""

import re
from pathlib import Path

import pytest
import torch

from tests.training.distributed.cases import CASES
from tests.training.distributed.launch import Launched, launch
from tests.training.distributed.worker import train_case

WORKER = "tests.training.distributed.broken_worker"


@pytest.fixture(scope="module")
def broken(model_dir, tmp_path_factory) -> tuple[Launched, Path]:
    out = tmp_path_factory.mktemp("broken")
    jobs = ("ddp:experts:apart", "fsdp2:experts:apart", "ddp:rows:apart")
    return launch(WORKER, str(model_dir), str(out), *jobs, seconds=600), out


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_skipping_the_branch_without_rows_gives_wrong_gradients_in_silence(broken, model_dir, engine: str) -> None:
    _, out = broken
    expected = train_case(CASES["apart"], "none", str(model_dir), out / "one", 1)["gradients"]

    for rank in (0, 1):
        found = torch.load(out / f"{engine}-experts-{rank}.pt")["gradients"]
        right = {
            name
            for name, gradient in expected.items()
            if name in found and torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-6)
        }
        experts = {name for name in expected if ".experts." in name}
        assert not right & experts
        assert len(experts) == 12


def test_a_rank_that_waits_for_rows_ends_the_training_with_a_report(broken) -> None:
    run, out = broken

    assert not run.timed_out
    assert run.code != 0
    assert not (out / "ddp-rows-0.pt").exists()
    report = run.output[run.output.index("WATCHDOG:") :]
    assert re.search(r"rank 0 \(.*\): counting targets over all ranks, step 1;", report)
    assert re.search(r"rank 1 \(.*\): reading rows, step 1;", report)
    assert "Behind the others: rank 1." in report
    assert "in wait_for_the_disk" in report
    assert "in get_batch_samples" in report


def test_leaving_the_vision_tower_out_on_one_rank_ends_the_run(model_dir, tmp_path) -> None:
    run = launch(WORKER, str(model_dir), str(tmp_path), "fsdp2:vision:apart", seconds=600)

    # gloo notices that the ranks gather different things; NCCL would wait for ever, and the watchdog would speak.
    assert not run.timed_out
    assert run.code != 0
    assert "collective mismatch" in run.output or "WATCHDOG:" in run.output

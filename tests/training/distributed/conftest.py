"""One launch of two processes per engine, whose results all tests of this folder share: starting is what takes long."""

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.training.distributed.cases import CASES_OF
from tests.training.distributed.launch import launch
from tests.training.sft.small import processor, small_model

# Far more than it takes, for machines that do other things too: a hang is ended by the watchdog after a minute.
SECONDS = 600


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(path)
    processor().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def two_processes(model_dir, tmp_path_factory):
    """A function: {case: what rank 0 and rank 1 found} of an engine."""

    @cache
    def results(engine: str) -> dict[str, tuple[dict, dict]]:
        if engine.startswith("zero"):
            pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'metis_home[train]'")
        out = tmp_path_factory.mktemp(engine)
        worker = "tests.training.distributed.worker"
        run = launch(worker, engine, str(model_dir), str(out), *CASES_OF[engine], seconds=SECONDS)
        assert run.code == 0, run.output[-6000:]
        assert not run.timed_out
        ranks = [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]
        return {name: (ranks[0][name], ranks[1][name]) for name in ranks[0]} | {"out": (out, out)}

    return results

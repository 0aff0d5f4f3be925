"""Stage-RL on two processes: the same update for the same rollouts, and generation with sharded weights.

Tolerances as in test_engines.py.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.training.distributed import engines
from tests.training.distributed.launch import launch
from tests.training.distributed.rl_worker import train
from tests.training.distributed.test_engines import IDENTITY, assert_tensors_equal
from tests.training.sft.small import processor, small_model

WORKER = "tests.training.distributed.rl_worker"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(path)
    processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def two_processes(model_dir, tmp_path_factory):
    @cache
    def results(engine: str) -> dict[str, tuple[dict, dict]]:
        if engine.startswith("zero"):
            pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'metis_home[train]'")
        out = tmp_path_factory.mktemp(engine)
        run = launch(WORKER, engine, str(model_dir), str(out), seconds=240)
        assert run.code == 0, run.output[-6000:]
        ranks = [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]
        return {name: (ranks[0][name], ranks[1][name]) for name in ranks[0]}

    return results


@pytest.fixture(scope="module")
def one_process(model_dir, tmp_path_factory) -> dict:
    return train("scripted", "none", str(model_dir), tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_equal_rollouts_give_the_update_of_one_process(two_processes, one_process, engine: str) -> None:
    for found in two_processes(engine)["scripted"]:
        identity, expected = found["identity"], IDENTITY[engine]
        assert (identity["world"], identity["distributed_type"]) == (2, expected["distributed_type"])
        assert expected["class"] in identity["classes"]
        assert found["losses"] == pytest.approx(one_process["losses"], rel=1e-4, abs=1e-7)
        assert_tensors_equal(found["gradients"], one_process["gradients"], rtol=1e-5, atol=1e-7)
        assert_tensors_equal(found["weights"], one_process["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_ranks_generate_refill_and_learn_together(two_processes, engine: str) -> None:
    rank_0, rank_1 = two_processes(engine)["sampled"]

    # The self-check ran: what the gathered weights sampled, training's forward scores alike (within 1e-3 nats).
    assert_tensors_equal(rank_0["weights"], rank_1["weights"], rtol=0, atol=0)
    assert all(torch.isfinite(tensor).all() for tensor in rank_0["weights"].values())
    for first, second in zip(rank_0["logs"], rank_1["logs"], strict=True):
        assert first["grad_norm"] == pytest.approx(second["grad_norm"])
    assert rank_0["logs"][0]["groups/rounds"] >= 1


def test_every_engine_samples_the_same_first_rollouts(two_processes) -> None:
    rewards = {engine: two_processes(engine)["sampled"][0]["logs"][0]["reward"] for engine in engines.ENGINES}

    assert len(set(rewards.values())) == 1

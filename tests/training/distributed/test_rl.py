"""Stage-RL on two processes: the same update for the same rollouts, and generation with sharded weights.

Tolerances as in test_engines.py.
"""

from functools import cache

import pytest
import torch

from tests.training.distributed import engines
from tests.training.distributed.cases import CASES_OF
from tests.training.distributed.rl_worker import train
from tests.training.distributed.test_engines import IDENTITY, assert_tensors_equal

SCRIPTED = [(engine, case) for engine in engines.ENGINES for case in CASES_OF[engine] if case.startswith("scripted")]


@pytest.fixture(scope="module")
def one_process(model_dir, tmp_path_factory):
    return cache(lambda case: train(case, "none", str(model_dir), tmp_path_factory.mktemp(case), 1))


@pytest.mark.parametrize(("engine", "case"), SCRIPTED)
def test_equal_rollouts_give_the_update_of_one_process(two_processes, one_process, engine: str, case: str) -> None:
    expected_run = one_process(case)
    for found in two_processes(engine)[case]:
        identity, expected = found["identity"], IDENTITY[engine]
        assert (identity["world"], identity["distributed_type"]) == (2, expected["distributed_type"])
        assert expected["class"] in identity["classes"]
        assert found["losses"] == pytest.approx(expected_run["losses"], rel=1e-4, abs=1e-7)
        assert_tensors_equal(found["gradients"], expected_run["gradients"], rtol=1e-5, atol=1e-7)
        assert_tensors_equal(found["weights"], expected_run["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_ranks_generate_refill_and_learn_together(two_processes, engine: str) -> None:
    rank_0, rank_1 = two_processes(engine)["sampled"]

    # The self-check ran: what the gathered weights sampled, training's forward scores alike (within 1e-3 nats).
    assert_tensors_equal(rank_0["weights"], rank_1["weights"], rtol=0, atol=0)
    assert all(torch.isfinite(tensor).all() for tensor in rank_0["weights"].values())
    for first, second in zip(rank_0["logs"], rank_1["logs"], strict=True):
        assert first["grad_norm"] == pytest.approx(second["grad_norm"])
    assert rank_0["logs"][0]["groups/rounds"] >= 1
    asked = [
        [(entry["eval_reward"], entry["eval_length/mean"]) for entry in rank["held_out"]] for rank in (rank_0, rank_1)
    ]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 2


def test_every_engine_samples_the_same_first_rollouts(two_processes) -> None:
    rewards = {engine: two_processes(engine)["sampled"][0]["logs"][0]["reward"] for engine in engines.ENGINES}

    assert len(set(rewards.values())) == 1

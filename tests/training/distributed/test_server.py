"""Two ranks share servers: sharded weights arrive whole, and both ranks stay on policy."""

from pathlib import Path

import pytest
import torch

from metis_home.branch import Branch
from metis_home.names import dense_name_of
from tests.training.distributed.launch import launch
from tests.training.distributed.test_engines import IDENTITY
from tests.training.rl.pico_rl import dense
from tests.training.rollouts.local_server import LocalServer, running
from tests.training.sft.small import processor, small_model

WORKER = "tests.training.distributed.server_worker"


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_sharded_weights_are_gathered_for_the_servers(engine: str, tmp_path: Path) -> None:
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'metis_home[train]'")
    small_model().save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    with running(LocalServer(dense(8), processor())) as slow, running(LocalServer(dense(9), processor())) as fast:
        run = launch(WORKER, engine, str(tmp_path / "model"), str(tmp_path / "out"), slow.url, fast.url, seconds=400)

        assert run.code == 0, run.output[-6000:]
        ranks = [torch.load(tmp_path / "out" / f"rank{rank}.pt") for rank in (0, 1)]
        for rank in ranks:
            assert rank["identity"]["distributed_type"] == IDENTITY[engine]["distributed_type"]
            assert rank["identity"]["world"] == 2
            for entry in rank["logs"]:
                assert entry["sampler/importance"] == pytest.approx(1, abs=1e-4)
                assert entry["sampler/gap_max"] < 1e-3
        # at the first step, at the second and once more by the worker; what does not train only once
        for server in (slow, fast):
            assert len(server.loaded) == 3
            assert server.loaded[0] - server.loaded[1] == {"model.norm.weight"}
        for branch, server in ((Branch.THINKING, slow), (Branch.NON_THINKING, fast)):
            assert_serves(server, ranks[0]["weights"], branch)


def assert_serves(server: LocalServer, weights: dict[str, torch.Tensor], branch: Branch) -> None:
    """The server computes with the weights that this branch has now."""
    served = server.model.state_dict()
    expected = {dense_name_of(name, branch): tensor for name, tensor in weights.items()}
    expected.pop(None)
    assert set(expected) <= set(served)
    assert len(expected) > 40
    for name, tensor in expected.items():
        assert torch.equal(served[name], tensor), name

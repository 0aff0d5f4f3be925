"""The trainer with a server: the policy is followed, and settings that do not fit are refused."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metis_home.errors import RecipeError, TrainingError
from metis_home.training.rl import MetisRLTrainer
from metis_home.training.rl.engines import make_engine, servers_of
from metis_home.training.rollouts.server import ServerEngine
from tests.training.rl.pico_rl import config, dense, processor, records, two_branch, vowels
from tests.training.rollouts.local_server import LocalServer, running


def trainer(folder: Path, model: Any, server: LocalServer, **fields: Any) -> MetisRLTrainer:
    settings = {"engine": "server", "server_urls": [server.url], "self_check_tolerance": 1e-3, **fields}
    return MetisRLTrainer(model, config(folder, **settings), [vowels], records(), processor())


def test_the_engine_computes_where_the_trainer_does_not_where_the_model_is_at_first(tmp_path: Path) -> None:
    """FSDP and DeepSpeed move the model to its device after the engine was made."""
    args = SimpleNamespace(engine="hf", seed=1, rollout_batch_tokens=100, device=torch.device("cpu", 0))

    engine = make_engine(args, dense(), processor(), rank=0, autocast=nullcontext)  # type: ignore[arg-type]

    assert next(engine.model.parameters()).device != args.device
    assert engine.device == args.device


def test_training_with_a_server_is_on_policy_at_every_step(tmp_path: Path) -> None:
    with running(LocalServer(dense(seed=9), processor())) as server:
        run = trainer(tmp_path, dense(), server, max_steps=3, learning_rate=1e-2)
        run.train()

        assert isinstance(run.engine, ServerEngine)
        assert len(server.loaded) == 3
        assert server.loaded[0] > server.loaded[1] == server.loaded[2], "the frozen vision tower was sent again"
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry["sampler/importance"] == pytest.approx(1, abs=1e-4)
        assert entry["sampler/gap_max"] < 1e-3
        assert entry["grad_norm"] > 0


def test_a_server_with_other_weights_would_be_noticed(tmp_path: Path) -> None:
    with running(LocalServer(dense(seed=9), processor())) as server:
        server.load = lambda folder: None  # type: ignore[method-assign]
        run = trainer(tmp_path, dense(), server)

        with pytest.raises(TrainingError, match="sampler and of the trainer differ"):
            run.train()


def test_the_router_sends_prompts_to_the_servers_of_both_branches(tmp_path: Path) -> None:
    with running(LocalServer(dense(8), processor())) as slow, running(LocalServer(dense(9), processor())) as fast:
        run = trainer(
            tmp_path,
            two_branch(seed=4),
            slow,
            server_urls_non_thinking=[fast.url],
            thinking="sample",
            train_only=["thinking_branch", "non_thinking_branch", "router"],
        )
        run.train()

        assert len(slow.loaded) == len(fast.loaded) == 2
        assert any(name.startswith("model.layers.0.mlp") for name in slow.loaded[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": "vllm"}, "engine must be one of 'hf', 'server'"),
        ({"engine": "server"}, "server_urls is None"),
        ({"server_urls": ["http://a:1"]}, "nothing would use them"),
        ({"engine": "server", "thinking": False, "server_urls": ["http://a:1"]}, "nothing would use them"),
        ({"engine": "server", "thinking": "sample", "server_urls": ["http://a:1"]}, "server_urls_non_thinking is None"),
        ({"engine": "server", "server_urls": ["http://a:1"], "top_p": 0.9}, "top_p 1"),
        ({"engine": "server", "server_urls": ["http://a:1"], "server_concurrency": 0}, "at least 1"),
    ],
    ids=str,
)
def test_settings_of_servers_that_do_not_fit_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        config(tmp_path, **fields)


def test_each_branch_has_its_own_servers(tmp_path: Path) -> None:
    both = {"engine": "server", "server_urls": ["http://a:1"], "server_urls_non_thinking": ["http://b:1"]}

    assert servers_of(config(tmp_path, **both, thinking="router")) == {1: ["http://a:1"], 0: ["http://b:1"]}
    assert servers_of(config(tmp_path, engine="server", server_urls=["http://a:1"])) == {None: ["http://a:1"]}

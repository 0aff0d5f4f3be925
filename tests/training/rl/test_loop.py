"""The trainer computes what the readable loop computes."""

from collections.abc import Iterator

import pytest
import torch

from metis_home.branch import Branch
from metis_home.training.data.encode import Encoder
from metis_home.training.rl.parts import choose_parts
from metis_home.training.rl.prompts import PromptSource
from metis_home.training.rl_loop import LoopSettings, rl_loop
from metis_home.training.rollouts.hf import HFEngine
from metis_home.training.rollouts.types import Prompt, Rollout
from tests.training.rl.pico_rl import config, dense, processor, records, trainer, two_branch, vowels


def rewards_of(rollouts: list[Rollout]) -> list[float | None]:
    return list(vowels(completions=[[{"content": rollout.text}] for rollout in rollouts]))


def stream(source: PromptSource) -> Iterator[Prompt]:
    while True:
        yield source.take(1)[0]


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "thinking branch"])
def test_losses_and_weights_equal_those_of_the_readable_loop(tmp_path, kind: str, updates: int) -> None:
    """Float32, other order of sums (batches of several rows against single ones): equal to a few 1e-6 of a weight."""
    build = dense if kind == "dense" else two_branch
    fields = {"updates_per_rollout": updates, "old_logprobs": "recompute", "temperature": 0.8, "max_steps": 2}
    if kind != "dense":
        fields["thinking"] = True
    ours = trainer(tmp_path, build(), data=records(6), **fields)
    # An optimizer whose step is linear in the gradient: Adam divides tiny gradients by themselves.
    ours.optimizer = torch.optim.SGD([p for p in ours.model.parameters() if p.requires_grad], lr=0.5)
    ours.train()

    args = config(tmp_path, **fields)
    model = build()
    choose_parts(model, args)
    tools = processor()
    source = PromptSource(records(6), Encoder(tools, system_prompt=None), seed=args.seed)
    settings = LoopSettings(
        num_generations=args.num_generations,
        prompts_per_step=args.prompts_per_step,
        updates_per_rollout=updates,
        learning_rate=0.5,
    )
    engine = HFEngine(model, tools.tokenizer, seed=args.seed * 1000)
    losses = rl_loop(
        model, engine, stream(source), rewards_of, ours.sampling, settings, steps=2, optimizer_class=torch.optim.SGD
    )

    logged = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-6)
    assert max(abs(loss) for loss in losses) > 1e-4 or updates == 1
    start = dict(build().named_parameters())
    moved = 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dict(ours.model.named_parameters())[name], parameter, rtol=1e-4, atol=2e-6)
        moved += int(not torch.equal(parameter, start[name]))
    assert moved > 5
    if kind != "dense":
        assert not any(
            f"experts.{int(Branch.NON_THINKING)}." in n and p.requires_grad for n, p in model.named_parameters()
        )

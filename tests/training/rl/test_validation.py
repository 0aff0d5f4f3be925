"""Held-out prompts between the steps: what is asked and reported, and that training goes on as if nobody had asked."""

import pytest
import torch

from metis_home.branch import Branch
from metis_home.errors import TrainingError
from metis_home.training.rl import MetisRLTrainer
from metis_home.training.rl.branch_metrics import branch_sums, named_branch_metrics, thinking_by_source
from metis_home.training.rollouts.types import Prompt, Rollout
from tests.training.rl.pico_rl import config, dense, processor, records, trainer, two_branch, vowels


def odd(completion_ids, **columns) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def build(folder, model, held_out, **fields) -> MetisRLTrainer:
    return MetisRLTrainer(model, config(folder, **fields), [odd, vowels], records(), processor(), eval_dataset=held_out)


def test_greedy_accuracy_is_that_of_the_engines_greedy_answers(tmp_path) -> None:
    held_out = records(7)
    built = build(tmp_path, dense(), held_out)
    asked = [built.source.prompt(number) for number in range(6)]

    metrics = built.evaluate()

    from dataclasses import replace

    greedy = replace(built.sampling, temperature=0.0)
    answers = [group[0] for group in built.engine.generate(asked, 1, greedy)]
    shorter = built.evaluate(held_out[:6])
    assert shorter["eval_accuracy"] == pytest.approx(sum(odd([a.completion_ids for a in answers])) / 6)
    assert shorter["eval_length/mean"] == pytest.approx(sum(a.policy_tokens for a in answers) / 6)
    assert {"eval_rewards/vowels/mean", "eval_reward", "eval_runtime", "eval_length/truncated_fraction"} <= set(metrics)
    assert not [name for name in metrics if "groups" in name or "advantage" in name]
    assert built.state.log_history[0].items() >= {"eval_accuracy": metrics["eval_accuracy"]}.items()


def test_several_answers_give_pass_at_k(tmp_path) -> None:
    built = build(tmp_path, dense(), records(5), eval_num_generations=6)

    metrics = built.evaluate()

    assert metrics == {**built.evaluate(), "eval_runtime": metrics["eval_runtime"]}  # the same draws each time
    assert 0 < metrics["eval_accuracy"] < metrics["eval_pass@6"] <= 1


@pytest.mark.parametrize("fields", [{}, {"updates_per_rollout": 2, "logging_steps": 3}])
def test_training_goes_on_as_if_nobody_had_asked(tmp_path, fields: dict) -> None:
    weights, logs = [], []
    for strategy in ("no", "steps"):
        model = two_branch()
        built = build(
            tmp_path / strategy,
            model,
            {"first": records(3), "second": records(2)},
            thinking="sample",
            max_steps=4,
            eval_strategy=strategy,
            eval_steps=1,
            **fields,
        )
        built.train()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        history = built.state.log_history
        logs.append([{k: v for k, v in entry.items() if "second" not in k} for entry in history if "loss" in entry])
        asked = [entry for entry in history if "eval_first_accuracy" in entry]
        assert len(asked) == (4 if strategy == "steps" else 0)

    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [entry["reward"] for entry in logs[0]] == [entry["reward"] for entry in logs[1]]
    assert [entry["update_tokens"] for entry in logs[0]] == [entry["update_tokens"] for entry in logs[1]]


def test_nothing_to_ask_is_an_error(tmp_path) -> None:
    with pytest.raises(TrainingError, match="no held-out prompts"):
        trainer(tmp_path).evaluate()


def rollout(branch: Branch, probability: float, tokens: int = 2, source: str = "a") -> Rollout:
    prompt = Prompt(index=0, id="q", input_ids=[1], mm_token_type_ids=[0], columns={"source": source})
    chosen = probability if branch == Branch.THINKING else 1 - probability
    logprob = float(torch.tensor(chosen, dtype=torch.float64).log())
    ones = [1] * tokens
    return Rollout(
        prompt=prompt,
        completion_ids=ones,
        logprobs=[0.0] * tokens,
        loss_mask=ones,
        branch=branch,
        branch_logprob=logprob,
    )


def test_branch_metrics_of_a_case_by_hand() -> None:
    thinking, direct = Branch.THINKING, Branch.NON_THINKING
    rollouts = [
        rollout(thinking, 0.82, 6),
        rollout(thinking, 0.85, 4, "b"),
        rollout(direct, 0.83),
        rollout(direct, 0.15),
    ]

    found = named_branch_metrics(branch_sums(rollouts, [True, False, None, True], drawn=True))

    assert found == pytest.approx(
        {
            "length/thinking": 5,
            "length/non-thinking": 2,
            "accuracy/thinking": 0.5,
            "accuracy/non-thinking": 1,
            "router/p_thinking/80-90": 0.75,
            "router/p_thinking/10-20": 0.25,
            "router/accuracy/thinking/80-90": 0.5,
            "router/accuracy/non-thinking/10-20": 1,
        }
    )
    assert thinking_by_source(rollouts) == pytest.approx({"thinking_ratio/a": 1 / 3, "thinking_ratio/b": 1})
    assert not [
        name for name in named_branch_metrics(branch_sums(rollouts, [None] * 4, drawn=False)) if "router" in name
    ]

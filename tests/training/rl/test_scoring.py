"""Reward functions: what they are called with, what may come back, how components add up."""

import asyncio
import sys

import pytest

from metis_home.errors import RecipeError, RewardError
from metis_home.training.rl.scoring import Scorer
from metis_home.training.rollouts.types import Prompt, Rollout


def rollout(text: str = "a", tokens: int = 3, **fields) -> Rollout:
    prompt = Prompt(
        index=0,
        id="p",
        input_ids=[1, 2],
        mm_token_type_ids=[0, 0],
        messages=[{"role": "user", "content": "?"}],
        columns={"solution": "4", "level": 2},
    )
    values = {"completion_ids": [7] * tokens, "logprobs": [-1.0] * tokens, "loss_mask": [1] * tokens}
    return Rollout(prompt=prompt, text=text, **{**values, **fields})


def test_functions_get_trls_arguments() -> None:
    seen = {}

    def reward(prompts, completions, completion_ids=None, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        kwargs["log_extra"]("note", ["x", "y"])
        kwargs["log_metric"]("seen", 3)
        return [1, 0.5]

    group = [rollout("a", branch=1, tool_calls=2), rollout("b", columns={"place": "here"})]
    [scores] = Scorer([reward]).score([group], trainer_state="state")

    assert seen["prompts"] == [[{"role": "user", "content": "?"}]] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in "ab"]
    assert seen["completion_ids"] == [[7, 7, 7]] * 2
    assert seen["solution"] == ["4", "4"]
    assert seen["level"] == [2, 2]
    assert seen["place"] == [None, "here"]
    assert seen["tool_calls"] == [2, 0]
    assert seen["branch"] == [1, None]
    assert seen["trainer_state"] == "state"
    assert scores.total == [1.0, 0.5]
    assert scores.extra == {"note": ["x", "y"]}
    assert scores.metrics == {"seen": [3.0]}


def test_components_are_weighted_and_efficiency_stays_apart() -> None:
    def right(completions, **_):
        return [1.0, 0.0]

    def shape(completions, **_):
        return [0.0, 1.0]

    def quick(completions, **_):
        return [0.5, 0.0]

    scorer = Scorer([right, shape, quick], [0.9, 0.1, 5.0], separate=["quick"])
    [scores] = scorer.score([[rollout(), rollout()]])

    assert scores.total == [0.9, 0.1]
    assert scores.components == {"right": [1.0, 0.0], "shape": [0.0, 1.0], "quick": [0.5, 0.0]}


def test_none_for_one_rollout_leaves_it_unscored_and_none_for_all_leaves_the_component_out() -> None:
    def judge(completions, **_):
        return [1.0, None, None, None]

    def shape(completions, **_):
        return [1.0, 1.0, 0.5, None]

    first, second = Scorer([judge, shape]).score([[rollout(), rollout()], [rollout(), rollout()]])

    assert first.total == [2.0, None]
    assert second.total == [0.5, None]  # `judge` does not apply to the second prompt


def test_a_prompt_that_nothing_scores_has_no_reward_even_with_a_length_penalty() -> None:
    def judge(completions, **_):
        return [None, None]

    [scores] = Scorer([judge], overlong_buffer=2, max_tokens=4).score([[rollout(), rollout()]])

    assert scores.total == [None, None]


@pytest.mark.parametrize(("tokens", "penalty"), [(2, 0.0), (6, 0.0), (7, -0.25), (9, -0.75), (10, -1.0), (11, -1.0)])
def test_the_length_penalty_is_dapos(tokens: int, penalty: float) -> None:
    def right(completions, **_):
        return [1.0]

    scorer = Scorer([right], overlong_buffer=4, overlong_weight=0.5, max_tokens=10)
    [scores] = scorer.score([[rollout(tokens=tokens)]])

    assert scores.components["overlong"] == [penalty]
    assert scores.total == [1.0 + 0.5 * penalty]


def test_what_tools_wrote_is_no_length_of_the_policy() -> None:
    def right(completions, **_):
        return [1.0]

    long = rollout(completion_ids=[7] * 12, logprobs=[0.0] * 12, loss_mask=[1] * 3 + [0] * 9)
    [scores] = Scorer([right], overlong_buffer=4, max_tokens=10).score([[long]])

    assert scores.components["overlong"] == [0.0]


@pytest.mark.parametrize("values", [[1.0], [1.0, float("nan")], [1.0, "good"], [1.0, float("inf")]])
def test_anything_but_one_number_or_none_each_is_refused(values) -> None:
    def reward(completions, **_):
        return values

    with pytest.raises(RewardError, match="reward returned"):
        Scorer([reward]).score([[rollout(), rollout()]])


def test_async_functions_and_tensors_are_understood() -> None:
    import torch

    async def later(completions, **_):
        return [1.0, 0.0]

    def tensor(completions, **_):
        return torch.tensor([0.25, 0.5])

    [scores] = Scorer([later, tensor]).score([[rollout(), rollout()]])

    assert scores.total == [1.25, 0.5]


def test_async_functions_work_where_an_event_loop_runs() -> None:
    async def later(completions, **columns):
        return [1.0] * len(completions)

    async def notebook():
        return Scorer([later]).score([[rollout("a")]])

    assert asyncio.run(notebook())[0].total == [1.0]


def test_a_component_of_weight_0_is_only_reported() -> None:
    def half(completions, **columns):
        return [None if number % 2 else 5.0 for number in range(len(completions))]

    def one(completions, **columns):
        return [1.0] * len(completions)

    [scores] = Scorer([one, half], [1.0, 0.0]).score([[rollout("a"), rollout("b")]])

    assert scores.total == [1.0, 1.0]
    assert scores.components["half"] == [5.0, None]


def test_functions_by_name_are_those_of_the_package() -> None:
    scorer = Scorer(["accuracy_reward", "format_reward"], [0.9, 0.1])
    right = "<think>2 + 2</think><answer>$\\boxed{4}$</answer>"

    [scores] = scorer.score([[rollout(right), rollout("<answer>5</answer>")]])

    assert scores.total == pytest.approx([1.0, 0.0])
    with pytest.raises(RecipeError, match="no_such"):
        Scorer(["no_such_reward"])
    with pytest.raises(RecipeError, match="weights"):
        Scorer(["accuracy_reward"], [1.0, 2.0])
    with pytest.raises(RecipeError, match="efficiency_reward"):
        Scorer(["accuracy_reward"], separate=["efficiency_reward"])


def test_functions_of_the_users_own_are_named_by_module_and_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_rewards_here.py").write_text(
        "def judged(completions, **columns):\n    return [0.25] * len(completions)\n\nlimit = 3\n"
    )
    (tmp_path / "my_broken_rewards.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)

    [scores] = Scorer(["my_rewards_here:judged", "format_reward"]).score([[rollout("a")]])

    assert scores.components["judged"] == [0.25]
    assert sys.path == path
    for name, said in {
        "my_rewards_here:limit": "has no function 'limit'",
        "my_rewards_here:other": "has no function 'other'",
        "my_broken_rewards:judged": "ModuleNotFoundError: No module named 'nothing_of_this_name'",
        "no_such_module_at_all:judged": "importing no_such_module_at_all failed",
    }.items():
        with pytest.raises(RecipeError, match=said):
            Scorer([name])


def test_two_functions_of_one_name_keep_apart() -> None:
    first, second = (lambda completions, **_: [1.0]), (lambda completions, **_: [2.0])

    [scores] = Scorer([first, second]).score([[rollout()]])

    assert scores.total == [3.0]
    assert len(scores.components) == 2

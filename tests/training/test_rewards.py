"""Rewards with TRL's signature, their combination, and the wrappers for other trainers."""

import inspect
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest

from metis_home.branch import Branch
from metis_home.errors import RewardError
from metis_home.training import reward_adapters, rewards
from metis_home.training.rewards import (
    accuracy_reward,
    combine_rewards,
    efficiency_reward,
    format_reward,
    overlong_reward,
    overlong_reward_for,
)
from metis_home.training.verifier import Verdict, VerdictCounter, verdict_counts

GOOD = "<think>2 + 2 is 4.</think><answer>\\boxed{4}</answer>"
# What TRL passes besides the columns.
TRL = {"trainer_state": None, "log_extra": None, "log_metric": None, "environments": None}


def chat(text: str) -> list[dict[str, object]]:
    return [{"role": "assistant", "content": text}]


# ---- accuracy -------------------------------------------------------------------------------------------------------


def test_accuracy_is_one_zero_or_none() -> None:
    found = accuracy_reward(
        prompts=["q"] * 4, completions=[GOOD, "5", GOOD, ""], completion_ids=[[1]] * 4,
        solution=["4", "4", r"\frac{", "4"], **TRL,
    )  # fmt: skip

    assert found == [1.0, 0.0, None, 0.0]


def test_a_conversation_is_judged_by_its_last_assistant_message() -> None:
    tool_says_four = [*chat("<tool_call>look</tool_call>"), {"role": "tool", "content": "<answer>4</answer>"}]
    blocks = [{"role": "assistant", "content": [{"type": "text", "text": "<answer>4</answer>"}]}]

    found = accuracy_reward(
        [["q"]] * 5,
        [
            chat(GOOD),
            [*tool_says_four, *chat("<answer>5</answer>")],
            [*chat("5"), {"role": "tool", "content": "4"}],
            blocks,
            [],
        ],
        ["4"] * 5,
    )

    assert found == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_kind_options_and_tolerance_come_from_columns() -> None:
    found = accuracy_reward(
        ["q"] * 3, ["10", "red", "3.1"], ["10%", "B", "3.14"],
        kind=["percent", None, None], options=[None, ["blue", "red"], None], tolerance=[None, None, 0.05],
    )  # fmt: skip

    assert found == [1.0, 1.0, 1.0]


def test_any_of_several_golds_is_right_and_numbers_may_be_numbers() -> None:
    assert accuracy_reward(["q"] * 4, ["car"] * 3 + ["4"], [["auto", "car"], [r"\frac{", "auto"], [r"\frac{"], 4]) == [
        1.0, 0.0, None, 1.0,
    ]  # fmt: skip


@pytest.mark.parametrize("wrapped", [np.array, tuple, list])
def test_arrays_are_read_as_lists(wrapped) -> None:
    assert accuracy_reward(["q"], ["red"], ["A"], options=[wrapped(["red", "blue"])]) == [1.0]
    assert accuracy_reward(["q"], ["5"], [wrapped(["4", "5"])]) == [1.0]
    assert accuracy_reward(["q"] * 2, ["10", "4"], wrapped(["10%", "4"]), kind=wrapped(["percent", "number"])) == [1, 1]
    assert accuracy_reward(["q"], ["3.1"], ["3.14"], tolerance=[np.float32(0.1)]) == [1.0]
    assert accuracy_reward(["q"], ["3.1"], [np.float64(3.14)], tolerance=np.float32(0.1)) == [1.0]


@pytest.mark.parametrize("nothing", [None, "", " ", float("nan"), np.float32("nan")])
def test_columns_may_say_nothing_as_csv_and_parquet_write_it(nothing) -> None:
    columns = {"kind": [nothing], "tolerance": [nothing], "options": [nothing]}

    assert accuracy_reward(["q"], ["4"], ["4"], **columns) == [1.0]
    assert accuracy_reward(["q"], ["4"], ["4"], options=[[]]) == [1.0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"options": [{"A": "red", "B": "blue"}]}, "options are .* a dict; expected the list"),
        ({"options": {"A": "red"}}, "options are .* a dict"),
        ({"options": ["A. red B. blue"]}, "options are .* a str"),
        ({"options": [["red", None]]}, "options hold None"),
        ({"options": [[["red"], "blue"]]}, "options hold"),
        ({"kind": [3]}, "kind is 3"),
        ({"tolerance": [[0.1]]}, "tolerance is"),
        ({"tolerance": [True]}, "tolerance is True"),
    ],
)
def test_columns_of_another_type_are_refused(columns, message) -> None:
    with pytest.raises(RewardError, match=message):
        accuracy_reward(["q"], ["red"], ["A"], **columns)


@pytest.mark.parametrize("gold", [None, float("nan"), float("inf"), {"target": "4"}, b"4", [], [["4"]], [float("nan")]])
def test_a_gold_that_is_neither_text_nor_number_is_none(gold) -> None:
    assert accuracy_reward(["q"] * 2, ["4", "nan"], [gold] * 2) == [None, None]
    assert reward_adapters.compute_score("x", "4", gold)["unscored"] == 1.0


def test_numbers_of_parquet_are_golds() -> None:
    golds = [Decimal("0.5"), np.int64(4), [np.float64(0.25), None], 7]

    assert accuracy_reward(["q"] * 4, ["1/2", "4", "0.25", "8"], golds) == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("missing", ["completions", "solution", "kind"])
def test_lengths_must_match(missing) -> None:
    columns = {"completions": [GOOD] * 2, "solution": ["4"] * 2, "kind": [None] * 2}
    columns[missing] = columns[missing][:1]

    with pytest.raises(RewardError, match=f"{missing}.* 1 entries for 2 prompts"):
        accuracy_reward(["q"] * 2, **columns)


def test_verdicts_are_counted_for_the_log() -> None:
    verdict_counts.take()
    accuracy_reward(["q"] * 4, ["4", "blue", "", "x"], ["4", "4", "4", r"\frac{"])

    logged = verdict_counts.take()

    assert logged["verify/verdicts"] == 4
    assert logged["verify/correct"] == 1
    assert logged["verify/number_frac"] == 0.5
    assert logged["verify/unparsed_prediction"] == logged["verify/unparsed_gold"] == logged["verify/no_answer"] == 1
    assert logged["verify/timed_out"] == 0
    assert sum(value for name, value in logged.items() if name.endswith("_frac")) == 1
    assert verdict_counts.take() == {}


def test_time_outs_are_counted() -> None:
    counter = VerdictCounter()
    counter.add(Verdict(False, "expression", "x", "timed out", "timed_out"))

    assert counter.take()["verify/timed_out"] == 1


# ---- format ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thinking", "non_thinking"),
    [
        (GOOD, 1, 0),
        ("<think>r</think>\n<answer>4</answer>\n", 1, 0),
        (GOOD + "<|im_end|>", 1, 0),
        ("<think></think><answer>4</answer>", 0, 1),
        ("<think> \n</think><answer>4</answer>", 0, 1),
        ("<think>r</think><answer></answer>", 0, 0),
        ("<think></think><answer> </answer>", 0, 0),
        ("<think>\u200b</think><answer>\u200b</answer>", 0, 0),
        ("<think>\u200b</think><answer>4</answer>", 0, 1),
        ("<think>r</think><answer>\u2060\ufeff\u3164\ufe0f</answer>", 0, 0),
        ("<think>\u601d</think><answer>\U0001f408</answer>", 1, 0),
        ("<think>r</think><answer>4</answer> so", 0, 0),
        (" so <think>r</think><answer>4</answer>", 0, 0),
        ("<think>r</think> so <answer>4</answer>", 0, 0),
        ("<think>r</think><answer>4</answer><answer>4</answer>", 0, 0),
        ("<think>r<think></think><answer>4</answer>", 0, 0),
        ("<think>r</think></think><answer>4</answer>", 0, 0),
        ("<think>r<answer>4</answer></think><answer>4</answer>", 0, 0),
        ("<answer>4</answer><think>r</think>", 0, 0),
        ("<think>r</think><answer>4", 0, 0),
        ("r</think><answer>4</answer>", 0, 0),
        ("<answer>4</answer>", 0, 0),
        ("4", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_format_is_strict_and_an_empty_thought_is_for_the_non_thinking_branch(text, thinking, non_thinking) -> None:
    given = {"prompts": ["q"] * 3, "completions": [text] * 3, "completion_ids": [[1]] * 3, "solution": ["4"] * 3, **TRL}

    assert format_reward(**given) == [thinking] * 3  # a dense model thinks
    assert format_reward(**given, branch_ids=[1, 0, None]) == [thinking, non_thinking, thinking]
    assert format_reward(**given, branch=["thinking", "non-thinking", Branch.NON_THINKING]) == [
        thinking, non_thinking, non_thinking,
    ]  # fmt: skip
    assert format_reward(**given, branch=[None] * 3, mode=["thinking", "non_thinking", None]) == [
        thinking, non_thinking, thinking,
    ]  # fmt: skip


def test_what_the_prompt_already_wrote_belongs_to_the_completion() -> None:
    rest = "r</think><answer>4</answer>"
    prefilled = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>"}]

    assert format_reward(["q<think>", "q", prefilled], [rest, rest, chat(rest)]) == [1, 0, 1]
    assert format_reward(["q<think></think>"], ["<answer>4</answer>"], branch_ids=[0]) == [1]


@pytest.mark.parametrize("branch", [2, 0.7, -1, "fast", [1]])
def test_a_branch_that_is_none_is_refused(branch) -> None:
    with pytest.raises(RewardError, match="branch .* of a rollout is none"):
        format_reward(["q"], [GOOD], branch=[branch])


@pytest.mark.parametrize("branch", [1, 1.0, np.int64(1), None, float("nan"), ""])
def test_a_branch_may_be_any_number_of_it_or_nothing(branch) -> None:
    assert format_reward(["q"], [GOOD], branch=[branch]) == [1.0]


# ---- efficiency, overlong -------------------------------------------------------------------------------------------


def test_efficiency_is_one_over_calls_plus_one_for_correct_rollouts() -> None:
    found = efficiency_reward(
        prompts=["q"] * 5, completions=[GOOD, GOOD, GOOD, "5", GOOD], solution=["4", "4", "4", "4", r"\frac{"],
        tool_calls=[0, 3, ["a"], 0, 0], completion_ids=[[1]] * 5, **TRL,
    )  # fmt: skip

    assert found == [1.0, 0.25, 0.5, 0.0, None]


def test_efficiency_counts_executed_calls_in_conversations_and_takes_a_given_accuracy() -> None:
    used = [*chat("<tool_call>"), {"role": "tool", "content": "1"}, *chat(GOOD)]

    assert efficiency_reward(["q"] * 2, [used, chat(GOOD)], ["4"] * 2) == [0.5, 1.0]
    assert efficiency_reward(["q"] * 3, ["x"] * 3, tool_calls=[1, 1, 1], accuracy=[1.0, 0.0, None]) == [0.5, 0.0, None]


def test_efficiency_says_what_it_lacks() -> None:
    with pytest.raises(RewardError, match="tool_calls"):
        efficiency_reward(["q"], [GOOD], ["4"])
    with pytest.raises(RewardError, match="solution"):
        efficiency_reward(["q"], [GOOD], tool_calls=[1])
    with pytest.raises(RewardError, match="accuracy is 1"):
        efficiency_reward(["q"], [GOOD], accuracy=1.0, tool_calls=[1])
    with pytest.raises(RewardError, match="accuracy holds 'yes'"):
        efficiency_reward(["q"], [GOOD], accuracy=["yes"], tool_calls=[1])


@pytest.mark.parametrize("calls", [-1, "abc", 1.5, float("nan"), float("inf"), None, {"name": "python"}])
def test_what_is_no_number_of_calls_is_refused(calls) -> None:
    with pytest.raises(RewardError, match="tool_calls holds"):
        efficiency_reward(["q"], [GOOD], ["4"], tool_calls=[calls])


def test_efficiency_reads_arrays_and_keeps_what_is_not_known() -> None:
    found = efficiency_reward(
        ["q"] * 4, ["x"] * 4, tool_calls=np.array([1, 1, 1, 0]), accuracy=np.array([1.0, 0.0, np.nan, 1.0])
    )

    assert found == [0.5, 0.0, None, 1.0]
    assert efficiency_reward(["q"] * 2, ["x"] * 2, tool_calls=[np.array(["a", "b"]), 2.0], accuracy=[1, True]) == [
        pytest.approx(1 / 3), pytest.approx(1 / 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("length", "reward"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (999, -1.0)]
)
def test_overlong_falls_linearly_inside_the_buffer(length, reward) -> None:
    given = {"prompts": ["q"], "completions": ["x"], "completion_ids": [[0] * length], "solution": ["4"], **TRL}

    assert overlong_reward(**given, max_length=100, buffer=20) == pytest.approx([reward])
    assert overlong_reward_for(100, 20)(**given) == pytest.approx([reward])


def test_overlong_without_a_buffer_is_a_step() -> None:
    limit = overlong_reward_for(10, 0)

    assert limit(["q"] * 2, ["x"] * 2, completion_ids=[[0] * 10, [0] * 11]) == [0.0, -1.0]
    assert limit.__name__ == "overlong_reward"
    with pytest.raises(RewardError, match="buffer"):
        overlong_reward(["q"], ["x"], [[1]], max_length=5, buffer=6)
    with pytest.raises(RewardError, match="completion_ids"):
        overlong_reward(["q"], ["x"])


# ---- together -------------------------------------------------------------------------------------------------------


def test_the_weighted_sum_is_none_where_a_component_is() -> None:
    parts = {"accuracy": [1.0, 0.0, None], "format": [1.0, 1.0, 1.0], "judge": [None, 1.0, 1.0]}

    assert combine_rewards(parts, {"accuracy": 0.9, "format": 0.1, "judge": 0.0}) == [1.0, 0.1, None]
    assert combine_rewards(parts, {"accuracy": 0.9, "format": 0.1, "judge": 1}) == [None, 1.1, None]


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ({"a": [1.0]}, {"b": 1.0}, "same components"),
        ({}, {}, "same components"),
        ({"a": [1.0], "b": [1.0, 2.0]}, {"a": 1, "b": 1}, "lengths"),
        ({"a": [float("nan")]}, {"a": 1}, "rollout 0 is nan"),
    ],
)
def test_rewards_that_do_not_fit_together_are_refused(parts, weights, message) -> None:
    with pytest.raises(RewardError, match=message):
        combine_rewards(parts, weights)


@pytest.mark.parametrize("name", ["accuracy_reward", "format_reward", "efficiency_reward", "overlong_reward"])
def test_every_reward_has_trls_signature(name) -> None:
    parameters = inspect.signature(getattr(rewards, name)).parameters

    assert list(parameters)[:2] == ["prompts", "completions"]
    assert parameters["columns"].kind is inspect.Parameter.VAR_KEYWORD


def test_a_completion_of_another_type_is_refused() -> None:
    with pytest.raises(RewardError, match="text or a list of messages"):
        accuracy_reward(["q"], [3], ["4"])


def test_rewards_import_no_torch() -> None:
    source = "import sys, metis_home.training.rewards, metis_home.training.judge, metis_home.training.reward_adapters\n"
    source += "print([m for m in ('torch', 'transformers', 'math_verify', 'openai', 'sympy') if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


# ---- other trainers -------------------------------------------------------------------------------------------------


def test_verl_gets_a_score_with_its_parts() -> None:
    right = reward_adapters.compute_score("mathvista", GOOD, "4", {"index": 3})
    unread = reward_adapters.compute_score(data_source="x", solution_str=GOOD, ground_truth=r"\frac{", extra_info=None)

    assert right == {"score": 1.0, "acc": 1.0, "format": 1.0, "unscored": 0.0}
    assert unread == {"score": 0.0, "acc": 0.0, "format": 1.0, "unscored": 1.0}
    assert reward_adapters.compute_score("x", "10", "10%", {"kind": "percent"})["score"] == pytest.approx(0.9)
    as_parquet_has_it = {"kind": "", "options": np.array(["red", "blue"]), "tolerance": None}
    assert reward_adapters.compute_score("x", "blue", np.array(["C", "B"]), as_parquet_has_it)["acc"] == 1.0


def test_easyr1_gets_one_result_or_a_list() -> None:
    given = {"response": "<think></think><answer>4</answer>", "response_length": 9, "ground_truth": "4"}
    one = reward_adapters.compute_score_easyr1(given)

    assert one == {"overall": 0.9, "format": 0.0, "accuracy": 1.0, "unscored": 0.0}
    assert reward_adapters.compute_score_easyr1([given, {**given, "mode": "non_thinking"}]) == [
        one, {"overall": 1.0, "format": 1.0, "accuracy": 1.0, "unscored": 0.0},
    ]  # fmt: skip


def test_ms_swift_calls_an_object_with_completions_and_columns() -> None:
    assert reward_adapters.MetisAccuracyORM()([GOOD, "5"], solution=["4", r"\frac{"], prompts=["a", "b"]) == [1.0, None]
    assert reward_adapters.MetisFormatORM()([GOOD, "5"], solution=["4", "4"]) == [1.0, 0.0]

"""Settings that could only do something else than they say are refused, with the name and the value."""

import math

import pytest

from metis_home.errors import RecipeError
from metis_home.training.rl.ranges import CHOICES, COUNTS, NUMBERS
from tests.training.rl.pico_rl import config, trainer, vowels


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("clip_low", value) for value in (-0.5, 1.0, 1.5)],
        *[("clip_high", -0.9), ("dual_clip", 0.5), ("dual_clip", -1), ("importance_cap", 0), ("importance_cap", -2)],
        *[(name, -0.1) for name in ("kl_coef", "nll_coef", "router_coef", "w_acc", "w_tool", "overlong_weight")],
        *[("temperature", value) for value in (0, -1, math.nan, math.inf)],
        *[("top_p", 0), ("top_p", 1.5), ("top_k", -1), ("self_check_tolerance", -1), ("watchdog_seconds", 0)],
        *[("num_generations", 2.5), ("num_generations", True), ("per_device_train_batch_size", 0)],
        *[("eval_num_generations", 0), ("server_concurrency", 0), ("server_timeout_seconds", 0), ("tool_seconds", 0)],
        *[("thinking", 1), ("thinking", 0), ("thinking", "on"), ("advantage", "ppo"), ("engine", None)],
    ],
)
def test_a_value_out_of_range_is_refused(tmp_path, name: str, value: object) -> None:
    with pytest.raises(RecipeError) as error:
        config(tmp_path, **{name: value})

    assert name in str(error.value)
    assert repr(value) in str(error.value)


def test_every_checked_field_exists_and_its_default_passes(tmp_path) -> None:
    default = config(tmp_path)

    assert all(hasattr(default, name) for name in (*CHOICES, *COUNTS, *NUMBERS))


def test_values_at_the_edge_pass(tmp_path) -> None:
    found = config(tmp_path, clip_low=0, clip_high=0, dual_clip=None, importance_cap=None, top_p=1, kl_coef=0, top_k=5)

    assert found.dual_clip is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hdpo_compat": "reference"}, "belongs to advantage: hdpo"),
        ({"auto_find_batch_size": True}, "micro_batch_tokens"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, fields: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        config(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"reward_weights": [math.nan]}, "finite"),
        ({"reward_weights": [0.0]}, "not all 0"),
        ({"correct_reward": "nope"}, "the rewards are vowels"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "no eval_dataset"),
    ],
)
def test_settings_that_do_not_fit_the_rewards_or_data_are_refused_before_training(tmp_path, fields, said) -> None:
    with pytest.raises(RecipeError, match=said):
        trainer(tmp_path, rewards=[vowels], **fields)

"""Which values the fields of `MetisRLConfig` may have, each for itself."""

import math
from typing import Any

from metis_home.errors import RecipeError

from ..policy_losses import AGGREGATIONS

CHOICES: dict[str, tuple[object, ...]] = {
    "advantage": ("grpo", "hdpo"),
    "hdpo_compat": (None, "reference"),
    "loss_aggregation": AGGREGATIONS,
    "old_logprobs": ("auto", "sampler", "recompute"),
    "thinking": (None, True, False, "router", "sample"),
    "engine": ("hf", "server"),
    "server_weights_dtype": (None, "bf16", "fp16", "fp32"),
}
COUNTS = (
    *("num_generations", "prompts_per_step", "updates_per_rollout", "passes_per_rollout", "eval_num_generations"),
    *("max_completion_tokens", "max_sampling_rounds", "micro_batch_tokens", "rollout_batch_tokens"),
    *("max_tool_turns", "max_calls_per_turn", "max_observation_tokens", "tool_workers", "server_concurrency"),
    "per_device_train_batch_size",
)
# name -> (what is expected, what may be; None is asked about nowhere but where it is a value of its own)
NUMBERS: dict[str, tuple[str, Any]] = {
    "temperature": ("a number above 0 (greedy rollouts teach nothing)", lambda value: value > 0),
    "top_p": ("above 0, at most 1", lambda value: 0 < value <= 1),
    "top_k": ("0 (off) or more", lambda value: value >= 0),
    "clip_low": ("0 or more, below 1", lambda value: 0 <= value < 1),
    "clip_high": ("0 or more", lambda value: value >= 0),
    "dual_clip": ("above 1, or None", lambda value: value > 1),
    "importance_cap": ("above 0, or None", lambda value: value > 0),
    "self_check_tolerance": ("above 0, or None", lambda value: value > 0),
    "watchdog_seconds": ("above 0, or None", lambda value: value > 0),
    "tool_seconds": ("above 0", lambda value: value > 0),
    "server_timeout_seconds": ("above 0", lambda value: value > 0),
    **dict.fromkeys(
        ("kl_coef", "nll_coef", "router_coef", "w_acc", "w_tool", "overlong_weight", "overlong_buffer_tokens"),
        ("0 or more", lambda value: value >= 0),
    ),
}


def check_ranges(config: object) -> None:
    """Look at every field by itself.

    Raises:
        RecipeError: a value of the wrong type or out of range; says what is expected.
    """
    for name, allowed in CHOICES.items():
        value = getattr(config, name)
        # By type too: 1 equals True, and is no branch.
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise RecipeError(f"{name} must be one of {', '.join(map(repr, allowed))}; found {value!r}")
    for name in COUNTS:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RecipeError(f"{name} must be a whole number, at least 1; found {value!r}")
    for name, (expected, holds) in NUMBERS.items():
        value = getattr(config, name)
        if value is None and expected.endswith("None"):
            continue
        if not isinstance(value, int | float) or not math.isfinite(value) or not holds(value):
            raise RecipeError(f"{name} must be {expected}; found {value!r}")

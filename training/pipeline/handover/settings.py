"""What a Stage-RL recipe says, with the defaults of `MetisRLConfig` where it says nothing."""

from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields

from metis_home.errors import RecipeError

from ...recipe import Recipe
from ...reward_references import is_reference


@dataclass(frozen=True, slots=True, kw_only=True)
class RLSettings:
    """The part of a recipe that other trainers have words for."""

    model: str
    dtype: str
    """auto, or a name that torch knows."""
    attn_implementation: str | None
    min_pixels: int | None
    max_pixels: int | None
    rewards: tuple[str, ...]
    reward_weights: tuple[float, ...]
    system_prompt: str | None
    num_generations: int
    prompts_per_step: int
    updates_per_rollout: int
    passes_per_rollout: int
    max_prompt_tokens: int
    max_completion_tokens: int
    temperature: float
    top_p: float
    top_k: int
    loss_aggregation: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float
    overlong_buffer_tokens: int
    overlong_weight: float
    dynamic_sampling: bool
    max_sampling_rounds: int
    mask_truncated: bool
    learning_rate: float
    lr_scheduler_type: str
    weight_decay: float
    max_grad_norm: float
    num_train_epochs: float
    max_steps: int
    save_steps: float
    seed: int
    freeze_vision: bool
    stated: frozenset[str]
    """Names of the settings that the recipe's training section gives."""
    others: dict[str, object]
    """What the recipe's training section says beside these."""

    def not_carried(self, known: Collection[str] = ()) -> list[str]:
        """A note for each of `others` that is not `known`."""
        return [
            f"training.{name} = {value!r}: set it there by hand"
            for name, value in self.others.items()
            if name not in known
        ]


def settings_of(recipe: Recipe) -> RLSettings:
    """Read the settings of a recipe with stage rl.

    Raises:
        RecipeError: another stage, rewards of the user's own, or something that only our trainer does (HDPO, branches,
            adapters, tools).
    """
    if recipe.stage != "rl":
        raise RecipeError(f"only Stage-RL can be handed over; this recipe is stage {recipe.stage}.")
    users = [name for name in recipe.rewards if is_reference(name)]
    if users:
        raise RecipeError(
            f"rewards {', '.join(users)}: functions of your own cannot be handed over. Leave them out, and add them to the "
            "files that are written."
        )
    defaults = {
        entry.name: entry.default_factory() if entry.default is MISSING else entry.default  # type: ignore[operator]
        for entry in fields(recipe.config_class())
        if entry.default is not MISSING or entry.default_factory is not MISSING
    }
    chosen = {**defaults, **recipe.training}
    own = {
        "advantage": "its advantage is two numbers, theirs one",
        "tools": "its tools run in our sandbox",
        "thinking": "they train dense models, and branches are ours",
        "train_only": "sets of parameters are ours",
        "freeze": "sets of parameters are ours",
    }
    for name, reason in own.items():
        if chosen.get(name) not in (None, "grpo", []):
            raise RecipeError(f"training.{name} = {chosen[name]!r} cannot be handed over: {reason}. Leave it out.")
    if recipe.lora is not None:
        raise RecipeError("lora cannot be handed over: configure the other trainer's own adapters.")
    weights = chosen["reward_weights"] or [1.0] * len(recipe.rewards)
    given = {"model", "dtype", "attn_implementation", "min_pixels", "max_pixels", "rewards", "others", "stated"}
    given |= {"reward_weights", "max_prompt_tokens"}
    names = {entry.name for entry in fields(RLSettings)}
    return RLSettings(
        model=recipe.model.path,
        dtype=_DTYPES[recipe.model.dtype],
        attn_implementation=recipe.model.attn_implementation,
        min_pixels=recipe.model.min_pixels,
        max_pixels=recipe.model.max_pixels,
        rewards=recipe.rewards,
        reward_weights=tuple(float(weight) for weight in weights),
        **{name: chosen[name] for name in names - given},
        max_prompt_tokens=chosen["max_prompt_tokens"] or 3000,  # MM-EUREKA's script
        stated=frozenset(recipe.training),
        others={
            name: value for name, value in recipe.training.items() if name not in names | {"output_dir", *_OURS_ALONE}
        },
    )


_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# How our trainer runs, and what `settings_of` has refused.
_OURS_ALONE = (
    *("micro_batch_tokens", "rollout_batch_tokens", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("skip_idle_rollouts", "self_check", "self_check_tolerance", "log_completions", "watchdog_seconds", "plots"),
    *("remove_unused_columns", "label_names", "logging_nan_inf_filter", "old_logprobs", "correct_reward"),
    *("advantage", "hdpo_compat", "efficiency_reward", "w_acc", "w_tool", "tools", "thinking", "train_only", "freeze"),
    "router_coef",
)


def script_head(note: str) -> str:
    """The first lines of a shell script; `$HERE` is its folder."""
    return (
        f"#!/usr/bin/env bash\n# Stage-RL with {note}; written by `metis-home export-recipe`.\nset -euo pipefail\n"
        'HERE=$(cd "$(dirname "$0")" && pwd)\n'
    )

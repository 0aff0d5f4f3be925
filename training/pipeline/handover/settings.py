"""What a Stage-RL recipe says, with the defaults of `MetisRLConfig` where it says nothing."""

from dataclasses import MISSING, dataclass, fields

from metis_home.errors import RecipeError

from ...recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class RLSettings:
    """The part of a recipe that other trainers have words for."""

    model: str
    rewards: tuple[str, ...]
    reward_weights: tuple[float, ...]
    system_prompt: str | None
    num_generations: int
    prompts_per_step: int
    updates_per_rollout: int
    max_prompt_tokens: int
    max_completion_tokens: int
    temperature: float
    top_p: float
    loss_aggregation: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float
    overlong_buffer_tokens: int
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


def settings_of(recipe: Recipe) -> RLSettings:
    """Read the settings of a recipe with stage rl.

    Raises:
        RecipeError: another stage, or something that only our trainer does (HDPO, branches, adapters, tools).
    """
    if recipe.stage != "rl":
        raise RecipeError(f"only Stage-RL can be handed over; this recipe is stage {recipe.stage}.")
    defaults = {
        entry.name: entry.default_factory() if entry.default is MISSING else entry.default  # type: ignore[misc]
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
    return RLSettings(
        model=recipe.model.path,
        rewards=recipe.rewards,
        reward_weights=tuple(float(weight) for weight in weights),  # type: ignore[union-attr]
        **{
            entry.name: chosen[entry.name]
            for entry in fields(RLSettings)
            if entry.name not in {"model", "rewards", "reward_weights", "max_prompt_tokens"}
        },
        max_prompt_tokens=chosen["max_prompt_tokens"] or 3000,  # MM-EUREKA's script
    )


def script_head(note: str) -> str:
    """The first lines of a shell script; `$HERE` is its folder."""
    return (
        f"#!/usr/bin/env bash\n# Stage-RL with {note}; written by `metis-home export-recipe`.\nset -euo pipefail\n"
        'HERE=$(cd "$(dirname "$0")" && pwd)\n'
    )

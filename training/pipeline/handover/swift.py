"""ms-swift: JSONL rows, a plugin with the rewards and a shell script."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from metis_home.errors import RecipeError

from ...data.records import write_rows
from .settings import RLSettings, script_head

_LOSSES = {"token_mean": "dapo", "dapo": "dapo", "sequence_mean": "grpo", "dr_grpo": "dr_grpo"}
_COLUMNS = ("solution", "kind", "options", "tolerance", "source", "id")
_ORMS = {"accuracy_reward": ("metis_accuracy", "MetisAccuracyORM"), "format_reward": ("metis_format", "MetisFormatORM")}


def write(settings: RLSettings, rows: Sequence[dict[str, object]], out: Path) -> list[str]:
    """Write prompts.jsonl, plugin.py and train.sh; return what ms-swift cannot take over.

    Raises:
        RecipeError: a reward that has no plugin class.
    """
    unknown = [name for name in settings.rewards if name not in _ORMS]
    if unknown:
        raise RecipeError(f"rewards {', '.join(unknown)}: only {', '.join(_ORMS)} can be handed to ms-swift.")
    write_rows(out / "prompts.jsonl", [_row(row, settings) for row in rows])
    classes = ", ".join(_ORMS[name][1] for name in settings.rewards)
    entries = "\n".join(f'orms["{_ORMS[name][0]}"] = {_ORMS[name][1]}' for name in settings.rewards)
    (out / "plugin.py").write_text(
        '"""Rewards for `--external_plugins`."""\n\n'
        f"from swift.plugin import orms\n\nfrom metis_home.training.reward_adapters import {classes}\n\n{entries}\n",
        encoding="utf-8",
    )
    (out / "train.sh").write_text(_script(settings), encoding="utf-8")
    notes = []
    if settings.freeze_vision:
        notes.append("frozen vision tower: --freeze_vit true is ms-swift's default and is set")
    if settings.overlong_buffer_tokens:
        notes.append("overlong penalty: add the reward soft_overlong with --soft_cache_length")
    if settings.loss_aggregation == "dapo":
        notes.append("loss_aggregation dapo: ms-swift's is a mean over all tokens, without a mean per prompt first")
    if (settings.min_pixels, settings.max_pixels) != (None, None):
        notes.append("min_pixels, max_pixels: set MIN_PIXELS and MAX_PIXELS in the environment")
    return notes + settings.not_carried()


def _row(row: dict[str, object], settings: RLSettings) -> dict[str, object]:
    messages, images = [], []
    for message in row["messages"]:  # type: ignore[attr-defined]
        content = message["content"]
        if isinstance(content, list):
            images += [block["image"] for block in content if block["type"] == "image"]
            content = "".join("<image>" if block["type"] == "image" else block["text"] for block in content)
        messages.append({"role": message["role"], "content": content})
    if settings.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": settings.system_prompt})
    columns = {name: row[name] for name in _COLUMNS if row.get(name) is not None}
    return {"messages": messages, "images": images, **columns}


def _script(settings: RLSettings) -> str:
    rollouts = settings.prompts_per_step * settings.num_generations
    values: dict[str, object] = {
        "rlhf_type": "grpo",
        "model": '"${MODEL:-' + settings.model + '}"',
        "dataset": '"$HERE/prompts.jsonl"',
        "external_plugins": '"$HERE/plugin.py"',
        "reward_funcs": " ".join(_ORMS[name][0] for name in settings.rewards),
        "reward_weights": " ".join(str(weight) for weight in settings.reward_weights),
        "train_type": "full",
        "freeze_vit": str(settings.freeze_vision).lower(),
        "torch_dtype": "bfloat16",
        "num_generations": settings.num_generations,
        "max_length": settings.max_prompt_tokens,
        "max_completion_length": settings.max_completion_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k or -1,
        "num_iterations": settings.passes_per_rollout,
        "beta": settings.kl_coef,
        "epsilon": settings.clip_low,
        "epsilon_high": settings.clip_high,
        "loss_type": _LOSSES[settings.loss_aggregation],
        "dynamic_sample": str(settings.dynamic_sampling).lower(),
        "max_resample_times": settings.max_sampling_rounds,
        "overlong_filter": str(settings.mask_truncated).lower(),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "num_train_epochs": settings.num_train_epochs,
        "save_steps": int(settings.save_steps),
        "seed": settings.seed,
        "per_device_train_batch_size": settings.num_generations,
        "gradient_accumulation_steps": max(1, rollouts // settings.num_generations // 8),
        "steps_per_generation": max(1, rollouts // settings.num_generations // 8) * settings.updates_per_rollout,
        "use_vllm": "true",
        "vllm_mode": "colocate",
        "deepspeed": "zero3",
        "log_completions": "true",
        "output_dir": '"$HERE/out"',
    }
    if settings.dual_clip is not None:
        values["delta"] = settings.dual_clip
    if settings.max_steps > 0:
        values["max_steps"] = settings.max_steps
    lines = [f"  --{name} {_shell(value)}" for name, value in values.items()]
    return (
        script_head("ms-swift on 8 GPUs")
        + 'cd "$HERE"\nNPROC_PER_NODE="${GPUS:-8}" swift rlhf \\\n'
        + " \\\n".join(lines)
        + ' \\\n  "$@"\n'
    )


def _shell(value: object) -> str:
    text = str(value)
    if text.startswith('"$'):
        return text
    return " ".join(shlex.quote(word) for word in text.split())

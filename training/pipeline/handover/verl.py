"""verl: Parquet rows, a reward file and a shell script of Hydra settings."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from metis_home.errors import DataError, RecipeError

from .settings import RLSettings, script_head

_PARTS = {"accuracy_reward": "acc", "format_reward": "format"}
_AGGREGATIONS = {
    "token_mean": "token-mean",
    "dapo": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}


def write(settings: RLSettings, rows: Sequence[dict[str, object]], out: Path) -> list[str]:
    """Write prompts.parquet, rewards.py and train.sh; return what verl cannot take over.

    Raises:
        DataError: pyarrow is not installed. RecipeError: a reward that `compute_score` has not.
    """
    unknown = [name for name in settings.rewards if name not in _PARTS]
    if unknown:
        raise RecipeError(f"rewards {', '.join(unknown)}: only {', '.join(_PARTS)} can be handed to verl.")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError('Parquet needs pyarrow: pip install "metis_home[train]"') from error
    table = pyarrow.Table.from_pylist([_row(index, row, settings, out) for index, row in enumerate(rows)])
    pyarrow.parquet.write_table(table, out / "prompts.parquet")
    (out / "rewards.py").write_text(_rewards(settings), encoding="utf-8")
    (out / "train.sh").write_text(_script(settings), encoding="utf-8")
    notes = []
    if settings.dynamic_sampling:
        notes.append("dynamic sampling: use verl's DAPO recipe (algorithm.filter_groups), main_ppo has none")
    if settings.overlong_buffer_tokens:
        notes.append("overlong penalty: set reward_model.reward_manager=dapo and its overlong_buffer")
    if settings.loss_aggregation == "dapo":
        notes.append("loss_aggregation dapo: verl's token-mean has no mean per prompt first")
    if settings.mask_truncated:
        notes.append("mask_truncated: verl trains on answers that the limit cut")
    if (settings.min_pixels, settings.max_pixels) != (None, None):
        notes.append("min_pixels, max_pixels: set them in the model's preprocessor_config.json")
    return notes + settings.not_carried()


def _rewards(settings: RLSettings) -> str:
    """The score is the recipe's weighted sum; the parts stay beside it for verl's metrics."""
    weights = zip(settings.rewards, settings.reward_weights, strict=True)
    total = " + ".join(f'{weight} * parts["{_PARTS[name]}"]' for name, weight in weights)
    return (
        '"""verl calls `compute_score`."""\n\n'
        "from metis_home.training import reward_adapters\n\n\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **options):\n"
        "    parts = reward_adapters.compute_score(data_source, solution_str, ground_truth, extra_info)\n"
        f'    return {{**parts, "score": {total}}}\n'
    )


def _row(index: int, row: dict[str, object], settings: RLSettings, out: Path) -> dict[str, object]:
    """verl replaces `<image>` in the text by the row's images, in order."""
    prompt, images = [], []
    for message in row["messages"]:  # type: ignore[attr-defined]
        content = message["content"]
        if isinstance(content, list):
            images += [block["image"] for block in content if block["type"] == "image"]
            content = "".join("<image>" if block["type"] == "image" else block["text"] for block in content)
        prompt.append({"role": message["role"], "content": content})
    if settings.system_prompt is not None and prompt[0]["role"] != "system":
        prompt.insert(0, {"role": "system", "content": settings.system_prompt})
    return {
        "data_source": row["source"],
        "prompt": prompt,
        "images": [{"bytes": (out / path).read_bytes()} for path in images],
        "ability": "reasoning",
        "reward_model": {"style": "rule", "ground_truth": row["solution"]},
        "extra_info": {
            "index": index,
            "id": str(row["id"]),
            **{name: row.get(name) for name in ("kind", "options", "tolerance")},
        },
    }


def _script(settings: RLSettings) -> str:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    values: dict[str, object] = {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        "data.train_files": '"$HERE/prompts.parquet"',
        "data.val_files": '"$HERE/prompts.parquet"',
        "data.image_key": "images",
        "data.train_batch_size": settings.prompts_per_step * settings.updates_per_rollout,
        "data.max_prompt_length": settings.max_prompt_tokens,
        "data.max_response_length": settings.max_completion_tokens,
        "data.truncation": "error",
        "data.filter_overlong_prompts": True,
        "data.seed": settings.seed,
        "actor_rollout_ref.model.path": '"${MODEL:-' + settings.model + '}"',
        "actor_rollout_ref.model.use_remove_padding": True,
        "actor_rollout_ref.model.enable_gradient_checkpointing": True,
        f"{actor}.optim.lr": settings.learning_rate,
        f"{actor}.optim.weight_decay": settings.weight_decay,
        f"{actor}.grad_clip": settings.max_grad_norm,
        f"{actor}.ppo_mini_batch_size": settings.prompts_per_step,
        f"{actor}.ppo_epochs": settings.passes_per_rollout,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.clip_ratio_low": settings.clip_low,
        f"{actor}.clip_ratio_high": settings.clip_high,
        f"{actor}.clip_ratio_c": settings.dual_clip if settings.dual_clip is not None else 1e9,
        f"{actor}.loss_agg_mode": _AGGREGATIONS[settings.loss_aggregation],
        f"{actor}.use_kl_loss": settings.kl_coef > 0,
        f"{actor}.kl_loss_coef": settings.kl_coef,
        f"{actor}.entropy_coeff": 0,
        f"{actor}.freeze_vision_tower": settings.freeze_vision,
        f"{rollout}.name": "vllm",
        f"{rollout}.n": settings.num_generations,
        f"{rollout}.temperature": settings.temperature,
        f"{rollout}.top_p": settings.top_p,
        f"{rollout}.top_k": settings.top_k or -1,
        "custom_reward_function.path": '"$HERE/rewards.py"',
        "custom_reward_function.name": "compute_score",
        "trainer.project_name": "metis_home",
        "trainer.experiment_name": "stage_rl",
        "trainer.n_gpus_per_node": '"${GPUS:-8}"',
        "trainer.nnodes": '"${NODES:-1}"',
        "trainer.save_freq": int(settings.save_steps),
        "trainer.total_epochs": max(1, round(settings.num_train_epochs)),
        "trainer.default_local_dir": '"$HERE/out"',
    }
    if settings.max_steps > 0:
        values["trainer.total_training_steps"] = settings.max_steps
    lines = [f"  {name}={_shell(value)}" for name, value in values.items()]
    return script_head("verl") + "python3 -m verl.trainer.main_ppo \\\n" + " \\\n".join(lines) + ' \\\n  "$@"\n'


def _shell(value: object) -> str:
    text = str(value)
    return text if text.startswith('"$') else shlex.quote(text)

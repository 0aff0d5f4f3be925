"""TRL: a script around `GRPOTrainer`, which reads rows and reward functions as ours does."""

from collections.abc import Sequence
from pathlib import Path

from ...data.records import write_rows
from .settings import RLSettings

_LOSSES = {"token_mean": "dapo", "dapo": "dapo", "sequence_mean": "grpo", "dr_grpo": "dr_grpo"}
_SCRIPT = '''"""Stage-RL with TRL; written by `metis-home export-recipe`.

    accelerate launch train.py [--model MODEL] [--output_dir DIR] [--max_steps N]
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset, Image, Sequence
from trl import GRPOConfig, GRPOTrainer

from rewards import REWARDS, WEIGHTS

FOLDER = Path(__file__).resolve().parent
SETTINGS = json.loads((FOLDER / "config.json").read_text())


def rows() -> Dataset:
    """One row per prompt: conversation, images, and the columns that rewards read."""
    lines = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text().splitlines()]
    for line in lines:
        line["images"] = [str(FOLDER / path) for path in line["images"]]
    return Dataset.from_list(lines).cast_column("images", Sequence(Image()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=SETTINGS["model"])
    parser.add_argument("--output_dir", default=str(FOLDER / "out"))
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--config", default="{}", help="JSON with further fields of GRPOConfig")
    arguments = parser.parse_args()
    fields = {**SETTINGS["grpo"], **json.loads(arguments.config), "output_dir": arguments.output_dir}
    if arguments.max_steps is not None:
        fields["max_steps"] = arguments.max_steps
    trainer = GRPOTrainer(
        model=arguments.model,
        reward_funcs=REWARDS,
        args=GRPOConfig(**fields, reward_weights=WEIGHTS),
        train_dataset=rows(),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
'''


def write(settings: RLSettings, rows: Sequence[dict[str, object]], out: Path) -> list[str]:
    """Write prompts.jsonl, rewards.py, config.json and train.py; return what TRL cannot take over."""
    import json

    write_rows(out / "prompts.jsonl", [_row(row, settings) for row in rows])
    (out / "rewards.py").write_text(_rewards(settings), encoding="utf-8")
    (out / "train.py").write_text(_SCRIPT, encoding="utf-8")
    config = {"model": settings.model, "grpo": _fields(settings)}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    notes = []
    if settings.dynamic_sampling:
        notes.append("dynamic sampling: TRL has no refill; groups without a difference only waste their rollouts")
    if settings.overlong_buffer_tokens:
        notes.append("overlong penalty: add metis_home.training.rewards.overlong_reward_for to rewards.py")
    if settings.freeze_vision:
        notes.append("frozen vision tower: TRL trains all weights; freeze it in train.py before the trainer is made")
    return notes


def _row(row: dict[str, object], settings: RLSettings) -> dict[str, object]:
    """TRL takes images from a column and puts them at the placeholders of the conversation."""
    messages, images = [], []
    for message in row["messages"]:  # type: ignore[attr-defined]
        content = message["content"]
        if isinstance(content, list):
            images += [block["image"] for block in content if block["type"] == "image"]
            content = [{"type": "image"} if block["type"] == "image" else block for block in content]
        else:
            content = [{"type": "text", "text": content}]
        messages.append({"role": message["role"], "content": content})
    if settings.system_prompt is not None and messages[0]["role"] != "system":
        system = [{"type": "text", "text": settings.system_prompt}]
        messages.insert(0, {"role": "system", "content": system})
    return {
        "prompt": messages,
        "images": images,
        "solution": row.get("solution"),
        "kind": row.get("kind"),
        "source": row["source"],
    }


def _rewards(settings: RLSettings) -> str:
    names = ", ".join(settings.rewards)
    return (
        '"""Reward functions; metis_home keeps TRL\'s signature."""\n\n'
        f"from metis_home.training.rewards import {names}\n\n"
        f"REWARDS = [{names}]\nWEIGHTS = {list(settings.reward_weights)}\n"
    )


def _fields(settings: RLSettings) -> dict[str, object]:
    rollouts = settings.prompts_per_step * settings.num_generations
    fields: dict[str, object] = {
        "num_generations": settings.num_generations,
        "max_completion_length": settings.max_completion_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "beta": settings.kl_coef,
        "epsilon": settings.clip_low,
        "epsilon_high": settings.clip_high,
        "loss_type": _LOSSES[settings.loss_aggregation],
        "mask_truncated_completions": settings.mask_truncated,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "save_steps": settings.save_steps,
        "seed": settings.seed,
        # One process: rollouts of a step. On N devices divide gradient_accumulation_steps by N.
        "per_device_train_batch_size": settings.num_generations,
        "gradient_accumulation_steps": rollouts // settings.num_generations,
        "steps_per_generation": rollouts // settings.num_generations * settings.updates_per_rollout,
        "bf16": True,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "log_completions": True,
        "remove_unused_columns": False,
    }
    if settings.dual_clip is not None:
        fields["delta"] = settings.dual_clip
    return fields

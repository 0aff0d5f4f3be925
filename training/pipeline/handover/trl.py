"""TRL: a script around `GRPOTrainer`, which reads rows and reward functions as ours does."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ...data.records import write_rows
from .settings import RLSettings

_LOSSES = {"token_mean": "dapo", "dapo": "dapo", "sequence_mean": "grpo", "dr_grpo": "dr_grpo"}
_COLUMNS = ("solution", "kind", "options", "tolerance")
_SCRIPT = '''"""Stage-RL with TRL; written by `metis-home export-recipe`.

    accelerate launch train.py [--model MODEL] [--output_dir DIR] [--max_steps N] [--config JSON]
"""

import argparse
import json
import os
from pathlib import Path

from datasets import Dataset, Image, List
from trl import GRPOConfig, GRPOTrainer

from metis_home import MetisHomeProcessor
from rewards import REWARDS, WEIGHTS

FOLDER = Path(__file__).resolve().parent
SETTINGS = json.loads((FOLDER / "config.json").read_text())


def rows() -> Dataset:
    """One row per prompt: conversation, images, and the columns that rewards read."""
    lines = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text().splitlines()]
    for line in lines:
        line["images"] = [str(FOLDER / path) for path in line["images"]]
    return Dataset.from_list(lines).cast_column("images", List(Image()))


def settings(changes: dict[str, object]) -> GRPOConfig:
    """The recipe's settings on as many processes as there are, with changes."""
    fields = {**SETTINGS["grpo"], **changes}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for name in ("gradient_accumulation_steps", "steps_per_generation"):
        if name not in changes:
            if fields[name] % processes:
                raise SystemExit(f"{name} is {fields[name]} on one process and cannot be shared by {processes}")
            fields[name] //= processes
    return GRPOConfig(**fields, reward_weights=WEIGHTS)


def without_empty_images(model: object, arguments: tuple, fields: dict) -> tuple[tuple, dict]:
    """Rows without images come with pixels of 0 images, which the vision tower cannot read: leave them out."""
    grids = fields.get("image_grid_thw")
    if grids is not None and len(grids) == 0:
        fields = {name: value for name, value in fields.items() if name not in ("pixel_values", "image_grid_thw")}
    return arguments, fields


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=SETTINGS["model"])
    parser.add_argument("--output_dir", default=str(FOLDER / "out"))
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--config", default="{}", help="JSON with further fields of GRPOConfig")
    arguments = parser.parse_args()
    changes = {**json.loads(arguments.config), "output_dir": arguments.output_dir}
    if arguments.max_steps is not None:
        changes["max_steps"] = arguments.max_steps
    processor = MetisHomeProcessor.from_pretrained(arguments.model, **SETTINGS["processor"])
    processor.tokenizer.padding_side = "left"
    # TRL takes completions apart where a tokenizer says how; the format reward judges them as they were written.
    processor.tokenizer.response_template = None
    trainer = GRPOTrainer(
        model=arguments.model,
        reward_funcs=REWARDS,
        args=settings(changes),
        train_dataset=rows(),
        processing_class=processor,
    )
    trainer.model.register_forward_pre_hook(without_empty_images, with_kwargs=True)
    if SETTINGS["freeze_vision"]:
        for name, parameter in trainer.model.named_parameters():
            if ".visual." in f".{name}":
                parameter.requires_grad_(False)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
'''


def write(settings: RLSettings, rows: Sequence[dict[str, object]], out: Path) -> list[str]:
    """Write prompts.jsonl, rewards.py, config.json and train.py; return what TRL cannot take over."""
    write_rows(out / "prompts.jsonl", [_row(row, settings) for row in rows])
    (out / "rewards.py").write_text(_rewards(settings), encoding="utf-8")
    (out / "train.py").write_text(_SCRIPT, encoding="utf-8")
    pixels = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    config = {
        "model": settings.model,
        "freeze_vision": settings.freeze_vision,
        "processor": {name: value for name, value in pixels.items() if value is not None},
        "grpo": _fields(settings),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    notes = []
    if settings.dynamic_sampling:
        notes.append("dynamic sampling: TRL has no refill; groups without a difference only waste their rollouts")
    if settings.loss_aggregation == "dapo":
        notes.append("loss_aggregation dapo: TRL's is a mean over all tokens, without a mean per prompt first")
    if settings.loss_aggregation == "sequence_mean" and settings.mask_truncated:
        notes.append("mask_truncated: TRL's mean over sequences counts the masked ones")
    if "max_prompt_tokens" in settings.stated:
        notes.append("max_prompt_tokens: TRL has no limit and truncates nothing; leave long rows out of prompts.jsonl")
    return notes + settings.not_carried(_trainer_fields())


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
        "source": row["source"],
        **{name: row.get(name) for name in _COLUMNS},
    }


def _rewards(settings: RLSettings) -> str:
    names, weights, limits = list(settings.rewards), list(settings.reward_weights), ""
    imported = sorted(set(names))
    if settings.overlong_buffer_tokens:
        imported.append("overlong_reward_for")
        names.append(f"overlong_reward_for({settings.max_completion_tokens}, {settings.overlong_buffer_tokens})")
        weights.append(settings.overlong_weight)
        limits = "# overlong_reward_for(longest answer, buffer before it), in tokens\n"
    return (
        '"""Reward functions; metis_home keeps TRL\'s signature."""\n\n'
        f"from metis_home.training.rewards import {', '.join(imported)}\n\n"
        f"{limits}REWARDS = [{', '.join(names)}]\nWEIGHTS = {weights}\n"
    )


def _fields(settings: RLSettings) -> dict[str, object]:
    rollouts = settings.prompts_per_step * settings.num_generations
    chosen: dict[str, object] = {
        "num_generations": settings.num_generations,
        "max_completion_length": settings.max_completion_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "num_iterations": settings.passes_per_rollout,
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
        # Rollouts of a step on one process; train.py shares them among all.
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
        chosen["delta"] = settings.dual_clip
    model: dict[str, object] = {"dtype": settings.dtype}
    if settings.attn_implementation is not None:
        model["attn_implementation"] = settings.attn_implementation
    shared = {name: value for name, value in settings.others.items() if name in _trainer_fields()}
    return chosen | {"model_init_kwargs": model} | shared


def _trainer_fields() -> set[str]:
    """The settings that every Trainer of transformers has, TRL's too."""
    from transformers import TrainingArguments

    return {entry.name for entry in fields(TrainingArguments)}

"""Carry out a recipe: load, train, save. What `metis-home train` does, as a function."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metis_home.errors import RecipeError

from .recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

    from .data.records import Record

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SETTINGS_FILE = "recipe.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSummary:
    """What a finished run leaves behind."""

    output_dir: str
    steps: int
    metrics: dict[str, float]
    """The last value of everything that was logged."""


def run_recipe(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> TrainingSummary:
    """Train as the recipe says, and save model and processor into its output directory.

    Args:
        resume: go on from the newest checkpoint of the output directory.
        overwrite: use an output directory that already holds something.
    Raises:
        RecipeError: the output directory is in use, or there is no checkpoint to resume from.
        DataError: rows cannot be used. CheckpointError, ConfigError: the model cannot be loaded.
        TrainingError: a loss was no number, and other reasons to stop.
    """
    output_dir = Path(str(recipe.training["output_dir"]))
    checkpoint = _checkpoint(output_dir) if resume else None
    if not resume and not overwrite and output_dir.is_dir() and any(output_dir.iterdir()):
        raise RecipeError(
            f"{output_dir} already holds files. Use another training.output_dir, --resume to go on from its newest "
            "checkpoint, or --overwrite."
        )
    runners: dict[str, Callable[[Recipe, str | None], TrainingSummary]] = {
        "sft": _run_sft,
        "router": _run_router,
        "rl": _run_rl,
    }
    return runners[recipe.stage](recipe, checkpoint)


def _run_sft(recipe: Recipe, checkpoint: str | None) -> TrainingSummary:
    from .sft import MetisSFTTrainer, branch_lora_config, merge_branch_lora

    config = _config(recipe)
    peft_config = None
    if recipe.lora is not None:
        lora = recipe.lora
        peft_config = branch_lora_config(lora.branch, r=lora.r, alpha=lora.alpha, dropout=lora.dropout)
    trainer = MetisSFTTrainer(
        _model(recipe),
        config,
        train_dataset=_records(recipe, recipe.data.train),
        eval_dataset=_records(recipe, recipe.data.eval) or None,
        processing_class=_processor(recipe),
        peft_config=peft_config,
    )
    _write_settings(trainer, recipe)
    trainer.train(resume_from_checkpoint=checkpoint)
    if peft_config is None:
        trainer.save_model()
    else:
        # The adapter for those who want to go on with it; the merged model for everybody else.
        trainer.save_model(str(Path(config.output_dir) / "adapter"))
        if trainer.is_world_process_zero():
            merge_branch_lora(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(config.output_dir)
            trainer.processing_class.save_pretrained(config.output_dir)
    return _summary(trainer)


def _run_router(recipe: Recipe, checkpoint: str | None) -> TrainingSummary:
    raise NotImplementedError


def _run_rl(recipe: Recipe, checkpoint: str | None) -> TrainingSummary:
    raise NotImplementedError


def _config(recipe: Recipe):
    """The stage's config; made before the model, because ZeRO-3 decides how a model is loaded."""
    return recipe.config_class()(**recipe.training)


def _model(recipe: Recipe) -> "PreTrainedModel":
    from metis_home import MetisHomeForConditionalGeneration

    section = recipe.model
    options: dict[str, object] = {"dtype": _DTYPES[section.dtype]}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    model = MetisHomeForConditionalGeneration.from_pretrained(section.path, **options)
    if section.ffn_implementation is not None:
        model.config.text_config.ffn_implementation = section.ffn_implementation
    return model


def _processor(recipe: Recipe):
    from metis_home import MetisHomeProcessor

    section = recipe.model
    limits = {"min_pixels": section.min_pixels, "max_pixels": section.max_pixels}
    limits = {name: value for name, value in limits.items() if value is not None}
    return MetisHomeProcessor.from_pretrained(section.processor or section.path, **limits)


def _records(recipe: Recipe, sources: Sequence[str]) -> "list[Record]":
    from .data.records import load_records

    return [record for source in sources for record in load_records(source, image_root=recipe.data.image_root)]


def _checkpoint(output_dir: Path) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    newest = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if newest is None:
        raise RecipeError(f"{output_dir} holds no checkpoint to resume from. Start without --resume.")
    return newest


def _write_settings(trainer: "Trainer", recipe: Recipe) -> None:
    """Put all that the run used beside what it makes."""
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        used = dataclasses.asdict(recipe)
        (output_dir / SETTINGS_FILE).write_text(json.dumps(used, indent=2, default=str) + "\n", encoding="utf-8")


def _summary(trainer: "Trainer") -> TrainingSummary:
    metrics: dict[str, float] = {}
    for entry in trainer.state.log_history:
        metrics.update({name: value for name, value in entry.items() if isinstance(value, int | float)})
    return TrainingSummary(
        output_dir=str(trainer.args.output_dir), steps=int(trainer.state.global_step), metrics=metrics
    )

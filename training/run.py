"""Carry out a recipe: load, train, save. What `metis-home train` does, as a function."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from metis_home.errors import MetisHomeError, RecipeError

from .checkpoints import newest_checkpoint
from .loading import load_model, load_processor
from .recipe import LoraSection, Recipe
from .same_run import SETTINGS_FILE, recipe_settings, refuse_other_settings

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, Trainer

    from metis_home.processing import MetisHomeProcessor

    from .data.records import Record


ROUTED = "model"  # the checkpoint with the new router, inside the output directory


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
        RecipeError: the output directory is in use, there is no checkpoint to resume from, or the run that is resumed
            had settings that make another one of it.
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
    if checkpoint is not None:
        refuse_other_settings(recipe, output_dir / SETTINGS_FILE)
    runners: dict[str, Callable[[Recipe, str | None], TrainingSummary]] = {
        "sft": _run_sft,
        "router": _run_router,
        "rl": _run_rl,
    }
    return runners[recipe.stage](recipe, checkpoint)


def _run_sft(recipe: Recipe, checkpoint: str | None) -> TrainingSummary:
    from .sft import MetisSFTTrainer

    config = _config(recipe)
    model = _model(recipe)
    trainer = MetisSFTTrainer(
        model,
        config,
        train_dataset=_records(recipe, recipe.data.train),
        eval_dataset=_records(recipe, recipe.data.eval) or None,
        processing_class=_processor(recipe),
        peft_config=None if recipe.lora is None else _lora_config(recipe.lora, model, True),
    )
    _write_settings(trainer, recipe)
    trainer.train(resume_from_checkpoint=checkpoint)
    _save(trainer, adapter=recipe.lora is not None)
    return _summary(trainer)


def _run_router(recipe: Recipe, checkpoint: str | None) -> TrainingSummary:
    """The checkpoint itself stays as it is: a copy of it gets the new router."""
    from .sft import train_router

    if checkpoint is not None:
        raise RecipeError("a router is trained in minutes and keeps no checkpoints: start it again, with --overwrite.")
    config = _config(recipe)
    model_dir = Path(config.output_dir) / ROUTED
    copy_checkpoint(Path(recipe.model.path), model_dir)
    report = train_router(
        model_dir,
        _records(recipe, recipe.data.train),
        config,
        eval_records=_records(recipe, recipe.data.eval) or None,
        processor=_processor(recipe),
    )
    steps = max((int(entry.get("step", 0)) for entry in report.log_history), default=0)
    return TrainingSummary(output_dir=str(model_dir), steps=steps, metrics=_last_values(report.log_history))


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint directory, sharing the bytes where the file system can (hard links are replaced, not written).

    Raises:
        RecipeError: `source` is no directory.
    """
    if not source.is_dir():
        raise RecipeError(f"model.path {str(source)!r} is no directory: a router is trained in a local checkpoint.")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=False, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _run_rl(recipe: Recipe, checkpoint: str | None) -> TrainingSummary:
    from .rl import MetisRLTrainer

    config = _config(recipe)
    model = _model(recipe)
    trainer = MetisRLTrainer(
        model,
        config,
        list(recipe.rewards),
        _records(recipe, recipe.data.train),
        _processor(recipe),
        eval_dataset=_records(recipe, recipe.data.eval) or None,
        peft_config=None if recipe.lora is None else _lora_config(recipe.lora, model, config.thinking == "sample"),
    )
    _write_settings(trainer, recipe)
    trainer.train(resume_from_checkpoint=checkpoint)
    _save(trainer, adapter=recipe.lora is not None)
    return _summary(trainer)


def _lora_config(lora: LoraSection, model: "PreTrainedModel", train_router: bool) -> "LoraConfig":
    """Adapters on the branches of a two-branch model, on the text layers of a dense one.

    Raises:
        RecipeError: one branch of a dense model.
    """
    from .sft import branch_lora_config, dense_lora_config

    if model.config.model_type == "metis_home":
        options: Any = {"r": lora.r, "alpha": lora.alpha, "dropout": lora.dropout, "train_router": train_router}
        return branch_lora_config(lora.branch, **options)
    if lora.branch != "both":
        raise RecipeError(f"lora.branch is {lora.branch!r}, and the dense {model.config.model_type} has no branches")
    return dense_lora_config(r=lora.r, alpha=lora.alpha, dropout=lora.dropout)


def _save(trainer: "Trainer", *, adapter: bool) -> None:
    """Save model and processor; with an adapter also that, for those who want to go on with it."""
    output_dir = Path(str(trainer.args.output_dir))
    if not adapter:
        trainer.save_model()
        return
    from .sft import merge_branch_lora

    trainer.save_model(str(output_dir / "adapter"))
    if trainer.is_world_process_zero():
        merged = cast(Any, merge_branch_lora(trainer.accelerator.unwrap_model(trainer.model)))
        merged.save_pretrained(output_dir)
        trainer.processing_class.save_pretrained(output_dir)


def _config(recipe: Recipe):
    """The stage's config; made before the model, because ZeRO-3 decides how a model is loaded."""
    try:
        return recipe.config_class()(**recipe.training)
    except MetisHomeError:
        raise
    except (ValueError, ImportError) as error:  # TrainingArguments': bf16 without a GPU, a logger that is not installed
        raise RecipeError(f"training: {error}") from error


def _model(recipe: Recipe) -> "PreTrainedModel":
    section = recipe.model
    model = load_model(section.path, dtype=section.dtype, attn_implementation=section.attn_implementation)
    if section.ffn_implementation is not None:
        model.config.text_config.ffn_implementation = section.ffn_implementation
    return model


def _processor(recipe: Recipe) -> "MetisHomeProcessor":
    section = recipe.model
    source = section.processor or section.path
    return load_processor(source, min_pixels=section.min_pixels, max_pixels=section.max_pixels)


def _records(recipe: Recipe, sources: Sequence[str]) -> "list[Record]":
    from .data.records import load_records

    return [record for source in sources for record in load_records(source, image_root=recipe.data.image_root)]


def _checkpoint(output_dir: Path) -> str:
    newest = newest_checkpoint(output_dir)
    if newest is None:
        raise RecipeError(f"{output_dir} holds no complete checkpoint to resume from. Start without --resume.")
    return newest


def _write_settings(trainer: "Trainer", recipe: Recipe) -> None:
    """Put all that the run used beside what it makes."""
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        used = json.dumps(recipe_settings(recipe), indent=2)
        (output_dir / SETTINGS_FILE).write_text(used + "\n", encoding="utf-8")


def _summary(trainer: "Trainer") -> TrainingSummary:
    return TrainingSummary(
        output_dir=str(trainer.args.output_dir),
        steps=int(trainer.state.global_step),
        metrics=_last_values(trainer.state.log_history),
    )


def _last_values(log_history: Sequence[dict[str, float]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for entry in log_history:
        metrics.update({name: value for name, value in entry.items() if isinstance(value, int | float)})
    return metrics

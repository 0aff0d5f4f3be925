"""Train the router of a checkpoint, and nothing else: a laptop's job, also for a 72B model.

Of the checkpoint only embeddings, vision tower and router are read (at 7B 2.3 of 26 GiB), each prompt is embedded once,
and at the end only the router's tensors change on disk.
"""

import copy
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers import initialization as init

from ...configuration import MetisHomeConfig
from ...errors import CheckpointError, RecipeError
from ...modeling import MetisHomeForConditionalGeneration
from ...names import ROUTER_PREFIX, to_hub_name
from ..freezing import trainable_sets
from .config import MetisSFTConfig
from .dataset import Source
from .journal import peak_memory_gib
from .router_checkpoint import StoredTensor, replace_router, stored_tensors

if TYPE_CHECKING:
    from ...processing import MetisHomeProcessor

logger = logging.getLogger(__name__)
GIB = 2**30
_PARTS = ("model.visual.", "model.language_model.embed_tokens.", ROUTER_PREFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterTraining:
    """What a router training did."""

    log_history: list[dict[str, float]]
    """Trainer's log: losses, accuracy, AUC, calibration error by step."""
    eval_metrics: dict[str, float] = field(default_factory=dict)
    """The last evaluation, where there were rows for one."""
    loaded_gib: float
    """Size of the tensors that were read."""
    checkpoint_gib: float
    """Size of all tensors of the checkpoint."""
    peak_memory_gib: float
    """Highest memory of this process."""
    seconds: float


def train_router(
    model_dir: str | os.PathLike[str],
    records: Source,
    config: MetisSFTConfig,
    *,
    eval_records: Source | None = None,
    processor: "MetisHomeProcessor | None" = None,
    callbacks: list[TrainerCallback] | None = None,
) -> RouterTraining:
    """Train the router of `model_dir` on the modes of `records`, and write it back.

    Args:
        model_dir: a two-branch directory or link bundle. Its router tensors, its config's `router_trained` and the
            digests in the converter's manifest change; every other byte stays.
        records: rows with a mode; responses are not needed.
        config: learning rate, epochs, batch size, ... of the training; logs and plots go to its `output_dir`. It freezes
            all but the router, whether it says so or not.
        eval_records: held-out rows, evaluated at the end (and as often as `config` says).
        processor: default: the directory's.
    Raises:
        CheckpointError: there is no two-branch checkpoint. DataError, TrainingError: as `MetisSFTTrainer`.
        RecipeError: `config` trains something else than the router.
    """
    from ...processing import MetisHomeProcessor
    from .trainer import MetisSFTTrainer

    started = time.perf_counter()
    if (config.freeze or config.train_only) and trainable_sets(config.freeze, config.train_only) != {"router"}:
        raise RecipeError(
            f"train_router trains the router alone, the config says freeze={config.freeze}, "
            f"train_only={config.train_only}. Leave both empty, or use MetisSFTTrainer."
        )
    config = copy.copy(config)
    config.freeze, config.train_only = None, ["router"]
    config.save_strategy = "no"  # the model here is a part of one; minutes need no checkpoint
    if config.load_best_model_at_end:
        raise RecipeError("load_best_model_at_end needs checkpoints, and training a router alone writes none.")
    model, loaded = load_for_routing(model_dir)
    trainer = MetisSFTTrainer(
        model=model,
        args=config,
        train_dataset=records,
        eval_dataset=eval_records,
        processing_class=processor or MetisHomeProcessor.from_pretrained(model_dir),
        callbacks=callbacks,
    )
    trainer.train()
    metrics = trainer.evaluate() if eval_records is not None else {}
    if trainer.accelerator.is_main_process:
        replace_router(model_dir, router_tensors_of(model))
    trainer.accelerator.wait_for_everyone()
    peak = peak_memory_gib(trainer.accelerator.device)
    every = sum(tensor.end - tensor.begin for tensor in stored_tensors(model_dir).values())
    report = RouterTraining(
        log_history=trainer.state.log_history,
        eval_metrics=metrics,
        loaded_gib=loaded / GIB,
        checkpoint_gib=every / GIB,
        peak_memory_gib=peak,
        seconds=time.perf_counter() - started,
    )
    logger.info(
        "router trained: read %.2f of %.2f GiB, peak memory %.2f GiB, %.0f s",
        report.loaded_gib,
        report.checkpoint_gib,
        report.peak_memory_gib,
        report.seconds,
    )
    return report


def load_for_routing(model_dir: str | os.PathLike[str]) -> tuple[MetisHomeForConditionalGeneration, int]:
    """Load embeddings, vision tower and router; the decoder has no layers and the head no numbers.

    The tensors are mapped from the files: memory is needed for what is used of them.

    Returns:
        The model, in the types of the checkpoint, and how many bytes of the checkpoint it maps.
    Raises:
        CheckpointError: a tensor of these parts is missing. ConfigError: no two-branch config.
    """
    root = Path(model_dir)
    config = MetisHomeConfig.from_pretrained(root)
    stored = stored_tensors(root)
    model = _without_decoder(config)
    wanted = {name: to_hub_name(name) for name in model.state_dict() if name.startswith(_PARTS)}
    missing = sorted(hub for hub in wanted.values() if hub not in stored)
    if missing:
        raise CheckpointError(
            f"{root} lacks {len(missing)} tensors of embeddings, vision tower and router; the first is {missing[0]!r}. "
            "Is it a two-branch checkpoint? A dense one becomes that with `metis-home convert`."
        )
    tensors = _read({name: stored[hub] for name, hub in wanted.items()})
    for name in tensors:
        if name.startswith(ROUTER_PREFIX):  # trains, and always computes in float32
            tensors[name] = tensors[name].to(torch.float32, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.eval(), sum(stored[hub].end - stored[hub].begin for hub in wanted.values())


def router_tensors_of(model: MetisHomeForConditionalGeneration) -> dict[str, Tensor]:
    """{name inside the router: tensor}."""
    return {name: tensor.detach() for name, tensor in model.model.router.state_dict().items()}


def _without_decoder(config: MetisHomeConfig) -> MetisHomeForConditionalGeneration:
    """The model with no decoder layer and a head of one row, its weights not filled (so they take no memory yet)."""
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = 0
    config.text_config.layer_types = []
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    vocabulary, config.text_config.vocab_size = config.text_config.vocab_size, 1
    config.text_config.pad_token_id = None
    with init.no_init_weights():
        model = MetisHomeForConditionalGeneration(config)
        model.set_input_embeddings(nn.Embedding(vocabulary, config.text_config.hidden_size))
    config.text_config.vocab_size = vocabulary
    return model


def _read(wanted: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """Map the wanted tensors into memory: {name: tensor}."""
    from safetensors import safe_open

    tensors = {}
    for file in sorted({tensor.file for tensor in wanted.values()}):
        with safe_open(file, framework="pt") as opened:
            for name, tensor in wanted.items():
                if tensor.file == file:
                    tensors[name] = opened.get_tensor(tensor.key)
    return tensors

"""What a checkpoint needs beside weights, optimizer and Trainer state: prompts, buffer, sampler, one file per rank."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from metis_home.errors import TrainingError

from .. import collectives
from ..data.conversation import texts
from ..data.records import Record
from ..rollouts.engine import RolloutEngine
from .prompts import PromptSource
from .samples import Buffer

_VERSION = 2


def state_file(checkpoint: str | os.PathLike[str], rank: int) -> Path:
    """Where the state of a rank is."""
    return Path(checkpoint) / f"rl_state_{rank}.pt"


def save_state(
    checkpoint: str | os.PathLike[str],
    *,
    source: PromptSource,
    buffer: Buffer,
    engine: RolloutEngine,
    pending: list[dict[str, float]],
    update_sums: dict[str, float],
    step: int,
) -> None:
    """Write this rank's state; it appears by rename."""
    path = state_file(checkpoint, collectives.rank())
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "version": _VERSION,
        "world_size": collectives.world_size(),
        "records": records_digest(source.records),
        "source": source.state_dict(),
        "buffer": buffer.state_dict(),
        "engine": engine.state_dict(),
        "pending": pending,
        "update_sums": update_sums,
        "step": step,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(checkpoint: str | os.PathLike[str], source: PromptSource) -> dict[str, Any]:
    """Read this rank's state.

    Raises:
        TrainingError: it is missing, or belongs to another number of ranks or other data.
    """
    path = state_file(checkpoint, collectives.rank())
    if not path.is_file():
        raise TrainingError(
            f"{path} is missing: the checkpoint was not written by MetisRLTrainer, or its writing was interrupted. "
            "Resume from an earlier checkpoint."
        )
    state = torch.load(path, weights_only=True)
    found = (state["version"], state["world_size"], state["records"])
    expected = (_VERSION, collectives.world_size(), records_digest(source.records))
    if found != expected:
        raise TrainingError(
            f"{path} cannot be resumed here: (format, ranks, digest of the prompts) is {found}, and this run has "
            f"{expected}. Resume with the same data on as many ranks."
        )
    return state


def records_digest(records: Sequence[Record]) -> str:
    """Tells whether two lists of prompts are the same, in the same order: ids, texts and golds; images by their place."""
    digest = xxhash.xxh128()
    for record in records:
        digest.update(json.dumps([record.id, record.golds, record.kind, *texts(record.messages)]).encode())
    return digest.hexdigest()

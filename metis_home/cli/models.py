"""What commands that load a model of either kind share: typed errors, and the system prompt it was trained with."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from metis_home.errors import CheckpointError
from metis_home.prompts import SYSTEM_PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from metis_home.processing import MetisHomeProcessor


def model_path(model: str) -> str:
    """The model with its `~` replaced, if it is a directory or may be a hub id.

    Raises:
        CheckpointError: it names a directory that is not there.
    """
    path = str(Path(model).expanduser()) if model.startswith("~") else model
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise CheckpointError(f"{model}: no such directory")
    return path


def load_either(model: str, *, dtype: str, device: str, attention: str | None = None) -> "PreTrainedModel":
    """Load a two-branch or dense model, ready to answer.

    Raises:
        CheckpointError: there is no such model, or the device is not there.
    """
    import torch

    from metis_home.training.loading import load_model

    path = model_path(model)
    try:
        if device != "auto":
            torch.device(device)
        loaded = load_model(path, dtype=dtype, device=device, attn_implementation=attention)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{model}: cannot be loaded on device {device!r}: {error}") from error
    return loaded.eval()


def load_its_processor(
    model: str, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> "MetisHomeProcessor":
    """Load the processor of either kind of model.

    Raises:
        CheckpointError: there is no such model.
    """
    from metis_home.training.loading import load_processor

    path = model_path(model)
    try:
        return load_processor(path, min_pixels=min_pixels, max_pixels=max_pixels)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: there is no processor there: {error}") from error


def system_prompt_for(model: str, given: str | None) -> str:
    """The system prompt of conversations that have none; "" for the chat template's own.

    What the user gave, else what the model was trained with, as `recipe.json` beside it says (of a `checkpoint-N`: one
    folder up; a line on stderr tells), else Metis-RISE's.

    Raises:
        CheckpointError: that file cannot be read.
    """
    if given is not None:
        return given
    from metis_home.training.run import SETTINGS_FILE

    home = Path(model).expanduser().resolve()
    file = (home.parent if home.name.startswith("checkpoint-") else home) / SETTINGS_FILE
    if not file.is_file():
        return SYSTEM_PROMPT
    try:
        trained = json.loads(file.read_text(encoding="utf-8"))["training"].get("system_prompt", SYSTEM_PROMPT)
        if not isinstance(trained, str | None):
            raise TypeError(f"system_prompt is {trained!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} does not say with which system prompt the model was trained ({error!r}). Say it with --system."
        ) from error
    if (trained or "") != SYSTEM_PROMPT:
        shown = f"{trained!r:.60}" if trained else "the chat template's own"
        print(f"system prompt: {shown}, as in training ({file}); --system sets another", file=sys.stderr)
    return trained or ""

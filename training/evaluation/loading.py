"""Load a model to be measured: two-branch, or a dense Qwen2.5-VL, so that base and branch meet in the same harness."""

from pathlib import Path
from typing import TYPE_CHECKING

from metis_home.config_fields import MODEL_TYPE
from metis_home.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from metis_home.processing import MetisHomeProcessor

DENSE = "qwen2_5_vl"


def load_model(
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    attention: str | None = None,
) -> "tuple[nn.Module, MetisHomeProcessor]":
    """Load a model and its processor, ready to answer.

    Args:
        path: a directory or a hub id.
        dtype: "auto" (the checkpoint's own), "bfloat16", "float16", "float32".
        device: "cpu", "cuda", "cuda:1", ...; "auto": spread over the GPUs there are, else cpu.
        min_pixels, max_pixels: image area limits; default: the directory's, else Metis-RISE's.
        attention: attention implementation; default: transformers' choice.
    Raises:
        CheckpointError: there is no such model, it is of another kind, or the device is not there.
    """
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    from metis_home.modeling import MetisHomeForConditionalGeneration
    from metis_home.processing import MetisHomeProcessor

    local = str(Path(path).expanduser()) if path.startswith("~") else path
    if local.startswith((".", "/")) and not Path(local).is_dir():
        raise CheckpointError(f"{path}: no such directory")
    try:
        found = AutoConfig.from_pretrained(local).model_type
    except ValueError as error:
        raise CheckpointError(f"{path}: not a model that can be loaded: {error}") from error
    classes = {MODEL_TYPE: MetisHomeForConditionalGeneration, DENSE: Qwen2_5_VLForConditionalGeneration}
    if found not in classes:
        raise CheckpointError(f"{path}: is a {found} model. Expected {MODEL_TYPE} or a dense {DENSE}.")
    placement = device if device != "auto" or torch.cuda.is_available() else "cpu"
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        torch.device("cpu" if placement == "auto" else placement)
        model = classes[found].from_pretrained(local, dtype=dtype, device_map=placement, **options)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{path}: cannot be loaded on device {device!r}: {error}") from error
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    given = {name: value for name, value in limits.items() if value is not None}
    return model.eval(), MetisHomeProcessor.from_pretrained(local, **given)

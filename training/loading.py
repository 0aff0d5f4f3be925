"""Load whatever is to be trained or sampled: the two-branch model, or a dense VLM of transformers."""

from typing import TYPE_CHECKING

from metis_home.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from metis_home.processing import MetisHomeProcessor

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DENSE_TYPES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")


def load_model(
    path: str, *, dtype: str = "auto", device: str | None = None, attn_implementation: str | None = None
) -> "PreTrainedModel":
    """Load a two-branch model, or a dense Qwen VLM with its stock class.

    Args:
        path: a directory or a hub id.
        dtype: auto (as stored), bf16, fp16 or fp32.
        device: "cpu", "cuda:1", ...; "auto" spreads over the GPUs there are; None leaves the model where it is loaded.
        attn_implementation: sdpa, flash_attention_2, eager, ...
    Raises:
        CheckpointError: no model there, or one of another kind.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from metis_home import MetisHomeForConditionalGeneration

    options: dict[str, object] = {"dtype": _DTYPES[dtype]}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if device is not None:
        options["device_map"] = device if device != "auto" or torch.cuda.is_available() else "cpu"
    try:
        kind = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: there is no model there: {error}") from error
    if kind == "metis_home":
        return MetisHomeForConditionalGeneration.from_pretrained(path, **options)
    if kind not in DENSE_TYPES:
        raise CheckpointError(f"{path} is a {kind} model. Expected metis_home, or one of {', '.join(DENSE_TYPES)}.")
    return AutoModelForImageTextToText.from_pretrained(path, **options)


def load_processor(path: str, *, min_pixels: int | None = None, max_pixels: int | None = None) -> "MetisHomeProcessor":
    """Load the processor of either kind of model; pixel limits replace the directory's own."""
    from metis_home import MetisHomeProcessor

    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return MetisHomeProcessor.from_pretrained(path, **{name: n for name, n in limits.items() if n is not None})

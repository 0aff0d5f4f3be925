"""What moves a result by points and is easily forgotten: limits, prompt, decoding, verifier, versions, hardware."""

import hashlib
import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING

from .answering import Answerer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What decoding still takes from a checkpoint's generation config when it is greedy.
_DECODING = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "eos_token_id")
_PACKAGES = ("metis_home", "torch", "transformers", "math-verify", "pillow", "numpy")


def describe_settings(answerer: Answerer) -> dict[str, object]:
    """Everything that the answers depend on beside model and data, as JSON."""
    model, processor = answerer.model, answerer.processor
    size = dict(processor.image_processor.size)
    prompt = answerer.system_prompt or ""
    generation = model.generation_config
    return {
        "system_prompt": prompt,
        "system_prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(str(processor.chat_template).encode()).hexdigest(),
        "min_pixels": size.get("shortest_edge"),
        "max_pixels": size.get("longest_edge"),
        "max_new_tokens": answerer.max_new_tokens,
        "threshold": answerer.threshold if answerer.routes else None,
        "decoding": "greedy",
        **{name: getattr(generation, name) for name in _DECODING if getattr(generation, name, None) is not None},
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "verifier": f"metis_home {_version('metis_home')} verify_answer, math-verify {_version('math-verify')}; no judge",
    }


def describe_environment(model: "PreTrainedModel") -> dict[str, object]:
    """Versions and hardware, as JSON."""
    import torch

    device = model.device
    if device.type == "cuda":
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    else:
        hardware = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": device.type,
        "hardware": hardware,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

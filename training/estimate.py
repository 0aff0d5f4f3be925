"""How much memory a training run needs on each device, before it is started.

    weights     what the forward reads, whole or this rank's share
    gradients   in the type of the weights
    optimizer   moments, and float32 master weights where the engine keeps them
    gathered    layers that a sharded run has whole at the same time
    activations what the backward pass needs of one micro-batch (`activations.py` counts it)
    head        logits and their gradient, the largest single tensors of a large vocabulary
    rollouts    Stage-RL: keys and values of what is generated, and weights made whole for it; not at the same time as the
                three before

Not in it: the allocator's fragmentation, the CUDA context, communication buffers of NCCL; `reserve` (ours, 10 % and
1.5 GiB) stands for them. Tests compare weights, gradients, optimizer and activations with small real runs.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from metis_home.configuration import MetisHomeConfig
from metis_home.errors import RecipeError
from metis_home.modeling import MetisHomeForConditionalGeneration

from .activations import count_activations
from .freezing import set_of, sets_trained_by_reward, trainable_sets
from .logprobs import CHUNK_BYTES
from .recipe import LoraSection, Recipe
from .shapes import dense_shape, two_branch_shape

GIB = 2**30
Sharding = Literal["none", "zero2", "zero3", "fsdp2"]

# Bytes per trained number that the optimizer keeps, without master weights: two moments in the type of the parameters
# (None), or a fixed size.
_OPTIMIZERS: dict[str, float | None] = {
    "adamw_torch": None,
    "adamw_torch_fused": None,
    "adamw_bnb_8bit": 2.0,
    "adamw_8bit": 2.0,
    "sgd": 0.0,
}
DENSE_SETS = ("vision", "language")
# DeepSpeed's default for stage3_max_live_parameters: gathered parameters that stay until others need the room.
_ZERO3_LIVE_PARAMETERS = 1_000_000_000
_RESERVE_SHARE, _RESERVE_BYTES = 0.10, int(1.5 * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """What the estimate depends on, beside the model."""

    devices: int = 1
    sharding: Sharding = "none"
    weights: torch.dtype = torch.bfloat16
    """Type of the stored weights. DeepSpeed keeps float32 master weights beside them, FSDP2 with bf16 instead of them."""
    compute: torch.dtype = torch.bfloat16
    tokens: int = 8192
    """Tokens of one micro-batch on one device, image tokens and padding included."""
    visual_tokens: int = 4096
    """How many of them are image tokens (each is 4 patches in the vision tower)."""
    gradient_checkpointing: bool = True
    optimizer: str = "adamw_torch_fused"
    attention: str = "fused"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    rollout_tokens: int = 0
    """Stage-RL: tokens whose keys and values are held at once while this device generates; 0: it does not."""
    logit_bytes: int | None = None
    """Stage-RL: most bytes of float32 logits at once; None: those of the whole micro-batch."""
    reference: bool = False
    """Stage-RL: a frozen copy of the model for the KL term, whole on every device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on each device, and in the host's memory for each device's process."""

    parameters: int
    """Numbers in the model, all ranks together."""
    trainable: int
    """How many of them train."""
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    head: int
    rollouts: int
    reserve: int
    host: int

    @property
    def device(self) -> int:
        """The most that is on the device at one time, in bytes."""
        update = self.gathered + self.activations + self.head
        return self.weights + self.gradients + self.optimizer + max(update, self.rollouts) + self.reserve


def estimate_memory(
    config: Qwen2_5_VLConfig,
    settings: MemorySettings,
    *,
    trainable: frozenset[str] | None = None,
    lora: LoraSection | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one training step.

    Args:
        config: the model's configuration, two-branch or dense Qwen2.5-VL; nothing of its weights is read.
        settings: engine, types and micro-batch.
        trainable: names of `freezing.FREEZE_SETS`, or, of a dense model, of `DENSE_SETS`; None: all.
        lora: adapters instead of weights.
    Raises:
        RecipeError: an optimizer whose size is not known.
    """
    sizes = _sizes(config, trainable, lora)
    weight_bytes = settings.weights.itemsize
    keeps_master = settings.sharding in ("zero2", "zero3")  # DeepSpeed copies even weights that are float32
    optimizer_each = _optimizer_bytes(settings, keeps_master)
    shards = settings.devices
    split_weights = settings.sharding in ("zero3", "fsdp2")
    split_state = settings.sharding != "none"

    weights = sizes.total * weight_bytes // (shards if split_weights else 1)
    gradients = sizes.trainable * weight_bytes // (shards if split_state else 1)
    optimizer = int(sizes.trainable * optimizer_each) // (shards if split_state else 1)
    host = optimizer * settings.offload_optimizer + weights * settings.offload_parameters
    counted = count_activations(
        config,
        tokens=settings.tokens,
        patches=4 * settings.visual_tokens,
        dtype=settings.compute,
        attention=settings.attention,
        logit_bytes=settings.logit_bytes,
    )
    layers, blocks = config.text_config.num_hidden_layers, config.vision_config.depth
    vision_trains = trainable is None or bool({"vision"} & trainable)
    if settings.gradient_checkpointing:
        # One layer at a time is computed again, and then holds all that it needs.
        activations = layers * counted.layer_input + blocks * counted.block_input * vision_trains
        activations += max(counted.decoder_layer, counted.vision_block * vision_trains)
    else:
        activations = layers * counted.decoder_layer + blocks * counted.vision_block * vision_trains
        activations += _autocast_copies(sizes, settings)
    activations += counted.outside
    reference = sizes.total * weight_bytes * settings.reference
    device_parts = {
        "weights": (0 if settings.offload_parameters else weights) + reference,
        "gradients": gradients,
        "optimizer": 0 if settings.offload_optimizer else optimizer,
        "gathered": _gathered_bytes(sizes, settings),
        "activations": activations,
        "head": counted.head,
        "rollouts": _rollout_bytes(config, sizes, settings),
    }
    found = MemoryEstimate(parameters=sizes.total, trainable=sizes.trainable, host=host, reserve=0, **device_parts)
    return replace(found, reserve=int(_RESERVE_SHARE * found.device) + _RESERVE_BYTES)


def settings_of(recipe: Recipe, *, devices: int) -> MemorySettings:
    """Read from a recipe what decides its memory.

    Raises:
        RecipeError: it does not say how long a micro-batch is (`max_tokens_per_batch`, or `max_length`).
    """
    training = recipe.training
    tokens, rollouts = _rl_tokens(recipe) if recipe.stage == "rl" else (_sft_tokens(training), {})
    sharding, offload = _engine(training)
    bf16 = bool(training.get("bf16"))
    stored = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "auto": torch.bfloat16}
    weights = stored[recipe.model.dtype]
    if bf16 and sharding == "fsdp2":
        weights = torch.float32  # accelerate keeps the shards in float32 under mixed precision
    elif bf16 and sharding in ("zero2", "zero3"):
        weights = torch.bfloat16
    return MemorySettings(
        devices=devices,
        sharding=sharding,
        weights=weights,
        compute=torch.bfloat16 if bf16 else weights,
        tokens=tokens,
        visual_tokens=tokens // 2,
        gradient_checkpointing=bool(training.get("gradient_checkpointing")),
        optimizer=str(training.get("optim", "adamw_torch_fused")),
        attention="eager" if recipe.model.attn_implementation == "eager" else "fused",
        offload_optimizer="offload_optimizer" in offload,
        offload_parameters="offload_param" in offload,
        **rollouts,
    )


def _sft_tokens(training: Mapping[str, object]) -> int:
    tokens = training.get("max_tokens_per_batch")
    if tokens is not None:
        return int(_number(tokens))
    length = training.get("max_length")
    if length is None:
        raise RecipeError(
            "the estimate needs the size of a micro-batch: set training.max_tokens_per_batch, or "
            "training.max_length with training.per_device_train_batch_size."
        )
    return int(_number(length)) * int(_number(training.get("per_device_train_batch_size", 1)))


def _rl_tokens(recipe: Recipe) -> tuple[int, dict[str, Any]]:
    """Tokens of a micro-batch of the update, and what generating needs."""
    defaults = {field.name: field.default for field in fields(recipe.config_class())}
    value: dict[str, Any] = {**defaults, **recipe.training}
    tokens = int(value["micro_batch_tokens"])
    if value["max_prompt_tokens"] is not None:
        longest = int(value["max_prompt_tokens"]) + int(value["max_completion_tokens"])
        tokens = min(tokens, longest * int(value["per_device_train_batch_size"]))
    generates = value["engine"] == "hf"
    return tokens, {
        "rollout_tokens": int(value["rollout_batch_tokens"]) if generates else 0,
        "logit_bytes": CHUNK_BYTES,
        "reference": bool(value["kl_coef"] or value["log_kl"]) and recipe.lora is None,
    }


def recipe_config(recipe: Recipe) -> Qwen2_5_VLConfig:
    """Configuration of the recipe's model: its checkpoint's, or `model.shape`'s where there is no path yet.

    Raises:
        RecipeError: the path cannot be read, or holds another model, and no shape is given.
    """
    path, shape = recipe.model.path, recipe.model.shape
    takes_dense = recipe.stage == "rl"
    if path:
        try:
            config = AutoConfig.from_pretrained(path) if takes_dense else MetisHomeConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise RecipeError(f"model.path {path!r} cannot be read: {error}") from error
        if not isinstance(config, Qwen2_5_VLConfig):
            raise RecipeError(f"model.path {path!r} is a {config.model_type} model; the estimate knows Qwen2.5-VL.")
        return config
    if shape is None:
        raise RecipeError("the estimate needs a model: model.path=DIR, or its size, model.shape=7b (3b, 7b, 32b, 72b).")
    is_dense = takes_dense and recipe.training.get("thinking") is None
    return dense_shape(shape) if is_dense else two_branch_shape(shape)


def estimate_recipe(recipe: Recipe, *, devices: int) -> MemoryEstimate:
    """`estimate_memory` of a recipe on so many devices.

    Raises:
        RecipeError: see `settings_of` and `recipe_config`.
    """
    config = recipe_config(recipe)
    settings = settings_of(recipe, devices=devices)
    return estimate_memory(config, settings, trainable=_trained_sets(recipe, config), lora=recipe.lora)


def _trained_sets(recipe: Recipe, config: Qwen2_5_VLConfig) -> frozenset[str] | None:
    training: Mapping[str, Any] = recipe.training
    freeze, train_only = training.get("freeze"), training.get("train_only")
    if recipe.stage == "router":
        return None
    if recipe.stage == "sft":
        return trainable_sets(freeze, train_only)
    if isinstance(config, MetisHomeConfig):
        return sets_trained_by_reward(training.get("thinking"), freeze, train_only)
    return frozenset({"language"}) if training.get("freeze_vision", True) else None


@dataclass(frozen=True, slots=True)
class _Sizes:
    total: int
    trainable: int
    linear: int  # in matrices that autocast copies
    layer: int  # in the largest decoder layer


def _sizes(config: Qwen2_5_VLConfig, trainable: frozenset[str] | None, lora: LoraSection | None) -> _Sizes:
    has_branches = isinstance(config, MetisHomeConfig)
    set_name = set_of if has_branches else _dense_set_of
    with torch.device("meta"):
        model: Any = (MetisHomeForConditionalGeneration if has_branches else Qwen2_5_VLForConditionalGeneration)(config)
    parameters = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    if lora is None:
        trained = sum(p.numel() for name, p in parameters.items() if trainable is None or set_name(name) in trainable)
    else:
        adapters = _adapter_size(model, lora)
        router = sum(p.numel() for name, p in parameters.items() if set_of(name) == "router")
        total, trained = total + adapters, adapters + router
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    layer = sum(parameter.numel() for parameter in model.model.language_model.layers[0].parameters())
    return _Sizes(total, trained, linear, layer)


def _dense_set_of(parameter_name: str) -> str:
    return "vision" if ".visual." in f".{parameter_name}" else "language"


def _adapter_size(model: nn.Module, lora: LoraSection) -> int:
    branches = {"thinking": "1", "non_thinking": "0", "both": "[01]"}[lora.branch]
    target = re.compile(rf"\.mlp\.experts\.{branches}\.(gate|up|down)_proj$")
    return sum(
        lora.r * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and target.search(name)
    )


def _optimizer_bytes(settings: MemorySettings, keeps_master: bool) -> float:
    if settings.optimizer not in _OPTIMIZERS:
        raise RecipeError(
            f"the size of optimizer {settings.optimizer!r} is not known to the estimate. "
            f"Known: {', '.join(sorted(_OPTIMIZERS))}."
        )
    moments = _OPTIMIZERS[settings.optimizer]
    if moments is None:
        moments = 2.0 * (4 if keeps_master else settings.weights.itemsize)
    return moments + 4 * keeps_master


def _gathered_bytes(sizes: _Sizes, settings: MemorySettings) -> int:
    """Parameters that are whole on every rank while they are used, and their unreduced gradients."""
    if settings.sharding == "zero3":
        return min(sizes.total, max(_ZERO3_LIVE_PARAMETERS, 2 * sizes.layer)) * settings.compute.itemsize
    if settings.sharding == "fsdp2":
        return 3 * sizes.layer * settings.compute.itemsize  # this layer, the prefetched one, one layer's gradients
    return 0


def _rollout_bytes(config: Qwen2_5_VLConfig, sizes: _Sizes, settings: MemorySettings) -> int:
    """What generating takes: keys and values, and beside a rank's own shares all weights (`distributed/whole.py`)."""
    if not settings.rollout_tokens:
        return 0
    text = config.text_config
    head_size = text.hidden_size // text.num_attention_heads
    each = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * settings.compute.itemsize
    gathered_as = {"zero3": settings.weights, "fsdp2": settings.compute}.get(settings.sharding)
    whole = sizes.total * gathered_as.itemsize if gathered_as is not None else 0
    return settings.rollout_tokens * each + whole + _autocast_copies(sizes, settings)


def _autocast_copies(sizes: _Sizes, settings: MemorySettings) -> int:
    """Autocast keeps a cast copy of each matrix until the backward pass has used it."""
    if settings.sharding != "none" or settings.weights == settings.compute:
        return 0
    return sizes.linear * settings.compute.itemsize


def _engine(training: Mapping[str, object]) -> tuple[Sharding, frozenset[str]]:
    deepspeed = training.get("deepspeed")
    if deepspeed:
        settings = deepspeed if isinstance(deepspeed, dict) else json.loads(Path(str(deepspeed)).read_text())
        zero = settings.get("zero_optimization", {})
        stages: dict[int, Sharding] = {2: "zero2", 3: "zero3"}
        offload = frozenset(
            key
            for key in ("offload_optimizer", "offload_param")
            if zero.get(key, {}).get("device", "none") not in ("none", None)
        )
        if zero.get("stage") not in stages:
            raise RecipeError(f"the estimate knows ZeRO stages 2 and 3; found stage {zero.get('stage')!r}")
        return stages[zero["stage"]], offload
    return ("fsdp2" if training.get("fsdp") else "none"), frozenset()


def _number(value: object) -> float:
    return float(value)  # type: ignore[arg-type]

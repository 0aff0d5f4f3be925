"""How much memory a training run needs on each device, before it is started.

    weights     what the forward reads, whole or this rank's share
    gradients   in the type of the weights
    optimizer   moments, and float32 master weights where the engine keeps them
    gathered    layers that a sharded run has whole at the same time
    activations what the backward pass needs of one micro-batch (`activations.py` counts it)
    head        logits and their gradient, the largest single tensors of a large vocabulary

Not in it: the allocator's fragmentation, the CUDA context, communication buffers of NCCL; `reserve` (ours, 10 % and
1.5 GiB) stands for them. Tests compare weights, gradients, optimizer and activations with small real runs.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from metis_home.configuration import MetisHomeConfig
from metis_home.errors import RecipeError
from metis_home.modeling import MetisHomeForConditionalGeneration

from .activations import count_activations
from .freezing import set_of, trainable_sets
from .recipe import LoraSection, Recipe
from .shapes import two_branch_shape

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
    reserve: int
    host: int

    @property
    def device(self) -> int:
        """All parts on the device, in bytes."""
        parts = (self.weights, self.gradients, self.optimizer, self.gathered, self.activations, self.head, self.reserve)
        return sum(parts)


def estimate_memory(
    config: MetisHomeConfig,
    settings: MemorySettings,
    *,
    trainable: frozenset[str] | None = None,
    lora: LoraSection | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one training step.

    Args:
        config: the two-branch model's configuration; nothing of its weights is read.
        settings: engine, types and micro-batch.
        trainable: names of `freezing.FREEZE_SETS`; None: all.
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
    device_parts = {
        "weights": 0 if settings.offload_parameters else weights,
        "gradients": gradients,
        "optimizer": 0 if settings.offload_optimizer else optimizer,
        "gathered": _gathered_bytes(sizes, settings),
        "activations": activations,
        "head": counted.head,
    }
    reserve = int(_RESERVE_SHARE * sum(device_parts.values())) + _RESERVE_BYTES
    return MemoryEstimate(parameters=sizes.total, trainable=sizes.trainable, host=host, reserve=reserve, **device_parts)


def settings_of(recipe: Recipe, *, devices: int) -> MemorySettings:
    """Read from a recipe what decides its memory.

    Raises:
        RecipeError: it does not say how long a micro-batch is (`max_tokens_per_batch`, or `max_length`).
    """
    training = recipe.training
    tokens = training.get("max_tokens_per_batch")
    if tokens is None:
        length = training.get("max_length")
        if length is None:
            raise RecipeError(
                "the estimate needs the size of a micro-batch: set training.max_tokens_per_batch, or "
                "training.max_length with training.per_device_train_batch_size."
            )
        tokens = int(length) * int(_number(training.get("per_device_train_batch_size", 1)))  # type: ignore[call-overload]
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
        tokens=int(_number(tokens)),
        visual_tokens=int(_number(tokens)) // 2,
        gradient_checkpointing=bool(training.get("gradient_checkpointing")),
        optimizer=str(training.get("optim", "adamw_torch_fused")),
        attention="eager" if recipe.model.attn_implementation == "eager" else "fused",
        offload_optimizer="offload_optimizer" in offload,
        offload_parameters="offload_param" in offload,
    )


def recipe_config(recipe: Recipe) -> MetisHomeConfig:
    """Configuration of the recipe's model: its checkpoint's, or `model.shape`'s where there is no path yet.

    Raises:
        RecipeError: the path cannot be read, or holds another model, and no shape is given.
    """
    path, shape = recipe.model.path, recipe.model.shape
    if path:
        try:
            return MetisHomeConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise RecipeError(f"model.path {path!r} cannot be read: {error}") from error
    if shape is None:
        raise RecipeError("the estimate needs a model: model.path=DIR, or its size, model.shape=7b (3b, 7b, 32b, 72b).")
    return two_branch_shape(shape)


def estimate_recipe(recipe: Recipe, *, devices: int) -> MemoryEstimate:
    """`estimate_memory` of a recipe on so many devices.

    Raises:
        RecipeError: see `settings_of` and `recipe_config`; or a recipe of Stage-RL.
    """
    if recipe.stage == "rl":
        raise RecipeError(
            "the estimate counts a training step on given rows (stages sft and router); this recipe is of stage rl. What "
            "its rollouts hold (weights made whole, keys and values of rollout_batch_tokens tokens) is not counted."
        )
    sets = None
    if recipe.stage != "router":
        sets = trainable_sets(recipe.training.get("freeze"), recipe.training.get("train_only"))  # type: ignore[arg-type]
    return estimate_memory(
        recipe_config(recipe), settings_of(recipe, devices=devices), trainable=sets, lora=recipe.lora
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    total: int
    trainable: int
    linear: int  # in matrices that autocast copies
    layer: int  # in the largest decoder layer


def _sizes(config: MetisHomeConfig, trainable: frozenset[str] | None, lora: LoraSection | None) -> _Sizes:
    with torch.device("meta"):
        model = MetisHomeForConditionalGeneration(config)
    parameters = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    if lora is None:
        trained = sum(p.numel() for name, p in parameters.items() if trainable is None or set_of(name) in trainable)
    else:
        adapters = _adapter_size(model, lora)
        router = sum(p.numel() for name, p in parameters.items() if set_of(name) == "router")
        total, trained = total + adapters, adapters + router
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    layer = sum(parameter.numel() for parameter in model.model.language_model.layers[0].parameters())
    return _Sizes(total, trained, linear, layer)


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

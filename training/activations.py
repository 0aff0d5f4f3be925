"""Bytes that a forward pass keeps for its backward pass, counted, not guessed.

The layers of the real configuration are built on PyTorch's `meta` device (shapes without memory) and run once, while
hooks add up every tensor that autograd saves. So 72B is counted on a laptop in seconds, and what transformers changes in
a layer changes the count. Attention is counted as a fused kernel does it: it keeps queries, keys, values, its output and
one float32 per query and head, but no T x T matrix.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen2_5_VLConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLPatchMerger,
    Qwen2_5_VLTextModel,
    Qwen2_5_VLVisionBlock,
)

from metis_home.configuration import MetisHomeConfig
from metis_home.modeling import MetisHomeTextModel

_FUSED = "metis_home_counted"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBytes:
    """What one device keeps for the backward pass of one micro-batch, in bytes."""

    decoder_layer: int
    vision_block: int
    layer_input: int
    """All that gradient checkpointing keeps of a decoder layer."""
    block_input: int
    outside: int
    """What is kept once: angles, final norm, the merger of image features, the mask of their places."""
    head: int
    """Logits and loss: what is saved, and the float32 gradient of the logits on top."""


def count_activations(
    config: Qwen2_5_VLConfig,
    *,
    tokens: int,
    patches: int,
    dtype: torch.dtype,
    attention: str = "fused",
    logit_bytes: int | None = None,
) -> ActivationBytes:
    """Count what one layer of each kind saves.

    Args:
        config: of the two-branch model, or of a dense one.
        tokens: text and visual tokens of the micro-batch, padding included; half of them take each branch.
        patches: pixel patches of its images (4 for each visual token), 0 for none.
        dtype: what the layers compute in.
        attention: "fused" (sdpa, flash attention) or "eager", which keeps T x T weights.
        logit_bytes: most bytes of float32 logits that are held at once (the others are computed again); None: all.
    """
    chunk = tokens if logit_bytes is None else min(tokens, max(1, logit_bytes // (4 * config.text_config.vocab_size)))
    element = torch.empty((), dtype=dtype).element_size()
    text, vision = config.text_config, config.vision_config
    one, two = (_decoder_bytes(config, layers, tokens, dtype, attention) for layers in (1, 2))
    return ActivationBytes(
        decoder_layer=two - one,
        vision_block=_vision_bytes(config, patches, dtype, attention) if patches else 0,
        layer_input=tokens * text.hidden_size * element,
        block_input=patches * vision.hidden_size * element,
        outside=2 * one - two + (_merger_bytes(config, patches, dtype) + tokens * text.hidden_size if patches else 0),
        head=_head_bytes(config, chunk, dtype),
    )


def saved_bytes(run: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd saves while `run` runs, without those of `held` (the weights)."""
    weights = {tensor.untyped_storage()._cdata for tensor in held}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor  # held, or a freed storage's address would be counted as one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def _decoder_bytes(config: Qwen2_5_VLConfig, layers: int, tokens: int, dtype: torch.dtype, attention: str) -> int:
    text = deepcopy(config.text_config)
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = layers, 1, None
    text.layer_types = ["full_attention"] * layers
    _count_attention(text, attention)
    branches: dict[str, Tensor] = {}
    if isinstance(config, MetisHomeConfig):
        text.ffn_implementation = "torch"
        kind, branches = MetisHomeTextModel, {"branch_ids": torch.tensor([0, 1])}
    else:
        kind = Qwen2_5_VLTextModel
    model = _on_meta(lambda: kind(text), dtype).train()
    # Two rows, so that each branch has one: the costlier case, rows are picked and put back.
    rows = max(1, tokens // 2)
    embeds = torch.empty(2, rows, text.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    positions = torch.empty(3, 2, rows, device="meta", dtype=torch.long)
    return saved_bytes(
        lambda: model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **branches), _tensors(model)
    )


def _vision_bytes(config: Qwen2_5_VLConfig, patches: int, dtype: torch.dtype, attention: str) -> int:
    vision = deepcopy(config.vision_config)
    _count_attention(vision, attention)
    block = _on_meta(lambda: Qwen2_5_VLVisionBlock(vision), dtype).train()
    hidden = torch.empty(patches, vision.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    angles = torch.empty(patches, vision.hidden_size // vision.num_heads, device="meta")
    return saved_bytes(
        lambda: block(hidden, cu_seqlens=torch.tensor([0, patches]), position_embeddings=(angles, angles)),
        _tensors(block),
    )


def _merger_bytes(config: Qwen2_5_VLConfig, patches: int, dtype: torch.dtype) -> int:
    vision = config.vision_config
    merger = _on_meta(
        lambda: Qwen2_5_VLPatchMerger(vision.out_hidden_size, vision.hidden_size, vision.spatial_merge_size), dtype
    ).train()
    hidden = torch.empty(patches, vision.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    return saved_bytes(lambda: merger(hidden), _tensors(merger))


def _head_bytes(config: Qwen2_5_VLConfig, tokens: int, dtype: torch.dtype) -> int:
    text = config.text_config
    head = _on_meta(lambda: nn.Linear(text.hidden_size, text.vocab_size, bias=False), dtype)
    hidden = torch.empty(tokens, text.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    labels = torch.empty(tokens, device="meta", dtype=torch.long)
    saved = saved_bytes(lambda: nn.functional.cross_entropy(head(hidden).float(), labels), _tensors(head))
    return saved + tokens * text.vocab_size * 4


def _on_meta(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return build().to(dtype)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class _FusedAttention(torch.autograd.Function):
    """Saves what a fused kernel saves and computes nothing (meta tensors have no values)."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        logsumexp = torch.empty(query.shape[:-1], device=query.device, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused_attention(module, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _count_attention(config: object, attention: str) -> None:
    """Let the layers of this configuration call `_fused_attention`, unless eager attention is what is counted."""
    AttentionInterface.register(_FUSED, _fused_attention)
    AttentionMaskInterface.register(_FUSED, lambda *args, **kwargs: None)
    config._attn_implementation = "eager" if attention == "eager" else _FUSED  # type: ignore[attr-defined]

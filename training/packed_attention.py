"""Attention of packed rows, segment by segment, where flash attention's variable-length kernels are not there.

    sdpa with a mask      work and memory T^2, T = tokens of all segments
    here                  the sum of T_s^2 over the segments s, no mask at all

It is scaled-dot-product attention all the same, called once per segment, causal. Padded batches keep plain sdpa: which of
the two a forward uses is written into the config before it, so that checkpointed layers, which run again in the backward
pass right after, see the same.

Shapes: H heads, T tokens, D size of a head.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "metis_home_packed_sdpa"
_BOUNDS = "cu_seq_lens_q"


def use_packed_attention(model: nn.Module, batch: Mapping[str, object]) -> None:
    """Let the text decoder of `model` attend by segments if `batch` is packed, else as it did before.

    Does nothing for models whose attention is not sdpa: flash attention reads the segments' bounds itself.
    """
    config = cast(Any, model).config.text_config
    if config._attn_implementation not in ("sdpa", PACKED):
        return
    wanted = PACKED if batch.get(_BOUNDS) is not None else "sdpa"
    if config._attn_implementation != wanted:
        config._attn_implementation = wanted


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend within each segment of one packed row.

    Args:
        query, key, value: (1, H, T, D), key and value with fewer heads where heads are grouped.
        cu_seq_lens_q: (S + 1,), where the segments begin and end.
        **kwargs: dropout, scaling, ... as transformers passes them.
    Returns:
        (1, T, H, D), and None in place of the weights.
    """
    assert cu_seq_lens_q is not None  # `use_packed_attention` chose this function because they are there
    bounds = cu_seq_lens_q.tolist()
    lengths = [end - begin for begin, end in pairwise(bounds)]
    parts = [tensor.split(lengths, dim=2) for tensor in (query, key, value)]
    outputs = [sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(PACKED, packed_attention)
# No mask is built at all: segments do not see each other because they are computed apart.
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)

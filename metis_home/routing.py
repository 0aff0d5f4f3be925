"""What the router may read of a batch, and what a labelled batch makes of its decision.

Shapes: B batch, T tokens.
"""

import torch
from torch import Tensor

from .branch import Branch
from .errors import BranchError
from .router import IGNORE, RouterDecision

# Forward arguments that come with several sequences in one row: packed training rows, paged key-value caches.
_PACKED_ARGUMENTS = {"cu_seq_lens_q", "cu_seqlens_q", "read_index", "write_index", "block_table"}


def routable_mask(
    batch: int, tokens: int, attention_mask: Tensor | dict | None, position_ids: Tensor | None, kwargs: dict
) -> Tensor | None:
    """Return the padding mask, (B, T), under which each row is one query; None means that there is no padding.

    Raises:
        BranchError: rows cannot be told apart: packed or paged rows, or a mask that is not (B, T).
    """
    packed_arguments = {"cu_seq_lens_q", "cu_seqlens_q", "read_index", "write_index", "block_table"} & kwargs.keys()
    if packed_arguments:
        raise BranchError(
            f"several sequences share a row ({', '.join(sorted(packed_arguments))}): the router sees no single query. "
            "Pass branch_ids: an int, or (B, T) with the branch of each token."
        )
    if attention_mask is None:
        # Text positions that start again within a row: packed (transformers reads packing from these as well).
        if position_ids is not None and position_ids.dim() == 3 and position_ids.shape[0] == 4:
            if bool((position_ids[0].diff(dim=-1) < 0).any()):
                raise BranchError(
                    "position_ids start again within a row (packed sequences): the router sees no single query. "
                    "Pass branch_ids of shape (B, T), the branch of each token."
                )
        return None
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != (batch, tokens):
        found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise BranchError(
            f"to route, attention_mask must have shape {(batch, tokens)} (the padding of this batch); found {found}. "
            "Pass such a mask, or branch_ids."
        )
    return attention_mask


def teacher_forced(decision: RouterDecision, router_labels: Tensor | None) -> Tensor:
    """The labelled branch where there is a label, else the router's own, (B,)."""
    if router_labels is None:
        return decision.branch_ids
    return torch.where(router_labels == IGNORE, decision.branch_ids, router_labels)


def check_router_labels(router_labels: Tensor, batch: int) -> None:
    """Raise unless `router_labels` is an integer tensor of shape (B,).

    Raises:
        BranchError: it is not, or (where that needs no device synchronisation) holds other values than 0, 1 and -100.
    """
    if not isinstance(router_labels, Tensor) or router_labels.is_floating_point() or router_labels.dtype == torch.bool:
        found = router_labels.dtype if isinstance(router_labels, Tensor) else type(router_labels).__name__
        raise BranchError(f"router_labels must be an integer tensor of shape ({batch},); found {found}")
    if tuple(router_labels.shape) != (batch,):
        raise BranchError(
            f"router_labels must have shape ({batch},), one label per query; found {tuple(router_labels.shape)}"
        )
    if router_labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = set(router_labels.tolist()) - {*(int(branch) for branch in Branch), IGNORE}
        if wrong:
            raise BranchError(f"router_labels must be 0, 1 or {IGNORE} (ignore); found {sorted(wrong)}")


def total_loss(lm_loss: Tensor | None, router_loss: Tensor, router_loss_weight: float) -> Tensor:
    """L_prediction + router_loss_weight * L_router; the latter alone where there are no labels to predict."""
    weighted = router_loss_weight * router_loss
    return weighted if lm_loss is None else lm_loss + weighted.to(lm_loss.device)

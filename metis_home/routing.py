"""What the router may read of a batch, and what a labelled batch makes of its decision.

Shapes: B batch, T tokens, S queries: B of them where each row is one, any number where rows are packed.
"""

import torch
from torch import Tensor

from . import ops
from .branch import Branch
from .errors import BranchError
from .router import IGNORE, MetisHomeRouter, RouterDecision

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
    """The labelled branch where there is a label, else the router's own, (S,)."""
    if router_labels is None:
        return decision.branch_ids
    return torch.where(router_labels == IGNORE, decision.branch_ids, router_labels)


def prompt_mask(labels: Tensor, mask_BT: Tensor | None, query_ids: Tensor | None) -> Tensor:
    """True at the prompt of each query: its tokens before the first that is supervised, (B, T).

    Not simply where `labels` is -100: tool observations inside an answer are that too, and would tell the router how
    the answer went.

    Args:
        labels: (B, T), -100 where nothing is supervised.
        mask_BT: true at tokens, false at padding; None: no padding.
        query_ids: the query of each token of packed rows, as in `check_query_ids`; None: each row is one query.
    """
    is_supervised = labels != IGNORE
    seen = is_supervised.cumsum(-1)
    if query_ids is not None:
        query_ids = query_ids.to(labels.device)
        before = torch.where(segment_starts(query_ids), seen - is_supervised.long(), 0)
        seen = seen - before.cummax(-1).values  # since the segment began
        mask_BT = query_ids >= 0
    prompt = seen == 0
    return prompt if mask_BT is None else prompt & mask_BT.to(device=prompt.device, dtype=torch.bool)


def segment_starts(query_ids: Tensor) -> Tensor:
    """True at the first token of each segment of packed rows, (B, T)."""
    starts = torch.ones_like(query_ids, dtype=torch.bool)
    starts[:, 1:] = query_ids[:, 1:] != query_ids[:, :-1]
    return starts


def without_first_tokens(labels: Tensor, query_ids: Tensor) -> Tensor:
    """Labels of packed rows, -100 at the first token of each segment: the token before it is another segment's."""
    return labels.masked_fill(segment_starts(query_ids.to(labels.device)), IGNORE)


def ask_router(
    router: MetisHomeRouter,
    x_BTD: Tensor,
    mask_BT: Tensor | None,
    query_ids: Tensor | None,
    router_labels: Tensor | None,
    backend: ops.Backend,
) -> RouterDecision:
    """Let the router decide on each query, at threshold 0.5.

    Of packed rows, only the tokens that the router may read are gathered: neither the text nor the length of an answer,
    nor how the rows are packed, can reach the pooling.

    Args:
        x_BTD: what enters layer 0. mask_BT: true where the router may read; None: at all tokens.
        query_ids: the query of each token of packed rows, (B, T); None: each row is one query.
        router_labels: (S,), says how many queries there are; None: their ids say it (which waits for the device).
    """
    if query_ids is None:
        return ops.route_queries(x_BTD, mask_BT, router, backend=backend)
    query_ids = query_ids.to(x_BTD.device)
    mask_BT = query_ids >= 0 if mask_BT is None else mask_BT
    queries = int(query_ids.max()) + 1 if router_labels is None else router_labels.shape[0]
    x_1ND, query_ids_N = x_BTD[mask_BT][None], query_ids[mask_BT]
    mask_SN = query_ids_N == torch.arange(queries, device=query_ids.device)[:, None]
    return ops.route_queries(x_1ND, mask_SN, router, backend=backend)


def branch_per_token(branch_ids_S: Tensor, query_ids: Tensor) -> Tensor:
    """Give each token the branch of its query, (B, T); padding goes to branch 0."""
    query_ids = query_ids.to(branch_ids_S.device)
    return torch.where(query_ids < 0, 0, branch_ids_S[query_ids.clamp(min=0)])


def check_query_ids(
    query_ids: Tensor,
    batch: int,
    tokens: int,
    router_labels: Tensor | None,
    attention_mask: Tensor | dict | None,
    position_ids: Tensor | None,
) -> None:
    """Raise unless these are packed rows, each query in one piece and by itself.

    Args:
        query_ids: (B, T) integers: the query of each token, -1 at padding. Queries are numbered 0 to S - 1 over the
            whole batch; the tokens of one stand together in one row.
        position_ids: (4, B, T), of which the first are text positions that start at 0 in each segment.
    Raises:
        BranchError: something does not fit; values are looked at where that needs no device synchronisation.
    """
    if not isinstance(query_ids, Tensor) or query_ids.is_floating_point() or query_ids.dtype == torch.bool:
        found = query_ids.dtype if isinstance(query_ids, Tensor) else type(query_ids).__name__
        raise BranchError(f"query_ids must be an integer tensor of shape {(batch, tokens)}; found {found}")
    if tuple(query_ids.shape) != (batch, tokens):
        raise BranchError(f"query_ids must have shape {(batch, tokens)}; found {tuple(query_ids.shape)}")
    if attention_mask is not None:
        raise BranchError(
            "query_ids came with an attention_mask, under which the queries of a row would see each other. Leave the "
            "mask out: position_ids that start again keep them apart, and padding has query_ids of -1."
        )
    if not isinstance(position_ids, Tensor) or tuple(position_ids.shape) != (4, batch, tokens):
        shape = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else position_ids
        raise BranchError(
            f"query_ids need position_ids of shape {(4, batch, tokens)}: text positions that start again at each "
            f"query, then its M-RoPE positions; found {shape}. PackingCollator makes them."
        )
    if query_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    starts = segment_starts(query_ids)
    begun = query_ids[starts & (query_ids >= 0)].sort().values
    expected = len(begun) if router_labels is None else router_labels.shape[0]
    if begun.tolist() != list(range(expected)) or int(query_ids.min()) < -1 or not expected:
        raise BranchError(
            f"query_ids must number {expected} queries from 0, each in one piece, and be -1 at padding; found pieces "
            f"of the queries {begun.tolist()}"
        )
    steps = position_ids[0].to("cpu").diff(dim=-1, prepend=torch.zeros(batch, 1, dtype=torch.long))
    is_query = query_ids >= 0
    continues = (steps == 1) | starts | ~is_query
    if not bool(continues.all()) or bool(position_ids[0].to("cpu")[starts & is_query].any()):
        raise BranchError(
            "position_ids[0] must count 0, 1, 2, ... within each query of query_ids: it is where attention learns which "
            "tokens belong together"
        )


def check_router_labels(router_labels: Tensor, batch: int | None) -> None:
    """Raise unless `router_labels` is an integer tensor of shape (B,); of any length with `batch=None` (packed rows).

    Raises:
        BranchError: it is not, or (where that needs no device synchronisation) holds other values than 0, 1 and -100.
    """
    if not isinstance(router_labels, Tensor) or router_labels.is_floating_point() or router_labels.dtype == torch.bool:
        found = router_labels.dtype if isinstance(router_labels, Tensor) else type(router_labels).__name__
        wanted = "(S,)" if batch is None else f"({batch},)"
        raise BranchError(f"router_labels must be an integer tensor of shape {wanted}; found {found}")
    if router_labels.dim() != 1 or (batch is not None and router_labels.shape[0] != batch):
        batch = "S" if batch is None else batch  # type: ignore[assignment]
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

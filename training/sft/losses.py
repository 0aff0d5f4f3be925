"""The two losses of Stage-SFT as sums, and what they are divided by.

    L = (sum of token losses) / N_tokens  +  router_loss_weight * (sum of query losses) / N_queries

Both denominators count the whole optimizer step: all micro-batches of the accumulation, all ranks. So the gradient does
not depend on how rows are split into micro-batches or over ranks. Dividing each micro-batch by its own count, and
averaging, would weigh a token in a short micro-batch more than one in a long micro-batch.

Shapes: B batch, T tokens, V vocabulary, S supervised tokens of the batch, Q queries (B, or the segments of packed rows),
E branches (2).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...router import IGNORE
from .replacing import replaced


def supervised_targets(labels_BT: Tensor) -> Tensor:
    """True where the token at t is to be predicted from those before it, (B, T): labelled, and not the first of a row."""
    targets_BT = labels_BT != IGNORE
    targets_BT[:, 0] = False
    return targets_BT


def token_losses(logits: Tensor, labels: Tensor, vocab_size: int, **ignored: object) -> Tensor:
    """Cross entropy of each supervised token, in the order of the flattened batch.

    Stands in for `model.loss_function` (see `losses_per_token`), so that one pass gives the loss of each branch.

    Args:
        logits: (B, T, V), any float dtype.
        labels: (B, T) int64, -100 where nothing is to be predicted.
    Returns:
        (S,) float32, nats.
    """
    targets_BT = supervised_targets(labels.to(logits.device))
    # Only supervised positions are upcast: with images and long prompts they are a small part of the batch.
    logits_SV = logits[:, :-1][targets_BT[:, 1:]].float()
    labels_S = labels.to(logits.device)[targets_BT]
    return F.cross_entropy(logits_SV, labels_S, reduction="none")


@contextmanager
def losses_per_token(model: nn.Module) -> Iterator[None]:
    """Within it, `model(labels=...)` returns `lm_loss` as one number per supervised token instead of their mean."""
    with replaced(model, "_loss_function", token_losses):  # what the setter of `loss_function` sets
        yield


def query_losses(router_logits_QE: Tensor, router_labels_Q: Tensor) -> Tensor:
    """Cross entropy of each query's routing, (Q,) float32, nats; 0 (with a gradient of 0) where it has no label.

    Source: Metis-HOME, L_router.
    """
    return F.cross_entropy(router_logits_QE.float(), router_labels_Q, ignore_index=IGNORE, reduction="none")


def count_targets(batches: Iterable[Mapping[str, Tensor]], device: torch.device | str) -> Tensor:
    """Return (2,) int64 on `device`: supervised tokens, and queries with a router label, of all these batches."""
    total = torch.zeros(2, dtype=torch.int64, device=device)
    for batch in batches:
        total[0] += supervised_targets(batch["labels"]).sum().to(device)
        if batch.get("router_labels") is not None:
            total[1] += (batch["router_labels"] != IGNORE).sum().to(device)
    return total


def step_loss(lm_losses_S: Tensor, router_losses_Q: Tensor | None, counts: Tensor, router_loss_weight: float) -> Tensor:
    """This micro-batch's share of the step's loss; the shares of all micro-batches and ranks add up to L.

    Args:
        counts: (2,), `count_targets` of the whole step. A count of 0 leaves its part out: 0, with a gradient of 0.
    """
    tokens, queries = counts.clamp(min=1).unbind()
    loss = lm_losses_S.sum() / tokens
    if router_losses_Q is not None:
        loss = loss + router_loss_weight * (router_losses_Q.sum() / queries).to(loss.device)
    return loss

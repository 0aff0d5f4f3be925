"""How the rollouts of a prompt are divided between the branches of a two-branch model.

Shapes: P prompts, E = 2 branches, G rollouts per prompt.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metis_home.branch import Branch
from metis_home.router import decide


@dataclass(frozen=True, slots=True)
class Share:
    """Rollouts of one prompt by one branch."""

    place: int
    """Of the prompt among those that were routed."""
    count: int
    logprob: float
    """log P(branch) where the branch was drawn, else 0; nats."""


def divide(
    logits_PE: Tensor,
    num_generations: int,
    wanted: Literal["router", "sample"],
    *,
    threshold: float,
    generator: torch.Generator,
) -> dict[Branch, list[Share]]:
    """Divide the G rollouts of each prompt: all to the router's choice ("router"), or drawn from it ("sample")."""
    logp_PE = logits_PE.float().log_softmax(-1).cpu()
    if wanted == "sample":
        draws_PG = torch.multinomial(logits_PE.float().softmax(-1), num_generations, True, generator=generator)
        thinking_P = draws_PG.sum(1).cpu()  # Branch.THINKING is 1
    else:
        thinking_P = decide(logits_PE, threshold).branch_ids.cpu() * num_generations
    shares: dict[Branch, list[Share]] = {}
    for branch in Branch:
        count_P = thinking_P if branch is Branch.THINKING else num_generations - thinking_P
        shares[branch] = [
            Share(place, int(count), float(logp_PE[place, branch]) if wanted == "sample" else 0.0)
            for place, count in enumerate(count_P.tolist())
            if count
        ]
    return shares

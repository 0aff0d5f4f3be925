"""Log-probabilities of chosen tokens, without ever holding the logits of a whole batch.

The head is replaced for the duration of one forward by a function that projects only the positions that are scored, a
few at a time, and returns two numbers for each. It runs inside the model's own forward, so wrappers (DDP, FSDP, ZeRO,
adapters on the head) see the calls they expect. Works with every model that has `lm_head`: stock Qwen2.5-VL and
Qwen3-VL, and the two-branch model.

Shapes: B rows, T tokens, N scored tokens, V vocabulary, D hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metis_home.errors import TrainingError

CHUNK_BYTES = 256 * 2**20  # of float32 logits held at once; ours


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What the policy says about each token of a batch."""

    logp_BT: Tensor
    """log p(token t | tokens before t), float32, nats; 0 where the mask is 0."""
    entropy_BT: Tensor
    """Entropy of that distribution, float32, nats, without gradient; 0 where the mask is 0."""
    router_logits: Tensor | None = None
    """(B, 2) float32 of the router on the prompts, where it was asked."""


def score_tokens(
    model: nn.Module,
    inputs: Mapping[str, object],
    mask_BT: Tensor,
    *,
    temperature: float = 1.0,
    suppress_token_ids: Sequence[int] = (),
    with_router: bool = False,
    with_entropy: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenScores:
    """Run one forward and score the tokens where the mask is 1.

    Args:
        model: the model, wrapped or not.
        inputs: its forward arguments; `input_ids` (B, T). With `with_router`, also `labels`: -100 at prompt tokens and
            nowhere else, padding included.
        mask_BT: 1 at tokens to score. Column 0 is never scored: nothing comes before it.
        temperature: logits are divided by it before the softmax (the sampler's; 0 counts as 1).
        suppress_token_ids: left out of the distribution, as the sampler does.
        with_router: also return the router's logits, with their gradient (two-branch models).
        chunk_bytes: most bytes of float32 logits at once; with more tokens than that, chunks are recomputed in the
            backward.
    Returns:
        Scores; gradients flow into `logp_BT` (and `router_logits`) if they are enabled.
    Raises:
        TrainingError: the model has no `lm_head`.
    """
    input_ids = cast(Tensor, inputs["input_ids"])
    scored_BT = mask_BT.bool().clone()
    scored_BT[:, 0] = False
    places_N = scored_BT.reshape(-1).nonzero(as_tuple=True)[0]
    targets_N = input_ids.reshape(-1)[places_N]
    scorer = _Scorer(places_N - 1, targets_N, temperature or 1.0, suppress_token_ids, with_entropy, chunk_bytes)
    with _scoring_head(model, scorer, with_router):
        if with_router:
            router_labels = torch.full(input_ids.shape[:1], -100, device=input_ids.device)
            outputs = model(**inputs, router_labels=router_labels, use_cache=False)
        else:
            outputs = model(**inputs, use_cache=False)
    scores_N2 = outputs.logits.float()
    flat = scores_N2.new_zeros(scored_BT.numel())
    return TokenScores(
        logp_BT=flat.index_put((places_N,), scores_N2[:, 0]).view(scored_BT.shape),
        entropy_BT=flat.index_put((places_N,), scores_N2[:, 1].detach()).view(scored_BT.shape),
        router_logits=outputs.router_logits if with_router else None,
    )


def log_softmax_scores(
    logits_NV: Tensor, targets_N: Tensor, temperature: float, suppress: Tensor | None, with_entropy: bool = True
) -> Tensor:
    """Log-probability of each target and entropy of its distribution, (N, 2) float32; the entropy has no gradient."""
    logits_NV = logits_NV.float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    if suppress is not None:
        # A finite floor: 0 * -inf in the entropy would be NaN.
        logits_NV = logits_NV.index_fill(1, suppress, torch.finfo(torch.float32).min)
    logp_NV = logits_NV.log_softmax(-1)
    logp_N = logp_NV.gather(1, targets_N[:, None])[:, 0]
    if not with_entropy:
        return torch.stack((logp_N, torch.zeros_like(logp_N)), -1)
    with torch.no_grad():
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    return torch.stack((logp_N, entropy_N), -1)


class _Scorer:
    """Hidden states of a batch to scores of the chosen places."""

    def __init__(
        self,
        before_N: Tensor,
        targets_N: Tensor,
        temperature: float,
        suppress_token_ids: Sequence[int],
        with_entropy: bool,
        chunk_bytes: int,
    ) -> None:
        self.before_N = before_N
        self.targets_N = targets_N
        self.temperature = temperature
        self.suppress = torch.tensor(list(suppress_token_ids), device=targets_N.device) if suppress_token_ids else None
        self.with_entropy = with_entropy
        self.chunk_bytes = chunk_bytes

    def __call__(self, project: nn.Module, vocabulary: int, hidden_BTD: Tensor) -> Tensor:
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[self.before_N]
        size = max(1, self.chunk_bytes // (4 * vocabulary))
        if len(self.targets_N) <= size:
            return self._score(project, hidden_ND, self.targets_N)
        chunks = zip(hidden_ND.split(size), self.targets_N.split(size), strict=True)
        recompute = torch.is_grad_enabled()
        return torch.cat(
            [
                checkpoint(self._score, project, hidden_CD, targets_C, use_reentrant=False)
                if recompute
                else self._score(project, hidden_CD, targets_C)
                for hidden_CD, targets_C in chunks
            ]
        )

    def _score(self, project, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return log_softmax_scores(
            project(hidden_CD), targets_C, self.temperature, self.suppress, with_entropy=self.with_entropy
        )


@contextmanager
def _scoring_head(model: nn.Module, scorer: _Scorer, with_router: bool) -> Iterator[None]:
    """Within it, the model's head returns scores, and labels (which mark the prompt for the router) cost no loss."""
    heads = [(name, module) for name, module in model.named_modules() if name.split(".")[-1] == "lm_head"]
    if len(heads) != 1:
        raise TrainingError(
            f"expected a model with one `lm_head`; found {[name for name, _ in heads] or 'none'} in "
            f"{type(model).__name__}. Stage-RL trains Qwen2.5-VL, Qwen3-VL and the two-branch model."
        )
    name, head = heads[0]
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    project, shadowed = head.forward, head.__dict__.get("forward")
    vocabulary = int(owner.config.get_text_config().vocab_size)
    head.forward = lambda hidden_BTD: scorer(project, vocabulary, hidden_BTD)
    loss_function = owner.__dict__.get("_loss_function")
    if with_router:
        owner.loss_function = lambda **kwargs: None
    try:
        yield
    finally:
        if shadowed is None:
            del head.forward
        else:
            head.forward = shadowed
        if with_router:
            if loss_function is None:
                owner.__dict__.pop("_loss_function", None)
            else:
                owner.loss_function = loss_function

"""The loss of one micro-batch, and the forwards without gradient that some settings need before it.

Shapes: B rows, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..logprobs import TokenScores, score_tokens
from ..policy_losses import Clipping, PolicyLoss, Surrogate, importance_weights, policy_loss
from ..rollouts.positions import RopeIndex, rope_index_of
from ..vision_presence import VisionPresence
from .batches import RolloutBatch, collate_rollouts, shared_images
from .config import MetisRLConfig
from .planning import decision_advantage
from .samples import MicroBatch, Sample, StepPlan


@dataclass(slots=True)
class Updater:
    """Computes micro-batch losses for one model and one configuration.

    `base` is the unwrapped model, whose methods and configuration are asked; forwards go through what the caller
    passes, which may be a wrapper.
    """

    base: nn.Module
    config: MetisRLConfig
    suppress_token_ids: Sequence[int]
    trains_router: bool
    device: torch.device
    rope_index: RopeIndex
    presence: VisionPresence
    clipping: Clipping
    corrects_sampler: bool = False
    """Weigh tokens by p_trainer / p_sampler."""
    compares_reference: bool = False
    """Samples have `ref_logprobs`."""

    @classmethod
    def of(
        cls,
        base: nn.Module,
        config: MetisRLConfig,
        suppress: Sequence[int],
        *,
        trains_router: bool,
        device: torch.device,
    ) -> "Updater":
        """For an unwrapped model."""
        return cls(
            base=base,
            config=config,
            suppress_token_ids=tuple(suppress),
            trains_router=trains_router,
            device=device,
            rope_index=rope_index_of(base),
            presence=VisionPresence(base),
            clipping=Clipping(low=config.clip_low, high=config.clip_high, dual=config.dual_clip),
        )

    def loss(self, model: nn.Module, samples: Sequence[Sample], micro_batch: MicroBatch) -> PolicyLoss:
        """The loss of one micro-batch, with its gradient; to be added up over micro-batches and ranks."""
        chosen = [samples[row.sample] for row in micro_batch]
        batch = self._collate(chosen)
        scores = self._score(model, batch, with_router=self.trains_router)
        now_BT = scores.logp_BT.detach()
        old_BT = _or_now([sample.old_logprobs for sample in chosen], now_BT, batch)
        sampler_BT = batch.to_columns([sample.rollout.logprobs for sample in chosen])
        importance_BT = None
        if self.corrects_sampler:
            importance_BT = importance_weights(old_BT, sampler_BT, cap=self.config.importance_cap)
        has_ref = self.compares_reference
        mask_BT = batch.mask_BT * self._tensor([not row.is_padding for row in micro_batch])[:, None]
        result = policy_loss(
            scores.logp_BT,
            old_BT,
            mask_BT,
            self._surrogates(chosen, micro_batch),
            self.clipping,
            importance_BT=importance_BT,
            ref_logp_BT=_or_now([sample.ref_logprobs for sample in chosen], now_BT, batch) if has_ref else None,
            kl_weight_B=self._tensor([row.kl_weight for row in micro_batch]) if has_ref else None,
            nll_weight_B=self._tensor([row.nll_weight for row in micro_batch]) if self.config.nll_coef else None,
            entropy_BT=scores.entropy_BT,
        )
        gap_BT = (old_BT - sampler_BT).abs() * mask_BT
        result.sums.update(sampler_gap=gap_BT.sum(), sampler_gap_max=gap_BT.max())
        if self.trains_router and scores.router_logits is not None:
            return self._with_router(result, scores.router_logits, chosen, micro_batch)
        return result

    def score_samples(
        self, model: nn.Module, samples: Sequence[Sample], steps: Sequence[StepPlan]
    ) -> dict[int, list[float]]:
        """Log-probabilities of the completions of all samples that these steps use, without gradient.

        Every rank runs as many forwards: the micro-batches are those of the steps.

        Returns:
            {sample number: one number per completion token}.
        """
        found: dict[int, list[float]] = {}
        with torch.no_grad(), _evaluating(model):  # the sampler has no dropout
            for micro_batch in [batch for step in steps for batch in step.micro_batches]:
                chosen = [samples[row.sample] for row in micro_batch]
                batch = self._collate(chosen)
                logp_BT = self._score(model, batch, with_entropy=False).logp_BT.float().cpu()
                for row, (start, sample) in enumerate(zip(batch.starts, chosen, strict=True)):
                    found[micro_batch[row].sample] = logp_BT[row, start : len(sample.rollout)].tolist()
        return found

    def is_float32(self) -> bool:
        """Are forwards computed in float32 throughout?"""
        is_mixed = self.config.bf16 or self.config.fp16
        return not is_mixed and all(parameter.dtype == torch.float32 for parameter in self.base.parameters())

    def _collate(self, samples: Sequence[Sample]) -> RolloutBatch:
        return collate_rollouts(
            [sample.rollout for sample in samples],
            self.rope_index,
            self.device,
            with_tokens=[sample.tokens > 0 for sample in samples],
        )

    def _score(
        self, model: nn.Module, batch: RolloutBatch, *, with_router: bool = False, with_entropy: bool = True
    ) -> TokenScores:
        inputs: dict[str, object] = dict(batch.inputs)
        if with_router:
            inputs["labels"] = batch.labels
        images = shared_images(model, batch.image_order) if batch.image_order else nullcontext()
        with images, self.presence.ensured(batch.inputs):
            return score_tokens(
                model,
                inputs,
                batch.mask_BT,
                temperature=self.config.temperature,
                suppress_token_ids=self.suppress_token_ids,
                with_router=with_router,
                with_entropy=with_entropy,
            )

    def _surrogates(self, samples: Sequence[Sample], micro_batch: MicroBatch) -> list[Surrogate]:
        surrogates = [
            Surrogate(
                advantage_B=self._tensor([sample.advantage for sample in samples]),
                weight_B=self._tensor([row.weight for row in micro_batch]),
            )
        ]
        if self.config.advantage == "hdpo":
            surrogates.append(
                Surrogate(
                    advantage_B=self._tensor([sample.tool_advantage for sample in samples]),
                    weight_B=self._tensor([row.tool_weight for row in micro_batch]),
                )
            )
        return surrogates

    def _with_router(
        self, result: PolicyLoss, router_logits: Tensor, samples: Sequence[Sample], micro_batch: MicroBatch
    ) -> PolicyLoss:
        """The router's decision as one more action, with the advantage of what came of it."""
        branch_B1 = torch.tensor([[sample.rollout.branch or 0] for sample in samples], device=router_logits.device)
        logp_BE = router_logits.float().log_softmax(-1)
        logp_B1 = logp_BE.gather(1, branch_B1)
        has_old_B1 = torch.tensor([[sample.old_logprobs is not None] for sample in samples], device=self.device)
        drawn_B1 = self._tensor([sample.rollout.branch_logprob for sample in samples])[:, None]
        old_B1 = torch.where(has_old_B1, drawn_B1, logp_B1.detach())
        advantages = [decision_advantage(sample, self.config) for sample in samples]
        weight_B = self._tensor([row.router_weight for row in micro_batch])
        decision = policy_loss(
            logp_B1,
            old_B1,
            (weight_B > 0).float()[:, None],
            [Surrogate(advantage_B=self._tensor(advantages), weight_B=weight_B)],
            self.clipping,
            entropy_BT=-(logp_BE.exp() * logp_BE).sum(-1, keepdim=True).detach(),
        )
        sums = {f"router_{name}": value for name, value in decision.sums.items() if name in _ROUTER_SUMS}
        return PolicyLoss(loss=result.loss + decision.loss, sums=result.sums | sums)

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)


def _or_now(known: Sequence[list[float] | None], now_BT: Tensor, batch: RolloutBatch) -> Tensor:
    """Known log-probabilities; rows that have none take those of the moment (ratio 1)."""
    is_known_B1 = torch.tensor([[values is not None] for values in known], device=now_BT.device)
    return torch.where(is_known_B1, batch.to_columns([values or [] for values in known]), now_BT)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


_ROUTER_SUMS = ("tokens", "entropy", "clip_low", "clip_high")


def sum_names(updater: Updater) -> list[str]:
    """The metric sums that `Updater.loss` returns; the same on every rank."""
    names = ["tokens", "ratio", "ratio_max", "clip_low", "clip_high", "kl_old", "entropy"]
    names += ["sampler_gap", "sampler_gap_max"]
    names += ["kl_ref"] if updater.compares_reference else []
    names += ["importance"] if updater.corrects_sampler else []
    return names + ([f"router_{name}" for name in _ROUTER_SUMS] if updater.trains_router else [])

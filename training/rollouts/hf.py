"""`HFEngine`: rollouts by the model that is trained, on its own device.

What `transformers.generate` would do once per rollout is done once per prompt here: vision tower and prefill run on the
P prompts, and the filled cache is then copied for the G rollouts. Rows that have ended leave the batch, so the last
long answer does not drag the others along; log-probabilities are taken while sampling, so no logits are kept.

Shapes: P prompts of a batch, R rows (rollouts that still go on), T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from metis_home import ops
from metis_home.branch import Branch
from metis_home.errors import EngineError

from ..data.batching import batches_by_length
from .decoding import Stop, decode, left_padded
from .positions import fill_positions, rope_index_of
from .routing import divide
from .types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HFEngine:
    """Samples from a Qwen2.5-VL, a Qwen3-VL or the two-branch model of this package.

    Args:
        model: unwrapped; used as it stands, in evaluation mode and without gradients.
        tokenizer: to give each rollout its text.
        max_tokens: most tokens of a decoding batch: rows times (longest prompt and answer). Bounds the cache.
        seed: of the engine's own random numbers, which nothing else draws from.
        autocast: a function that returns a context for each call of the model (mixed precision).
        device: where the model computes; default: where its parameters are now. A trainer says it, because wrappers
            move the model later.
    """

    shares_weights = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_tokens: int = 65536,
        seed: int = 0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        device: torch.device | None = None,
    ) -> None:
        self.model = cast(Any, model)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.autocast = autocast
        self.has_branches = getattr(model.config, "model_type", None) == "metis_home"
        self.device = device or next(model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._rope_index = rope_index_of(model)

    def generate(self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling) -> list[list[Rollout]]:
        """Answer each prompt `num_generations` times, see `RolloutEngine.generate`.

        Raises:
            EngineError: a branch is asked of a dense model, or none of a two-branch model.
        """
        if self.has_branches != (sampling.branch is not None):
            raise EngineError(
                f"the model has {'two branches' if self.has_branches else 'no branches'} and sampling.branch is "
                f'{sampling.branch!r}. Two-branch models need a Branch, "router" or "sample"; dense ones None.'
            )
        answers: list[list[Rollout]] = [[] for _ in prompts]
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                for chosen in self._batches(prompts, num_generations, sampling):
                    batch = [prompts[number] for number in chosen]
                    for job in self._jobs(batch, num_generations, sampling):
                        for place, rollout in self._answer(job, sampling):
                            answers[chosen[place]].append(rollout)
        finally:
            self.model.train(was_training)
        return answers

    def router_logits(self, prompts: Sequence[Prompt]) -> Tensor:
        """What the router says of each prompt, (P, 2) float32 on the CPU; for engines that have no router."""
        logits_PE = torch.zeros(len(prompts), 2)
        was_training = self.model.training
        self.model.eval()
        try:
            for prompt in prompts:
                fill_positions(prompt, self._rope_index)
            with torch.no_grad(), self.autocast():
                lengths = [len(prompt) for prompt in prompts]
                for chosen in batches_by_length(lengths, max_tokens=self.max_tokens) if lengths else []:
                    _, logits = self._embed_and_route([prompts[number] for number in chosen])
                    logits_PE[chosen] = logits.float().cpu()
        finally:
            self.model.train(was_training)
        return logits_PE

    def router_threshold(self) -> float:
        """From which probability on the router sends a prompt to the thinking branch."""
        return float(self.model._router_threshold(None))

    def update_weights(self, model: nn.Module) -> None:
        """Nothing: the weights are shared."""

    def seed(self, seed: int) -> None:
        """See `RolloutEngine.seed`."""
        self.generator.manual_seed(seed)

    def state_dict(self) -> dict[str, object]:
        """The random state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up a random state."""
        self.generator.set_state(cast(Tensor, state["generator"]).cpu())

    def _batches(self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling) -> list[list[int]]:
        lengths = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
        return batches_by_length(lengths, max_tokens=max(1, self.max_tokens // num_generations)) if lengths else []

    def _jobs(self, prompts: list[Prompt], num_generations: int, sampling: Sampling) -> "list[_Job]":
        """Split a batch of prompts by branch: a batch of one branch runs as fast as the dense model."""
        for prompt in prompts:
            fill_positions(prompt, self._rope_index)
        everyone = [(place, num_generations, 0.0) for place in range(len(prompts))]
        if not self.has_branches:
            return [_Job(prompts, everyone, None, None)]
        if isinstance(sampling.branch, Branch):
            return [_Job(prompts, everyone, sampling.branch, None)]
        embeds_PTD, logits_PE = self._embed_and_route(prompts)
        return self._routed_jobs(prompts, embeds_PTD, logits_PE, num_generations, sampling)

    def _embed_and_route(self, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """Input embeddings (P, T, D), images merged in, and the router's logits (P, 2): the vision tower runs once."""
        inputs = left_padded(prompts, self.device)
        embeds_PTD = self.model.model.embed(
            inputs.input_ids, pixel_values=inputs.pixel_values, image_grid_thw=inputs.image_grid_thw
        )
        backend = ops.check_backend(self.model.config.text_config.ffn_implementation)
        decision = ops.route_queries(embeds_PTD, inputs.mask, self.model.model.router, backend=backend)
        return embeds_PTD, decision.logits

    def _routed_jobs(
        self, prompts: list[Prompt], embeds_PTD: Tensor, logits_PE: Tensor, num_generations: int, sampling: Sampling
    ) -> "list[_Job]":
        shares = divide(
            logits_PE,
            num_generations,
            cast(Literal["router", "sample"], sampling.branch),
            threshold=self.model._router_threshold(None),
            generator=self.generator,
        )
        return [
            _Job(prompts, [(share.place, share.count, share.logprob) for share in rows], branch, embeds_PTD)
            for branch, rows in shares.items()
            if rows
        ]

    def _answer(self, job: "_Job", sampling: Sampling) -> list[tuple[int, Rollout]]:
        """Prefill the prompts of a job, decode its rollouts; (place in the batch, rollout) in order."""
        prompts = [job.prompts[place] for place, _, _ in job.rows]
        inputs = left_padded(prompts, self.device)
        embeds = None
        if job.embeds_PTD is not None:  # padded to the longest of all prompts, which may be of the other branch
            places = torch.tensor([place for place, _, _ in job.rows], device=self.device)
            embeds = job.embeds_PTD[places, -inputs.input_ids.shape[1] :]
        decoded = decode(
            self.model,
            inputs,
            [count for _, count, _ in job.rows],
            sampling,
            self.generator,
            inputs_embeds=embeds,
            stop=self._stop(sampling),
            **({} if job.branch is None else {"branch_ids": int(job.branch)}),
        )
        answers = iter(decoded)
        rollouts = []
        for place, count, branch_logprob in job.rows:
            for _ in range(count):
                answer = next(answers)
                rollout = Rollout(
                    prompt=job.prompts[place],
                    completion_ids=answer.ids,
                    logprobs=answer.logprobs,
                    loss_mask=[1] * len(answer.ids),
                    branch=None if job.branch is None else int(job.branch),
                    branch_logprob=branch_logprob,
                    finished=answer.finished,
                    text=self.tokenizer.decode(answer.ids, skip_special_tokens=True),
                )
                rollouts.append((place, rollout))
        return rollouts

    def _stop(self, sampling: Sampling) -> Stop | None:
        if not sampling.stop:
            return None
        tail = 4 + max(len(text) for text in sampling.stop)  # a token is at least one byte

        def stops(ids: list[int]) -> bool:
            end = self.tokenizer.decode(ids[-tail:])
            return any(text in end for text in sampling.stop)

        return stops


@dataclass(frozen=True, slots=True)
class _Job:
    """Rollouts that are decoded together."""

    prompts: list[Prompt]
    rows: list[tuple[int, int, float]]
    """(place in `prompts`, how many answers, log P(branch))."""
    branch: Branch | None
    embeds_PTD: Tensor | None
    """Input embeddings of all `prompts`, left-padded, where the router needed them."""

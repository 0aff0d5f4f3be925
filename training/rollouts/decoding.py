"""Prefill prompts once, then decode several answers of each, dropping the rows that have ended.

Shapes: P prompts, R rows (answers that still go on), M most new tokens, T tokens so far, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from .types import Prompt, Sampling

# The cache is copied without the ended rows when this share of them has ended. Ours: copies stay below a few per cent.
_DROP_SHARE = 0.25

Stop = Callable[[list[int]], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedPrompts:
    """Prompts of one batch, padded on the left."""

    input_ids: Tensor
    """(P, T) int64."""
    mask: Tensor | None
    """(P, T) bool, false at padding; None where there is none."""
    positions: Tensor
    """M-RoPE positions, (3, P, T) int64."""
    next_position: Tensor
    """(P,) int64, of the first new token."""
    types: Tensor
    """(P, T) int64, `mm_token_type_ids`."""
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None

    def vision(self) -> dict[str, Tensor]:
        """The forward arguments that bring the images; empty without any."""
        if self.pixel_values is None or self.image_grid_thw is None:
            return {}
        return {
            "pixel_values": self.pixel_values,
            "image_grid_thw": self.image_grid_thw,
            "mm_token_type_ids": self.types,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One answer."""

    ids: list[int]
    logprobs: list[float]
    finished: bool


def left_padded(prompts: Sequence[Prompt], device: torch.device) -> PaddedPrompts:
    """Pad prompts whose `positions` are known; images are joined in the prompts' order."""
    longest = max(len(prompt) for prompt in prompts)
    shape = (len(prompts), longest)
    input_ids, types = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask, positions = torch.zeros(shape, dtype=torch.bool), torch.zeros((3, *shape), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt)
        input_ids[row, start:] = torch.tensor(prompt.input_ids)
        types[row, start:] = torch.tensor(prompt.mm_token_type_ids)
        mask[row, start:] = True
        positions[:, row, start:] = cast(Tensor, prompt.positions)
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    grids = [prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None]
    return PaddedPrompts(
        input_ids=input_ids.to(device),
        mask=None if bool(mask.all()) else mask.to(device),
        positions=positions.to(device),
        next_position=torch.tensor([prompt.next_position for prompt in prompts], device=device),
        types=types.to(device),
        pixel_values=torch.cat(pixels).to(device) if pixels else None,
        image_grid_thw=torch.cat(grids).to(device) if grids else None,
    )


def decode(
    model: Any,
    prompts: PaddedPrompts,
    counts: Sequence[int],
    sampling: Sampling,
    generator: torch.Generator,
    *,
    inputs_embeds: Tensor | None = None,
    stop: Stop | None = None,
    **arguments: object,
) -> list[Decoded]:
    """Answer each prompt `counts[p]` times.

    Args:
        model: unwrapped, in evaluation mode; gradients are off.
        inputs_embeds: (P, T, D) with images merged in, instead of ids and pixels.
        stop: says of the ids of an answer so far whether it ends here, beside the end tokens.
        **arguments: for every call of the model (`branch_ids`).
    Returns:
        The answers of the first prompt, then those of the second, ...
    """
    device = prompts.input_ids.device
    cache = DynamicCache(config=model.config.get_text_config())
    seen = {"inputs_embeds": inputs_embeds} if inputs_embeds is not None else _ids_and_vision(prompts)
    output = model(
        **seen,
        attention_mask=None if prompts.mask is None else prompts.mask.long(),
        position_ids=prompts.positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **arguments,
    )
    prompt_R = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
    if max(counts) > 1:
        cache.batch_select_indices(prompt_R)
    logits_RV = output.logits[:, -1][prompt_R]
    position_R = prompts.next_position[prompt_R]
    keep_RT = _keep(prompts, prompt_R, sampling.max_new_tokens)
    masks = _mask_maker(model)

    rows, most = len(prompt_R), sampling.max_new_tokens
    ids_RM = torch.zeros(rows, most, dtype=torch.long, device=device)
    logp_RM = torch.zeros(rows, most, device=device)
    length_R = torch.full((rows,), most, device=device)
    finished_R = torch.zeros(rows, dtype=torch.bool, device=device)
    ends = torch.tensor(sampling.eos_token_ids, dtype=torch.long, device=device)
    suppress = torch.tensor(sampling.suppress_token_ids, dtype=torch.long, device=device)
    row_A = torch.arange(rows, device=device)  # which answer each row of the batch is: A of R rows are left
    done_A = finished_R.clone()
    for step in range(most):
        token_A, chosen_logp_A = choose(logits_RV, sampling, suppress, generator)
        ids_RM[row_A, step] = token_A
        logp_RM[row_A, step] = chosen_logp_A
        ended_A = torch.isin(token_A, ends) & ~done_A
        if stop is not None:
            ended_A |= _stopped(stop, ids_RM, row_A, done_A, step)
        done_A = done_A | ended_A
        ended_R = row_A[ended_A]
        length_R[ended_R] = step + 1
        finished_R[ended_R] = True
        left = len(row_A) - int(done_A.sum())
        if left == 0 or step + 1 == most:
            break
        if left <= (1 - _DROP_SHARE) * len(row_A):
            chosen = (~done_A).nonzero(as_tuple=True)[0]
            cache.batch_select_indices(chosen)
            row_A, token_A, position_R, done_A = row_A[chosen], token_A[chosen], position_R[chosen], done_A[chosen]
            keep_RT = None if keep_RT is None else keep_RT[chosen]
        length = prompts.input_ids.shape[1] + step + 1
        logits_RV = model(
            input_ids=token_A[:, None],
            attention_mask=None if keep_RT is None else masks(keep_RT[:, :length]),
            position_ids=(position_R + step).expand(3, -1)[..., None],
            past_key_values=cache,
            use_cache=True,
            **arguments,
        ).logits[:, -1]
    return _cut(ids_RM, logp_RM, length_R, finished_R)


def choose(
    logits_RV: Tensor, sampling: Sampling, suppress: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Returns:
        Tokens (R,) and their log-probabilities (R,) float32 at the sampling temperature, without the suppressed
        tokens; top_p and top_k limit what is drawn and not the log-probabilities.
    """
    logits_RV = logits_RV.float()
    if sampling.temperature not in (0.0, 1.0):
        logits_RV = logits_RV / sampling.temperature
    if len(suppress):
        logits_RV = logits_RV.index_fill(1, suppress, torch.finfo(torch.float32).min)
    logp_RV = logits_RV.log_softmax(-1)
    if sampling.temperature == 0:
        token_R1 = logp_RV.argmax(-1, keepdim=True)
    else:
        token_R1 = draw(_limited(logp_RV.exp(), sampling), generator)
    return token_R1[:, 0], logp_RV.gather(1, token_R1)[:, 0]


def draw(probability_RV: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row in proportion to its probability, (R, 1); never one of probability 0.

    By inverting the distribution function: one random number per row. torch.multinomial draws one per token, which on a
    CPU takes 80 times as long at 152K tokens (348 ms for 32 rows, measured). Sums are in float64: in float32, what
    the many unlikely tokens add would be rounded away.
    """
    cumulative_RV = probability_RV.double().cumsum(-1)
    total_R1 = cumulative_RV[:, -1:]
    uniform_R1 = torch.rand(total_R1.shape, dtype=torch.float64, device=total_R1.device, generator=generator)
    below_R1 = torch.minimum(uniform_R1 * total_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    return torch.searchsorted(cumulative_RV, below_R1, right=True)


def _limited(probability_RV: Tensor, sampling: Sampling) -> Tensor:
    """Zero the tokens that top_k and top_p leave out; the most likely one always stays."""
    if sampling.top_k and sampling.top_k < probability_RV.shape[1]:
        lowest_R1 = probability_RV.topk(sampling.top_k).values[:, -1:]
        probability_RV = probability_RV.masked_fill(probability_RV < lowest_R1, 0.0)
    if sampling.top_p < 1:
        sorted_RV, order_RV = probability_RV.sort(descending=True)
        before_RV = sorted_RV.cumsum(-1) - sorted_RV
        out_RV = torch.zeros_like(probability_RV, dtype=torch.bool)
        limit_R1 = sampling.top_p * probability_RV.sum(-1, keepdim=True)
        out_RV.scatter_(1, order_RV, before_RV >= limit_R1)
        probability_RV = probability_RV.masked_fill(out_RV, 0.0)
    return probability_RV


def _ids_and_vision(prompts: PaddedPrompts) -> dict[str, Tensor]:
    return {"input_ids": prompts.input_ids, **prompts.vision()}


def _keep(prompts: PaddedPrompts, prompt_R: Tensor, most: int) -> Tensor | None:
    """(R, T + most) bool: which cached tokens may be read; None where all may."""
    if prompts.mask is None:
        return None
    new_RM = torch.ones(len(prompt_R), most, dtype=torch.bool, device=prompt_R.device)
    return torch.cat([prompts.mask[prompt_R], new_RM], dim=1)


def _mask_maker(model: Any) -> Callable[[Tensor], Tensor]:
    """What a decoding step passes as attention_mask: the finished 4-D mask where the attention takes one."""
    text = model.config.get_text_config()
    sliding = "sliding_attention" in (getattr(text, "layer_types", None) or [])
    if model.config._attn_implementation == "sdpa" and not sliding:
        return lambda keep_RT: keep_RT[:, None, None, :]
    return lambda keep_RT: keep_RT.long()


def _stopped(stop: Stop, ids_RM: Tensor, row_A: Tensor, done_A: Tensor, step: int) -> Tensor:
    """(A,) bool: rows whose answer so far ends here."""
    answers = ids_RM[row_A, : step + 1].tolist()
    ends = [not done and stop(answer) for answer, done in zip(answers, done_A.tolist(), strict=True)]
    return torch.tensor(ends, device=row_A.device)


def _cut(ids_RM: Tensor, logp_RM: Tensor, length_R: Tensor, finished_R: Tensor) -> list[Decoded]:
    rows = zip(ids_RM.tolist(), logp_RM.tolist(), length_R.tolist(), finished_R.tolist(), strict=True)
    return [
        Decoded(ids=ids[:length], logprobs=logprobs[:length], finished=finished)
        for ids, logprobs, length, finished in rows
    ]

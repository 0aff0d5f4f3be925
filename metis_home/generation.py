"""Routed generation: decide once per query, then answer with that branch to the end.

The decision is made where `generate` has the whole prompt and has not yet copied it for beams, outside of compiled
regions; it then travels as `branch_ids`, a CPU tensor among the model's inputs, which beams and returned sequences expand
like any other input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import ContinuousMixin, GenerationConfig
from transformers.utils import logging as transformers_logging

from .branch import Branch
from .branch_plan import check_branch, check_branch_ids
from .cache_branch import branch_for_cache, stamp_cache
from .errors import BranchError, UnsupportedError
from .router import DEFAULT_THRESHOLD, check_threshold

logger = transformers_logging.get_logger(__name__)

Thinking = bool | str | Sequence[bool | None] | None
_REQUEST = "routing_request"


@dataclass(slots=True)
class RoutingRequest:
    """What the caller asked for, and what became of it. One per `generate` call, never on the model (threads)."""

    thinking: bool | str | tuple[bool | None, ...]
    branch_ids: Tensor | int | None
    threshold: float
    decided_ids: Tensor | None = None
    """(B,) int64 on the CPU, before beams are expanded; None until the decision is made."""
    thinking_probability: Tensor | None = None
    """(B,) float32 on the CPU; None where the router did not run."""


def check_thinking(thinking: Thinking) -> bool | str | tuple[bool | None, ...]:
    """Return `thinking` as True, False, "auto" or a tuple of True / False / None (None: the router decides).

    Raises:
        BranchError: anything else.
    """
    if thinking is None or thinking == "auto":
        return "auto"
    if isinstance(thinking, bool):
        return thinking
    if isinstance(thinking, Sequence) and not isinstance(thinking, str):
        if all(item is None or isinstance(item, bool) for item in thinking):
            return tuple(thinking)
    raise BranchError(
        'thinking must be True, False, "auto" (the router decides) or a list with one of True / False / None per '
        f"query; found {thinking!r}"
    )


class ForcedBranchView(ContinuousMixin):
    """A model that always takes one branch, for continuous batching, which passes no per-request arguments.

    Shares everything with the model it views; only calls differ.
    """

    def __init__(self, model: Any, branch: Branch) -> None:
        self._viewed = model
        self._branch = branch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._viewed, name)

    def eval(self) -> "ForcedBranchView":
        """Put the viewed model into evaluation mode; like `Module.eval`, returns what it was called on."""
        self._viewed.eval()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The viewed model's forward with the branch forced."""
        return self._viewed(*args, branch_ids=int(self._branch), **kwargs)


class RoutedGenerationMixin:
    """`generate` with `thinking=` and `router_threshold=`; stands before transformers' `GenerationMixin`."""

    def generate(
        self,
        *args,
        thinking: Thinking = None,
        router_threshold: float | None = None,
        branch_ids: Tensor | int | None = None,
        **kwargs,
    ):
        """As `transformers.GenerationMixin.generate`, and

        Args:
            thinking: True or False forces a branch; "auto" asks the router; a list says it per query (None: router).
                Default: the generation config's `thinking`, else "auto". A cache that is continued keeps its branch.
            router_threshold: in [0, 1]; a query thinks where P(thinking) >= router_threshold (0: always; 1: only where
                the probability rounds to 1). Default: the generation config's `router_threshold`, else 0.5.
            branch_ids: the low-level form of `thinking`: an int, or (B,) integers.
        Returns:
            As in transformers. With `return_dict_in_generate=True` the output also has `branch_ids` (int64) and
            `thinking_probability` (float32, None where the router was not asked), on the CPU, one per returned sequence.
        Raises:
            BranchError: arguments that name no branch or do not fit the batch, or thinking and branch_ids together.
            CacheBranchError: past_key_values of another branch. UnsupportedError: `cache_implementation="paged"`.
        """
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        request = self._routing_request(thinking, router_threshold, branch_ids, config)
        if "paged" in (kwargs.get("cache_implementation"), getattr(config, "cache_implementation", None)):
            raise UnsupportedError(
                'cache_implementation="paged" hides which token belongs to which query, so the router cannot run. '
                "Use generate_batch(inputs, thinking=True) or (..., thinking=False)."
            )
        output = super().generate(*args, **{_REQUEST: request}, **kwargs)  # type: ignore[misc]
        if request.decided_ids is None:
            raise UnsupportedError(
                "this way of generating never asked for a branch (is `custom_generate` set, or is this a version of "
                "transformers that is not supported?). Force one with model(..., branch_ids=...) in your own loop."
            )
        if isinstance(output, dict) and "sequences" in output:
            copies = output["sequences"].shape[0] // max(request.decided_ids.shape[0], 1)
            output["branch_ids"] = request.decided_ids.repeat_interleave(copies)
            probability = request.thinking_probability
            output["thinking_probability"] = None if probability is None else probability.repeat_interleave(copies)
        return output

    def _routing_request(
        self, thinking: Thinking, threshold: float | None, branch_ids: Tensor | int | None, config: Any
    ) -> RoutingRequest:
        if thinking is not None and branch_ids is not None:
            raise BranchError(
                f"pass thinking or branch_ids, not both; found thinking={thinking!r}, branch_ids={branch_ids!r}"
            )
        if thinking is None and branch_ids is None:
            thinking = getattr(config, "thinking", None)
            if thinking is None:
                thinking = getattr(self.generation_config, "thinking", None)  # type: ignore[attr-defined]
        if isinstance(branch_ids, int):
            check_branch(branch_ids)
        return RoutingRequest(check_thinking(thinking), branch_ids, self._router_threshold(threshold, config))

    def _router_threshold(self, threshold: float | None, config: Any = None) -> float:
        """The caller's threshold, else the given generation config's, else the model's, else 0.5."""
        for source in (config, self.generation_config):  # type: ignore[attr-defined]
            if threshold is None:
                threshold = getattr(source, "router_threshold", None)
        return check_threshold(DEFAULT_THRESHOLD if threshold is None else threshold)

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; also keeps `router_threshold` and `thinking` of the generation config."""
        config = self.generation_config  # type: ignore[attr-defined]
        if config is not None and (hasattr(config, "router_threshold") or hasattr(config, "thinking")):
            # transformers drops attributes it does not know from a config that says it was derived from a model's
            config._from_model_config = False
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    # ---- the hooks of GenerationMixin ------------------------------------------------------------------------------

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(  # type: ignore[misc]
            {name: value for name, value in model_kwargs.items() if name != _REQUEST}
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, is_encoder_decoder: bool = False, **kwargs):
        # The one place, on all supported versions, that `generate` passes exactly once, with the whole prompt, the
        # caller's cache and (transformers >= 5.18) the visual features, and before anything is copied for beams.
        request = kwargs.pop(_REQUEST, None)
        if request is not None:
            kwargs["branch_ids"] = self._decide(request, kwargs)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, **kwargs)  # type: ignore[misc]

    def _decide(self, request: RoutingRequest, inputs: dict[str, Any]) -> Tensor:
        """Settle the branch of each query; (B,) int64 on the CPU."""
        prompt = inputs["input_ids"]
        if inputs.get("inputs_embeds") is not None:
            prompt = inputs["inputs_embeds"]
        batch = prompt.shape[0]
        cache = inputs.get("past_key_values")

        wanted = self._forced(request, batch)
        stamped = branch_for_cache(cache, None)
        kept = _rows(stamped, batch) if stamped is not None else None
        if kept is not None:  # a conversation goes on with the branch it began with
            ids = torch.where(wanted < 0, kept, wanted)
        elif bool((wanted < 0).any()):
            decision = self._ask_router(request, inputs)
            request.thinking_probability = decision.thinking_probability.detach().cpu()
            ids = torch.where(wanted < 0, decision.branch_ids.cpu(), wanted)
        else:
            ids = wanted
        branch_for_cache(cache, ids)  # raises where the cache belongs to another branch
        request.decided_ids = ids
        return ids

    @staticmethod
    def _forced(request: RoutingRequest, batch: int) -> Tensor:
        """(B,) int64: the branch asked for, -1 where the router is to decide."""
        if request.branch_ids is not None:
            return _rows(check_branch_ids(_on_host(request.branch_ids), batch, None), batch)
        if isinstance(request.thinking, tuple):
            if len(request.thinking) != batch:
                raise BranchError(
                    f"thinking has {len(request.thinking)} entries for a batch of {batch}: pass one per query, or a "
                    "single True / False / 'auto'"
                )
            return torch.tensor([-1 if item is None else int(item) for item in request.thinking], dtype=torch.long)
        return torch.full((batch,), -1 if request.thinking == "auto" else int(request.thinking))

    def _ask_router(self, request: RoutingRequest, inputs: dict[str, Any]):
        if not self.config.router_trained:  # type: ignore[attr-defined]
            logger.warning_once(
                "This model's router has not been trained (router_trained is false in its config): its choice between "
                "thinking and answering directly means nothing yet. Train it (`metis-home train router_only.yaml "
                "model.path=MODEL data.train=ROWS.jsonl`; the rows' modes are its router_labels, docs/training.md), or "
                "choose yourself with thinking=True or thinking=False."
            )
        names = ("input_ids", "attention_mask", "inputs_embeds", "mm_encoder_outputs", "position_ids")
        prompt = {name: inputs.get(name) for name in names}
        if not prompt["mm_encoder_outputs"]:
            for name in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"):
                prompt[name] = inputs.get(name)
        if prompt["inputs_embeds"] is not None:
            prompt["input_ids"] = None
        return self.route(**prompt, router_threshold=request.threshold)  # type: ignore[attr-defined]

    # `inputs_embeds` is named because `generate` looks for it in this signature.
    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, branch_ids=None, **kwargs):
        """As in transformers, with `branch_ids` as the forward wants them: an int where all rows agree (the dense path),
        else a tensor: on the host to prefill, on the device to decode (fixed shapes, no synchronisation)."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if branch_ids is None:
            return inputs
        cache = inputs.get("past_key_values")
        stamp = stamp_cache(cache, branch_ids) if cache is not None else None
        if stamp is None:
            present = branch_ids.unique()
            inputs["branch_ids"] = int(present[0]) if present.numel() == 1 else branch_ids
            return inputs
        hidden = inputs.get("inputs_embeds")
        hidden = inputs["input_ids"] if hidden is None else hidden
        inputs["branch_ids"] = stamp.on(hidden.device) if hidden.shape[1] == 1 else stamp.branch_ids
        return inputs

    def _get_candidate_generator(self, *args, assistant_model=None, model_kwargs=None, **kwargs):
        # The assistant's `generate` gets a copy of model_kwargs; a dense assistant knows no branch.
        if assistant_model is not None and not isinstance(assistant_model, RoutedGenerationMixin):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "branch_ids"}
        return super()._get_candidate_generator(  # type: ignore[misc]
            *args, assistant_model=assistant_model, model_kwargs=model_kwargs, **kwargs
        )

    # ---- continuous batching: only with a forced branch ----------------------------------------------------------

    def _forced_view(self, thinking: Thinking, generation_config: GenerationConfig | None) -> ForcedBranchView:
        for config in (generation_config, self.generation_config):  # type: ignore[attr-defined]
            if thinking is None:
                thinking = getattr(config, "thinking", None)
        if not isinstance(thinking, bool):
            raise UnsupportedError(
                "continuous batching joins all queries into one row and passes no per-query arguments, so the router "
                f"cannot run. Pass thinking=True or thinking=False; found thinking={thinking!r}. "
                "To serve routed traffic, split the model (`metis-home split`) and route in front of two engines."
            )
        return ForcedBranchView(self, Branch(int(thinking)))

    def init_continuous_batching(self, generation_config=None, *args, thinking: Thinking = None, **kwargs):
        """As in transformers, for one branch: `thinking` must be True or False.

        Raises:
            UnsupportedError: no branch is forced.
        """
        view = self._forced_view(thinking, generation_config)
        return ContinuousMixin.init_continuous_batching(view, generation_config, *args, **kwargs)

    def continuous_batching_context_manager(self, generation_config=None, *args, thinking: Thinking = None, **kwargs):
        """As in transformers, for one branch: `thinking` must be True or False.

        Raises:
            UnsupportedError: no branch is forced.
        """
        view = self._forced_view(thinking, generation_config)
        return ContinuousMixin.continuous_batching_context_manager(view, generation_config, *args, **kwargs)

    def generate_batch(self, inputs, generation_config=None, *args, thinking: Thinking = None, **kwargs):
        """As in transformers, for one branch: `thinking` must be True or False.

        Raises:
            UnsupportedError: no branch is forced.
        """
        view = self._forced_view(thinking, generation_config)
        return ContinuousMixin.generate_batch(view, inputs, generation_config, *args, **kwargs)


def _on_host(branch_ids: Tensor | int) -> Tensor | int:
    return branch_ids.detach().cpu() if isinstance(branch_ids, Tensor) else branch_ids


def _rows(branch_ids: Tensor | int, batch: int) -> Tensor:
    """An int or (B,) as a (B,) int64 CPU tensor.

    Raises:
        BranchError: a tensor of another length (a cache of another batch, say).
    """
    if isinstance(branch_ids, int):
        return torch.full((batch,), branch_ids)
    return check_branch_ids(branch_ids, batch, None).long()  # type: ignore[union-attr]

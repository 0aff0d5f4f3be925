"""Answer many prompts: routed first, then batched by branch and length.

A query is routed from its prompt alone, before anything is generated; so all queries of a window are routed in one pass,
and those of one branch answer together. A batch of one branch is the dense computation, and short direct answers do not
wait for long thoughts. The answers are those of `generate(thinking=...)`, up to the rounding of other batch shapes.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from metis_home.branch import Branch
from metis_home.config_fields import MODEL_TYPE
from metis_home.prompts import MAX_NEW_TOKENS, SYSTEM_PROMPT, thinking_prefix
from metis_home.router import DEFAULT_THRESHOLD, check_threshold
from metis_home.training.data.batching import batches_by_length
from metis_home.training.data.collate import PaddingCollator
from metis_home.training.data.encode import Encoder, Example

from .completions import Mode
from .metrics import share_seconds, thinks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from metis_home.processing import MetisHomeProcessor
    from metis_home.training.data.records import Record

BATCH_TOKENS = 32_768  # ours
_WINDOW_ROWS = 256
_WINDOW_BYTES = 1 << 30  # of pixels, which are what a window weighs
_MODEL_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
_IGNORE = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One encoded question."""

    record: "Record"
    example: Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the router said about one prompt, and its share of the time."""

    thinking_probability: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One answer, as tokens and as text."""

    position: int
    """Which of the prompts it answers."""
    branch: Branch | None
    prefix: str
    text: str
    prompt_tokens: int
    prefix_tokens: int
    completion_tokens: int
    finished: bool
    seconds: float


class Answerer:
    """A model with everything that settles its answers: greedy decoding, prompt format, limits.

    Attributes:
        routes: the model has two branches and a router. A dense model has neither: then "auto" is the plain prompt, and
            "on" and "off" only write their prefix into it.
        threshold: P(thinking) from which a query thinks in mode "auto".
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        processor: "MetisHomeProcessor",
        *,
        system_prompt: str | None = SYSTEM_PROMPT,
        max_new_tokens: int = MAX_NEW_TOKENS,
        threshold: float | None = None,
        batch_tokens: int = BATCH_TOKENS,
        max_rows: int | None = None,
    ) -> None:
        """
        Args:
            model: two-branch or dense Qwen2.5-VL; used in evaluation mode.
            system_prompt: put before conversations that have none; "" or None: the chat template's own.
            max_new_tokens: longest answer, in tokens.
            threshold: in [0, 1]; default: the generation config's `router_threshold`, else 0.5.
            batch_tokens: size of a batch: rows x (longest prompt + max_new_tokens).
            max_rows: most rows of a batch.
        Raises:
            BranchError: a threshold outside [0, 1].
        """
        self.model, self.processor = model, processor
        self.encoder = Encoder(processor, system_prompt=system_prompt or None)
        self.system_prompt, self.max_new_tokens = system_prompt, max_new_tokens
        self.batch_tokens, self.max_rows = batch_tokens, max_rows
        config = model.generation_config
        self.routes = model.config.model_type == MODEL_TYPE
        stated = getattr(config, "router_threshold", None) if threshold is None else threshold
        self.threshold = check_threshold(DEFAULT_THRESHOLD if stated is None else stated)
        end = config.eos_token_id
        self._end_ids = set() if end is None else {end} if isinstance(end, int) else set(end)
        self._pad_id = processor.tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        self._collate = PaddingCollator(self._pad_id, side="left")
        self._prefix_ids = {forced: self.encoder.tokens(thinking_prefix(forced)) for forced in (None, False, True)}

    def windows(self, records: Iterable["Record"]) -> Iterator[list[Prompt]]:
        """Encode records in windows of at most 256 rows and about 1 GiB of pixels.

        Raises:
            DataError, ProcessorError: a row cannot be encoded.
        """
        window: list[Prompt] = []
        weight = 0
        for record in records:
            example = self.encoder.prompt(record)
            window.append(Prompt(record=record, example=example))
            if example.pixel_values is not None:
                weight += example.pixel_values.nbytes
            if len(window) == _WINDOW_ROWS or weight >= _WINDOW_BYTES:
                yield window
                window, weight = [], 0
        if window:
            yield window

    def route(self, prompts: Sequence[Prompt]) -> list[Routing]:
        """Ask the router about each prompt, in order; no decoder layer runs."""
        found: dict[int, Routing] = {}
        for batch in batches_by_length(
            [len(prompt.example) for prompt in prompts], max_tokens=self.batch_tokens, max_rows=self.max_rows
        ):
            start = time.perf_counter()
            with torch.no_grad(), _evaluating(self.model):
                decision = self.model.route(**self._inputs([prompts[row].example for row in batch]))
            probability = decision.thinking_probability.float().cpu().tolist()
            seconds = (time.perf_counter() - start) / len(batch)
            for row, value in zip(batch, probability, strict=True):
                found[row] = Routing(thinking_probability=value, seconds=seconds)
        return [found[row] for row in range(len(prompts))]

    def answer(
        self, prompts: Sequence[Prompt], mode: Mode, probability: Sequence[float] | None = None
    ) -> Iterator[list[Generated]]:
        """Answer every prompt once, batch by batch (not in the order of the prompts).

        Args:
            mode: "on" and "off" force a branch and write its prefix; "auto" takes the router's branch, without prefix.
            probability: P(thinking) of each prompt; needed by "auto" of a two-branch model.
        """
        forced = {"auto": None, "on": True, "off": False}[mode]
        branches: list[Branch | None] = [None if forced is None else Branch(int(forced))] * len(prompts)
        if self.routes and forced is None:
            if probability is None:
                raise ValueError('mode "auto" of a two-branch model needs the probabilities of `route`')
            branches = [Branch(int(thinks(value, self.threshold))) for value in probability]
        prefix_ids = self._prefix_ids[forced]
        for branch in dict.fromkeys(branches):
            rows = [row for row, chosen in enumerate(branches) if chosen is branch]
            lengths = [len(prompts[row].example) + len(prefix_ids) + self.max_new_tokens for row in rows]
            for batch in batches_by_length(lengths, max_tokens=self.batch_tokens, max_rows=self.max_rows):
                yield self._generate(prompts, [rows[place] for place in batch], branch, forced)

    def _generate(
        self, prompts: Sequence[Prompt], rows: list[int], branch: Branch | None, forced: bool | None
    ) -> list[Generated]:
        prefix_ids = self._prefix_ids[forced]
        inputs = self._inputs([_with_prefix(prompts[row].example, prefix_ids) for row in rows])
        routing = {"branch_ids": int(branch)} if self.routes and branch is not None else {}
        start = time.perf_counter()
        with torch.no_grad(), _evaluating(self.model):
            sequences = self.model.generate(
                **inputs,
                **routing,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._pad_id,
                return_dict_in_generate=False,
            )
        answers = [self._cut(ids) for ids in sequences[:, inputs["input_ids"].shape[1] :].tolist()]
        seconds = share_seconds(time.perf_counter() - start, [len(ids) for ids, _ in answers])
        decode = self.processor.tokenizer.decode
        return [
            Generated(
                position=row,
                branch=branch if self.routes else None,
                prefix=thinking_prefix(forced),
                text=decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
                prompt_tokens=len(prompts[row].example),
                prefix_tokens=len(prefix_ids),
                completion_tokens=len(ids),
                finished=finished,
                seconds=share,
            )
            for row, (ids, finished), share in zip(rows, answers, seconds, strict=True)
        ]

    def _cut(self, ids: list[int]) -> tuple[list[int], bool]:
        """The tokens up to the first end token, and whether there is one; what follows is padding."""
        for place, token in enumerate(ids):
            if token in self._end_ids:
                return ids[: place + 1], True
        return ids, False

    def _inputs(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        batch = self._collate(examples)
        device = self.model.device
        return {name: batch[name].to(device) for name in _MODEL_INPUTS if batch.get(name) is not None}  # type: ignore[union-attr]


class _evaluating:
    """Put a model into evaluation mode, and back."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exception: object) -> None:
        self.model.train(self.was_training)


def _with_prefix(example: Example, prefix_ids: list[int]) -> Example:
    """The prompt with the beginning of an answer after it, as `Encoder.prompt(record, thinking)` makes it."""
    if not prefix_ids:
        return example
    return replace(
        example,
        input_ids=[*example.input_ids, *prefix_ids],
        labels=[*example.labels, *[_IGNORE] * len(prefix_ids)],
        mm_token_type_ids=[*example.mm_token_type_ids, *[0] * len(prefix_ids)],
    )

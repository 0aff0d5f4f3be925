"""What both benchmark kits' adapters share: answer a kit's messages, and keep the router's decision beside its result file.

A kit's result file holds text only. The sidecar (JSON lines, one per answer) adds the branch, P(thinking) and token
counts; `metis-home think-ratio` reads it. Rows of kits that give an answer no name are found again by `answer_digest`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import xxhash

from metis_home.errors import ConfigError
from metis_home.prompts import ANSWER_CLOSE, ANSWER_OPEN, MAX_NEW_TOKENS, SYSTEM_PROMPT, THINK_CLOSE, THINK_OPEN
from metis_home.responses import parse_response

if TYPE_CHECKING:
    from metis_home.media import Message

    from .completions import Mode

Route = Literal["auto", "think", "direct"]
_MODES: dict[str, "Mode"] = {"auto": "auto", "think": "on", "direct": "off"}
_ROWS_WITHOUT_LIMIT = 1 << 40  # the kit's batch size rules


@dataclass(frozen=True, slots=True, kw_only=True)
class KitAnswer:
    """One answer for a kit."""

    text: str
    """Prefix and generated text; without <answer> tags if so asked."""
    reasoning: str
    branch: str | None
    thinking_probability: float | None
    prompt_tokens: int
    tokens: int
    """Of the answer, the prefix included."""
    finished: bool


class KitModel:
    """A loaded model with the options that a kit passes as text.

    Args:
        pretrained: directory or hub id of a two-branch or dense model.
        route: "auto" (the router), "think" or "direct". For a dense model the last two only write their prefix.
        threshold: for "auto"; default: the model's `router_threshold`, else 0.5.
        system_prompt: for conversations without one; "none": the chat template's own; a path: that file's text.
            Default: Metis-RISE's.
        max_new_tokens: longest answer. The tasks' own limits are not used: many allow 16 tokens, no room for thought.
        answer_tags: False removes <answer> and </answer>, for tasks that compare the whole text.
        min_pixels, max_pixels: image area limits; default: the directory's, else Metis-RISE's.
        dtype: auto (as stored), bf16, fp16 or fp32. device: cpu, cuda:1, ...; auto: the GPUs there are, else cpu.
        attention: sdpa, flash_attention_2, eager, ...
        batch_size: most rows of a batch.
        router_log: the sidecar file; default: none.
    Raises:
        ConfigError: an unknown `route`. CheckpointError: as `load_model`.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        route: str = "auto",
        threshold: float | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        answer_tags: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attention: str | None = None,
        batch_size: int = 1,
        router_log: str | os.PathLike[str] | None = None,
    ) -> None:
        from metis_home.training.loading import load_model, load_processor

        from .answering import Answerer

        if route not in _MODES:
            raise ConfigError(f"route must be auto, think or direct; found {route!r}")
        model = load_model(pretrained, dtype=dtype, device=device, attn_implementation=attention)
        processor = load_processor(pretrained, min_pixels=min_pixels, max_pixels=max_pixels)
        self.mode, self.answer_tags = _MODES[route], answer_tags
        self.router_log = None if router_log is None else Path(router_log)
        self.answerer = Answerer(
            model,
            processor,
            system_prompt=_system_prompt(system_prompt),
            max_new_tokens=max_new_tokens,
            threshold=threshold,
            batch_tokens=_ROWS_WITHOUT_LIMIT,
            max_rows=batch_size,
        )

    def answer(self, conversations: "Sequence[list[Message]]") -> list[KitAnswer]:
        """Answer conversations, in order. Image blocks are `{"type": "image", "image": source}`.

        Raises:
            ProcessorError: an image cannot be used.
        """
        from metis_home.training.data.records import Record

        records = [
            Record(
                index=index,
                id=str(index),
                messages=messages,
                response=None,
                answer=None,
                mode=None,
                source="",
                kind=None,
            )
            for index, messages in enumerate(conversations)
        ]
        found: dict[int, KitAnswer] = {}
        for window in self.answerer.windows(records):
            probability: list[float] | None = None
            if self.answerer.routes:
                probability = [routing.thinking_probability for routing in self.answerer.route(window)]
            for batch in self.answerer.answer(window, self.mode, probability):
                for made in batch:
                    text = made.prefix + made.text
                    found[window[made.position].record.index] = KitAnswer(
                        text=text if self.answer_tags else without_answer_tags(text),
                        reasoning=parse_response(made.text, prefix=made.prefix)["reasoning_content"],
                        branch=None if made.branch is None else made.branch.label,
                        thinking_probability=None if probability is None else probability[made.position],
                        prompt_tokens=made.prompt_tokens,
                        tokens=made.prefix_tokens + made.completion_tokens,
                        finished=made.finished,
                    )
        return [found[index] for index in range(len(records))]

    def log(self, answers: Sequence[KitAnswer], names: Sequence[Mapping[str, object]]) -> None:
        """Append the answers to the sidecar, if there is one; `names` say what each answers (task, doc_id, ...)."""
        if self.router_log is None:
            return
        self.router_log.parent.mkdir(parents=True, exist_ok=True)
        with self.router_log.open("a", encoding="utf-8") as file:
            for made, name in zip(answers, names, strict=True):
                row = {
                    **name,
                    "branch": made.branch,
                    "thinking_probability": made.thinking_probability,
                    "tokens": made.tokens,
                    "finished": made.finished,
                    "digest": answer_digest(made.text),
                }
                file.write(json.dumps(row) + "\n")


def without_answer_tags(text: str) -> str:
    """Remove <answer> and </answer> after the thought; the thought stays."""
    head, close, tail = text.rpartition(THINK_CLOSE)
    return head + close + tail.replace(ANSWER_OPEN, "").replace(ANSWER_CLOSE, "")


def split_thinking(text: str) -> tuple[str, str]:
    """Split an answer into (what is to be judged, the thought), as VLMEvalKit's `thinking` column wants it."""
    parts = parse_response(text)
    if not parts["reasoning_content"] and parts["content"].startswith(THINK_OPEN):
        return "", parts["content"].removeprefix(THINK_OPEN)  # <think> and nothing else: cut at once
    return parts["content"], parts["reasoning_content"]


def answer_digest(text: str) -> str:
    """A digest that survives a spreadsheet: white space and tags do not count."""
    plain = text
    for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE):
        plain = plain.replace(tag, " ")
    return xxhash.xxh64("".join(plain.split()).encode()).hexdigest()


def _system_prompt(value: str | None) -> str | None:
    if value is None:
        return SYSTEM_PROMPT
    if value.lower() == "none" or not value:
        return None
    path = Path(value).expanduser()
    return path.read_text(encoding="utf-8").strip() if len(value) < 1024 and path.is_file() else value

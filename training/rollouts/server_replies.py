"""What a server replied, checked against what it was asked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metis_home.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a reply must agree with."""

    where: str
    """Server and prompt, for messages."""
    prompt_ids: Sequence[int]
    """With every image token."""
    count: int
    max_new_tokens: int
    version: str | None
    """Of the weights that must have sampled every token; None: any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One sampled answer."""

    ids: list[int]
    logprobs: list[float]
    finished: bool
    """Ended by an end token or a stop text, and not by a limit."""


def read_reply(reply: Mapping[str, Any], expected: Expected) -> list[Answer]:
    """The answers of a reply of `/inference/v1/generate`, in order.

    Raises:
        EngineError: other prompt tokens (another tokenizer, image processor or pixel limit), another number of
            answers, tokens without log-probabilities, a context that was too short, or stale weights.
    """
    prompt_ids = reply.get("prompt_token_ids")
    if prompt_ids != list(expected.prompt_ids):
        raise EngineError(_other_prompt(prompt_ids, expected))
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != expected.count:
        found = len(choices) if isinstance(choices, list) else "none"
        raise EngineError(f"{expected.where}: {expected.count} answers were asked for, {found} came")
    ordered = sorted(choices, key=lambda choice: choice.get("index", -1))
    if [choice.get("index") for choice in ordered] != list(range(expected.count)):
        raise EngineError(f"{expected.where}: answers are numbered {[choice.get('index') for choice in choices]}")
    return [_answer(choice, expected) for choice in ordered]


def _answer(choice: Mapping[str, Any], expected: Expected) -> Answer:
    ids = choice.get("token_ids")
    content = (choice.get("logprobs") or {}).get("content")
    if not isinstance(ids, list) or not isinstance(content, list):
        raise EngineError(f"{expected.where}: an answer came without token ids or without log-probabilities")
    if not ids or [entry.get("token_id") for entry in content] != ids:
        raise EngineError(
            f"{expected.where}: an answer has {len(ids)} tokens and {len(content)} log-probabilities; expected one of the "
            "same token for each, and at least one"
        )
    logprobs = [float(entry["logprob"]) for entry in content]
    wrong = next((value for value in logprobs if not -math.inf < value <= 1e-3), None)
    if wrong is not None:
        raise EngineError(f"{expected.where}: a log-probability is {wrong}; expected a number <= 0")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise EngineError(f"{expected.where}: an answer ended with {reason!r}; expected 'stop' or 'length'")
    if len(ids) > expected.max_new_tokens or (reason == "length" and len(ids) < expected.max_new_tokens):
        raise EngineError(
            f"{expected.where}: an answer was cut after {len(ids)} tokens; the limit was {expected.max_new_tokens}. Is the "
            "server's --max-model-len shorter than the prompt and the longest answer?"
        )
    _check_version(choice.get("weight_versions"), expected)
    return Answer(ids=ids, logprobs=logprobs, finished=reason == "stop")


def _check_version(spans: object, expected: Expected) -> None:
    if expected.version is None:
        return
    found = {str(span.get("version")) for span in spans} if isinstance(spans, list) else set()
    if found != {expected.version}:
        raise EngineError(
            f"{expected.where}: tokens were sampled by weights {sorted(found)}, and {expected.version!r} was sent last. "
            "Was the server restarted, or does another trainer update it?"
        )


def _other_prompt(found: object, expected: Expected) -> str:
    wanted = list(expected.prompt_ids)
    if not isinstance(found, list):
        return (
            f"{expected.where}: the reply has no prompt_token_ids. Expected vLLM 0.32, started with --enable-scale-out."
        )
    place = next((n for n, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other), None)
    place = min(len(found), len(wanted)) if place is None else place
    return (
        f"{expected.where}: the server read {len(found)} tokens and the policy {len(wanted)}; the first difference is at "
        f"token {place}. Both need the same tokenizer and the same image processor (min_pixels, max_pixels, patch and merge "
        "size): serve the split of the checkpoint that is trained."
    )

"""Expert answers to the prompts that the model never solves, from a file or from an OpenAI-compatible endpoint.

An expert is believed as little as the model: whoever calls this verifies each answer against the gold.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_home.branch import Branch
from metis_home.errors import DataError, EngineError
from metis_home.media import Message, load_image
from metis_home.responses import parse_response

from ..data.formats import build_response, format_problem

if TYPE_CHECKING:
    from ..data.records import Record


def answers_from_file(path: Path) -> dict[str, list[str]]:
    """Read `{"id": ..., "response": ...}` lines (several per id are tried in order); {id: responses}.

    Raises:
        DataError: the file cannot be read, or a line is none of these.
    """
    found: dict[str, list[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: the expert's answers cannot be read: {error}") from error
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            response = row["response"] if "response" in row else _from_parts(row["reasoning"], row["answer"])
            if not isinstance(response, str):
                raise TypeError(f"response is a {type(response).__name__}")
            found.setdefault(str(row["id"]), []).append(response)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f'{path}, line {number + 1}: expected {{"id": "...", "response": "<think>...</think><answer>...</answer>"}} '
                f"or reasoning and answer; {error!r}"
            ) from error
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertEndpoint:
    """A chat-completions endpoint that speaks OpenAI's protocol."""

    base_url: str
    model: str
    api_key: str = "none"
    tries: int = 1
    """Answers asked for each prompt."""
    max_tokens: int = 8192
    temperature: float = 0.6
    timeout: float = 600.0
    """Seconds per request."""
    concurrency: int = 8

    def answers(self, records: "Sequence[Record]", system_prompt: str | None) -> dict[str, list[str]]:
        """Ask for every record; {id: responses}. Conversations without a system message get `system_prompt`.

        A request that fails after the client's own retries gives no answer for that prompt; if all fail, that is an
        error.

        Raises:
            EngineError: nothing could be had, or the package openai is missing.
        """
        try:
            import openai
        except ImportError as error:
            raise EngineError('an expert endpoint needs the package openai: pip install "metis_home[train]"') from error
        client = openai.OpenAI(base_url=self.base_url, api_key=self.api_key, timeout=self.timeout, max_retries=3)
        failures: list[str] = []

        def ask(record: "Record") -> list[str]:
            try:
                reply = client.chat.completions.create(
                    model=self.model,
                    messages=_openai_messages(record.messages, system_prompt),  # type: ignore[arg-type]
                    n=self.tries,
                    max_tokens=self.max_tokens,
                    temperature=self.temperature,
                )
            except openai.OpenAIError as error:
                failures.append(f"{record.id}: {error}")
                return []
            return [response_of(choice.message.model_dump()) for choice in reply.choices]

        with ThreadPoolExecutor(self.concurrency) as pool:
            answers = list(pool.map(ask, records))
        if records and len(failures) == len(records):
            raise EngineError(f"{self.base_url}: no request succeeded; the first: {failures[0]}")
        return {record.id: found for record, found in zip(records, answers, strict=True) if found}


def response_of(message: Mapping[str, object]) -> str:
    """A chat message in the thinking format: servers give the reasoning apart, or in tags, or not at all."""
    content = str(message.get("content") or "")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if format_problem(content, Branch.THINKING) is None:
        return content
    if isinstance(reasoning, str) and reasoning.strip():
        parts = parse_response(content)
        return build_response(reasoning.strip(), parts["content"].strip(), Branch.THINKING)
    parts = parse_response(content)
    return build_response(parts["reasoning_content"], parts["content"], Branch.THINKING)


def _from_parts(reasoning: object, answer: object) -> str:
    if not isinstance(reasoning, str) or not isinstance(answer, str):
        raise TypeError("reasoning and answer must be texts")
    return build_response(reasoning, answer, Branch.THINKING)


def _openai_messages(messages: list[Message], system_prompt: str | None) -> list[dict[str, Any]]:
    asked = [_openai_message(message) for message in messages]
    if system_prompt is None or messages[0]["role"] == "system":
        return asked
    return [{"role": "system", "content": system_prompt}, *asked]


def _openai_message(message: Message) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    blocks = [
        {"type": "text", "text": block["text"]}
        if block["type"] == "text"
        else {"type": "image_url", "image_url": {"url": _data_url(block["image"])}}
        for block in content  # type: ignore[attr-defined]
    ]
    return {"role": message["role"], "content": blocks}


def _data_url(source: object) -> str:
    buffer = io.BytesIO()
    load_image(source).save(buffer, format="PNG")  # type: ignore[arg-type]
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""HTTP to one vLLM server: tokens in, tokens out, and new weights.

Of the server's endpoints `/inference/v1/generate` is used, because it alone takes token ids together with images and
returns ids, log-probabilities and the version of the weights; `/v1/completions` takes no images, and the chat endpoint
tokenizes again.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metis_home.errors import EngineError

logger = logging.getLogger(__name__)

GENERATE = "/inference/v1/generate"
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_SHOWN = 400  # characters of a server's complaint


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How to talk to a server."""

    timeout_seconds: float = 1800.0
    """Of one request: the longest answer while the server is busy with all others (ours)."""
    tries: int = 4
    """Of one request; a try that failed changes nothing, because every request brings its own seed."""
    backoff_seconds: float = 1.0
    """Before the second try; doubled for each further one, with jitter."""
    concurrency: int = 64
    """Requests at a time and process, over all servers."""


class VLLMClient:
    """One server. Safe in threads.

    Args:
        url: for example http://127.0.0.1:8000; a trailing /v1 is taken off.
        settings: time-outs and tries.
    Environment: VLLM_API_KEY, the server's `--api-key`.
    """

    def __init__(self, url: str, settings: ServerSettings) -> None:
        try:
            import openai
        except ImportError as error:
            raise EngineError(f'a server needs the openai client: pip install "metis_home[train]" ({error})') from error
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise EngineError(f"{url!r} is no address of a server. Expected http://HOST:PORT")
        self.settings = settings
        self._refused, self._error = openai.APIStatusError, openai.APIError
        self._client = openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get("VLLM_API_KEY") or "none",
            timeout=settings.timeout_seconds,
            max_retries=0,  # ours know what may be asked twice
        )
        self._updating = threading.Lock()

    def max_model_len(self) -> int:
        """The longest prompt and answer that the server takes, tokens."""
        models = self._get("/v1/models").get("data")
        length = models[0].get("max_model_len") if isinstance(models, list) and models else None
        if not isinstance(length, int):
            raise EngineError(
                f"{self.url}/v1/models does not say max_model_len: no vLLM server? Found {models!r:.{_SHOWN}}"
            )
        return length

    def generate(self, body: Mapping[str, object]) -> dict[str, Any]:
        """POST a request of `/inference/v1/generate`."""
        return self._post(GENERATE, body)

    def weight_version(self) -> str:
        """The label of the weights that the server computes with."""
        version = self._get("/weight_info").get("weight_version")
        if not isinstance(version, str):
            raise EngineError(f"{self.url}/weight_info does not say weight_version")
        return version

    def load_weights(self, folder: Path, version: str) -> float:
        """Replace the weights by those of `folder`, which the server must be able to read; returns the seconds it took.

        Requests that run are finished first, others wait. Whatever the server remembers of the old weights (prefixes,
        images) is forgotten.

        Raises:
            EngineError: the server refused, or holds other weights now than it should.
        """
        started = time.monotonic()
        with self._updating:
            self._post("/pause?mode=wait", {})
            try:
                self._post("/collective_rpc", _reload(folder))
                self._post("/reset_mm_cache", {})
                self._post("/reset_encoder_cache", {})
                if self._post("/reset_prefix_cache", {}).get("success") is False:
                    raise EngineError(
                        f"{self.url}: the prefix cache cannot be emptied; it holds states of the old weights"
                    )
                self._post("/update_weight_version", {"new_version": version})
            finally:
                self._post("/resume", {})
        if (found := self.weight_version()) != version:
            raise EngineError(
                f"{self.url} has weights {found!r} after it was given {version!r}. Do two trainers share it?"
            )
        return time.monotonic() - started

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _get(self, path: str) -> dict[str, Any]:
        return self._request(path, None)

    def _post(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        return self._request(path, body)

    def _request(self, path: str, body: Mapping[str, object] | None) -> dict[str, Any]:
        """Ask, and ask again where that may help.

        Raises:
            EngineError: unreachable, timed out, refused, or no JSON object in reply.
        """
        reason = ""
        for attempt in range(self.settings.tries):
            if attempt:
                time.sleep(self.settings.backoff_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            try:
                if body is None:
                    reply = self._client.get(path, cast_to=object)
                else:
                    reply = self._client.post(path, body=body, cast_to=object)
            except self._refused as error:
                reason = f"status {error.status_code}: {error.response.text[:_SHOWN]}"
                if error.status_code not in _RETRIED:
                    raise EngineError(f"{self.url}{path} refused: {reason}{_hint(error.status_code, path)}") from error
            except self._error as error:  # no connection, or no answer in time
                reason = f"{type(error).__name__}: {error} ({error.__cause__})"
            except ValueError as error:  # said to be JSON
                raise EngineError(f"{self.url}{path} did not reply with JSON: {error}") from error
            else:
                return self._object(path, reply)
            logger.debug("%s%s, try %d of %d: %s", self.url, path, attempt + 1, self.settings.tries, reason)
        raise EngineError(
            f"{self.url}{path} failed {self.settings.tries} times, at last with {reason}. Is the server up, and "
            f"timeout_seconds ({self.settings.timeout_seconds:g}) enough?"
        )

    def _object(self, path: str, reply: object) -> dict[str, Any]:
        if not reply:
            return {}  # the cache endpoints reply with an empty body
        if not isinstance(reply, dict):
            raise EngineError(f"{self.url}{path} replied with {str(reply)[:_SHOWN]!r}; expected a JSON object")
        return reply


def _reload(folder: Path) -> dict[str, object]:
    return {"method": "reload_weights", "kwargs": {"weights_path": str(folder.absolute())}}


def _hint(status: int, path: str) -> str:
    if status == 404 and path != GENERATE and not path.startswith("/v1/"):
        return ". Start the server with VLLM_SERVER_DEV_MODE=1: its weights can be replaced only then."
    if path == GENERATE and status in (403, 404):
        return ". Start the server with --enable-scale-out (vLLM 0.32)."
    if status in (404, 405):
        return ". Expected a vLLM server."
    if status in (401, 403):
        return ". Set VLLM_API_KEY to the server's --api-key."
    return ""

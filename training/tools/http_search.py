"""Search over HTTP: a JSON endpoint, asked within limits and on a short leash.

    POST {"query": "...", "limit": 3}   ->   {"results": [{"title", "text", "source", "score", "image"}, ...]}

`image` is base64. Redirects are followed to the same host only, and addresses that are not public are refused unless
they are allowed: what the endpoint answers may be chosen by whoever wrote the pages it finds.
"""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

from ...errors import EngineError, ProcessorError
from .python_tool import open_image
from .search import SearchHit

_RETRIED = {429, 500, 502, 503, 504}
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 3
_MAX_IMAGE_PIXELS = 16_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSearch:
    """A search service. All numbers are choices of ours."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 20.0
    """For the whole search, retries included."""
    retries: int = 2
    """After a reply of 429 or 5xx, and after a connection that failed."""
    max_bytes: int = 8 << 20
    allow_private: bool = False
    """Also ask addresses that are not public: this machine, local networks."""

    def __post_init__(self) -> None:
        """Raises EngineError for an address that is not http or https."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EngineError(f"the search address is {self.url!r}. Expected http://HOST/... or https://HOST/...")

    def search(self, query: str, limit: int) -> list[SearchHit]:
        """Ask the service.

        Raises:
            EngineError: not reachable in time, refused, too long, or not an answer.
        """
        body = json.dumps({"query": query, "limit": limit}).encode()
        deadline = time.monotonic() + self.seconds
        for attempt in range(self.retries + 1):
            try:
                status, content = self._ask(body, deadline)
            except (OSError, http.client.HTTPException) as error:
                problem = f"cannot be asked: {type(error).__name__}: {error}"
            else:
                if status == 200:
                    return self._hits(content, limit)
                problem = f"answered with status {status}"
                if status not in _RETRIED:
                    break
            pause = 0.2 * 2**attempt
            if attempt == self.retries or time.monotonic() + pause >= deadline:
                break
            time.sleep(pause)
        raise EngineError(f"{self.url}: the search service {problem} ({attempt + 1} attempts).")

    def _ask(self, body: bytes, deadline: float) -> tuple[int, bytes]:
        url = self.url
        for _ in range(_MAX_REDIRECTS + 1):
            status, location, content = self._exchange(urlsplit(url), body, deadline)
            if status not in _REDIRECTS or not location:
                return status, content
            target = urljoin(url, location)
            if _origin(urlsplit(target)) != _origin(urlsplit(self.url)):
                raise EngineError(
                    f"{self.url}: redirects to {target}, another host. Give that address if you trust it."
                )
            url = target
        raise EngineError(f"{self.url}: redirects more than {_MAX_REDIRECTS} times.")

    def _exchange(self, url: SplitResult, body: bytes, deadline: float) -> tuple[int, str | None, bytes]:
        """One request on one connection to an address that was checked."""
        host, port = str(url.hostname), url.port or (443 if url.scheme == "https" else 80)
        connection = http.client.HTTPConnection(host, port)
        stream = self._connect(host, port, deadline)
        # The socket's own time-out starts anew with every byte; this one does not.
        clock = threading.Timer(_left(deadline), _hang_up, [stream])
        clock.start()
        try:
            if url.scheme == "https":
                stream = ssl.create_default_context().wrap_socket(stream, server_hostname=host)
            connection.sock = stream
            path = (url.path or "/") + (f"?{url.query}" if url.query else "")
            connection.request("POST", path, body, {"Content-Type": "application/json", **self.headers})
            reply = connection.getresponse()
            content = reply.read(self.max_bytes + 1)
            _left(deadline)
            if len(content) > self.max_bytes:
                raise EngineError(f"{self.url}: the answer is longer than {self.max_bytes} bytes.")
            return reply.status, reply.getheader("Location"), content
        finally:
            clock.cancel()
            connection.close()
            stream.close()

    def _connect(self, host: str, port: int, deadline: float) -> socket.socket:
        """Resolve once, check, and connect to what was checked: a name cannot point elsewhere in between."""
        failure: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if not (self.allow_private or ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global):
                raise EngineError(
                    f"{self.url}: {host} is {address[0]}, which is no public address. Set allow_private=True if the "
                    "service is meant to run there."
                )
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(_left(deadline))
                connection.connect(address)
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure or OSError(f"{host} has no address")

    def _hits(self, content: bytes, limit: int) -> list[SearchHit]:
        try:
            results = json.loads(content)["results"]
            return [_hit(result) for result in results[:limit]]
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise EngineError(
                f'{self.url}: the answer is not {{"results": [{{"title", "text"}}, ...]}}: {type(error).__name__}: {error}'
            ) from error


def _hit(result: dict[str, object]) -> SearchHit:
    if not isinstance(result, dict):
        raise TypeError(f"a result is of type {type(result).__name__}")
    image = None
    if result.get("image") is not None:
        try:
            image = open_image(base64.b64decode(str(result["image"]), validate=True), _MAX_IMAGE_PIXELS)
        except (binascii.Error, ProcessorError):
            image = None  # a hit whose image cannot be shown is still a hit
    return SearchHit(
        title=str(result.get("title") or ""),
        text=str(result.get("text") or ""),
        source=str(result.get("source") or ""),
        score=float(result.get("score") or 0.0),  # type: ignore[arg-type]
        image=image,
    )


def _origin(url: SplitResult) -> tuple[str, str | None, int | None]:
    return url.scheme, url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _hang_up(stream: socket.socket) -> None:
    with contextlib.suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time is over")
    return left

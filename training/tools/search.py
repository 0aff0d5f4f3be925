"""Text search and image search: one interface, tools around it; corpora and HTTP services behind it.

A backend returns hits, the tool writes them for the model. `corpus_search` has the local backends, `http_search` the
remote one.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from ...errors import EngineError, ProcessorError
from .protocol import ToolContext, ToolResult, cut_middle, describe, failure

MAX_QUERY_CHARACTERS = 1000  # ours


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchHit:
    """One thing that was found."""

    title: str
    text: str
    """A passage, or the caption of an image."""
    source: str = ""
    score: float = 0.0
    """The backend's own scale; higher is better."""
    image: Image.Image | None = None


class SearchBackend(Protocol):
    """Something that can be asked."""

    def search(self, query: str, limit: int) -> list[SearchHit]:
        """At most `limit` hits, the best first; none where nothing fits.

        Raises:
            EngineError: the service cannot be reached or answers wrongly.
        """


class TextSearchTool:
    """Let the model search text.

    Args:
        hits: how many are shown.
        hit_characters: a longer passage is cut in the middle.
    """

    name = "text_search"

    def __init__(self, backend: SearchBackend, *, hits: int = 3, hit_characters: int = 2000) -> None:
        self.backend, self.hits, self.hit_characters = backend, hits, hit_characters

    @property
    def description(self) -> dict[str, object]:
        """The schema for the chat template."""
        return describe(
            self.name,
            f"Search a collection of texts. Returns up to {self.hits} passages, the best first.",
            {"query": {"type": "string", "description": "What to look for, in words."}},
        )

    def run(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        """Search for `arguments["query"]`; a backend that fails gives a result that says so."""
        return _search(self.backend, str(arguments["query"]), self.hits, self.hit_characters, with_images=False)


class ImageSearchTool:
    """Let the model search images by words; it sees the images and their captions."""

    name = "image_search"

    def __init__(self, backend: SearchBackend, *, hits: int = 2, hit_characters: int = 500) -> None:
        self.backend, self.hits, self.hit_characters = backend, hits, hit_characters

    @property
    def description(self) -> dict[str, object]:
        """The schema for the chat template."""
        return describe(
            self.name,
            f"Search a collection of images by their captions. Returns up to {self.hits} images, the best first.",
            {"query": {"type": "string", "description": "What the image should show, in words."}},
        )

    def run(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        """Search for `arguments["query"]`; a backend that fails gives a result that says so."""
        limit = min(self.hits, context.limits.images)
        return _search(self.backend, str(arguments["query"]), limit, self.hit_characters, with_images=True)


def _search(backend: SearchBackend, query: str, limit: int, hit_characters: int, *, with_images: bool) -> ToolResult:
    start = time.monotonic()
    query = query.strip()
    if not query or len(query) > MAX_QUERY_CHARACTERS:
        return failure(
            "bad_arguments", f"a query has 1 to {MAX_QUERY_CHARACTERS} characters; this one has {len(query)}"
        )
    try:
        hits = backend.search(query, limit) if limit > 0 else []
    except (EngineError, ProcessorError) as error:
        return failure("failed", f"the search failed: {error}", time.monotonic() - start)
    seconds = time.monotonic() - start
    if not hits:
        return ToolResult(text="Nothing was found.", seconds=seconds)
    lines = []
    for number, hit in enumerate(hits, start=1):
        title = f"[{number}] {hit.title}" + (f" ({hit.source})" if hit.source else "")
        lines.append("\n".join(part for part in (title, cut_middle(hit.text.strip(), hit_characters)) if part))
    images = tuple(hit.image for hit in hits if with_images and hit.image is not None)
    return ToolResult(text="\n\n".join(lines), images=images, seconds=seconds)

"""Tools by the names that recipes use.

tools:
  - python
  - python: {wall_seconds: 10, total_bytes: 1073741824}      # options: fields of SandboxLimits
  - text_search: {corpus: facts.jsonl, hits: 3}              # .jsonl, or a folder of text files
  - image_search: {url: "https://search.example/images"}     # or corpus: captions.jsonl
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from ...errors import RecipeError
from .limits import SandboxLimits
from .protocol import Tool, tools_by_name
from .search import ImageSearchTool, SearchBackend, TextSearchTool

_SANDBOX_OPTIONS = tuple(field.name for field in dataclasses.fields(SandboxLimits))
_HTTP_OPTIONS = ("url", "headers", "seconds", "retries", "max_bytes", "allow_private")
_SEARCH_OPTIONS = ("corpus", "hits", "hit_characters", *_HTTP_OPTIONS)
OPTIONS = {"python": _SANDBOX_OPTIONS, "text_search": _SEARCH_OPTIONS, "image_search": _SEARCH_OPTIONS}

ToolSpec = str | Mapping[str, Mapping[str, object]]


def make_tools(specs: Sequence[ToolSpec], *, unsafe_local: bool = False) -> list[Tool]:
    """Make the tools that a recipe lists.

    Raises:
        RecipeError: an unknown tool or option (the message names the nearest), or a search tool without exactly one
            of `corpus` and `url`.
        SandboxError: `python` is listed, no sandbox can be made, and `unsafe_local` is False.
        DataError: a corpus cannot be read.
    """
    tools = [_make(*_split(spec), unsafe_local=unsafe_local) for spec in specs]
    tools_by_name(tools)
    return tools


def _split(spec: ToolSpec) -> tuple[str, dict[str, object]]:
    options: dict[str, object] = {}
    if isinstance(spec, str):
        name = spec
    elif isinstance(spec, Mapping) and len(spec) == 1:
        name = next(iter(spec))
        options = dict(spec[name] or {})
    else:
        raise RecipeError(f"a tool is {spec!r}. Expected a name, or one name with its options.")
    _check_known(name, OPTIONS, "tool")
    for option in options:
        _check_known(option, OPTIONS[name], f"option of the tool {name}")
    return name, options


def _make(name: str, options: dict[str, object], *, unsafe_local: bool) -> Tool:
    if name == "python":
        from .python_tool import PythonTool

        return PythonTool(limits=SandboxLimits(**options), unsafe_local=unsafe_local)  # type: ignore[arg-type]
    shown = {key: cast(int, options.pop(key)) for key in ("hits", "hit_characters") if key in options}
    backend = _backend(name, options)
    return TextSearchTool(backend, **shown) if name == "text_search" else ImageSearchTool(backend, **shown)


def _backend(name: str, options: dict[str, object]) -> SearchBackend:
    if ("corpus" in options) == ("url" in options):
        raise RecipeError(f"the tool {name} needs either `corpus` (a file or folder) or `url` (a service).")
    if "url" in options:
        from .http_search import HttpSearch

        return HttpSearch(**options)  # type: ignore[arg-type]
    if unused := [key for key in options if key != "corpus"]:
        raise RecipeError(f"the tool {name} has a corpus; {', '.join(unused)} belong to a `url`.")
    from .corpus_search import CorpusSearch

    path = Path(str(options["corpus"]))
    if name == "image_search":
        return CorpusSearch.from_captions(path)
    return CorpusSearch.from_folder(path) if path.is_dir() else CorpusSearch.from_jsonl(path)


def _check_known(name: object, known: Iterable[str], what: str) -> None:
    if name not in (names := list(known)):
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}."
        raise RecipeError(f"{name!r} is no {what}. {hint}")

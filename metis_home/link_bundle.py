"""A link bundle: two complete dense checkpoints and a router that together are one two-branch model.

    BUNDLE/metis_home_bundle.json      which directory is which branch, and whose shared weights count
    BUNDLE/config.json, tokenizer ...  those of a two-branch model
    BUNDLE/router.safetensors          the router
    BUNDLE/branches/thinking/          a dense Qwen2.5-VL; stock engines serve it as it is
    BUNDLE/branches/non_thinking/      the other

`metis-home convert --link` makes it of hard links, so no weight is copied. Nothing here imports torch before a bundle
is loaded; the converter reads this file too.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .branch import Branch
from .errors import CheckpointError
from .names import ROUTER_PREFIX, is_dense_ffn, to_branch_name, to_hub_name

BUNDLE_FILE = "metis_home_bundle.json"
ROUTER_FILE = "router.safetensors"
BRANCH_DIRECTORIES = {Branch.THINKING: "branches/thinking", Branch.NON_THINKING: "branches/non_thinking"}
_SINGLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor of the two-branch model lies: a safetensors file, and the name it has there."""

    file: Path
    key: str


def is_bundle(path: str | os.PathLike[str] | None) -> bool:
    """Is `path` a directory that holds a link bundle?"""
    return path is not None and os.path.isfile(os.path.join(path, BUNDLE_FILE))


def bundle_text(shared_from: Branch) -> str:
    """The text of `metis_home_bundle.json`."""
    branches = {branch.label: directory for branch, directory in BRANCH_DIRECTORIES.items()}
    return json.dumps({"format": 1, "branches": branches, "shared_from": shared_from.label}, indent=2) + "\n"


def shared_branch(directory: str | os.PathLike[str]) -> Branch:
    """The branch whose shared weights (attention, norms, embeddings, vision) the bundle's model has.

    Raises:
        CheckpointError: the bundle file is damaged or of another format.
    """
    path = Path(directory, BUNDLE_FILE)
    try:
        value = json.loads(path.read_bytes())
        labels = {branch.label: branch for branch in Branch}
        # the directories are fixed by the format: a path in the file could lead anywhere
        if value["format"] == 1 and value["branches"] == {b.label: d for b, d in BRANCH_DIRECTORIES.items()}:
            return labels[value["shared_from"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{path} is no bundle of format 1. Make it again: metis-home convert --link")


def tensor_places(directory: str | os.PathLike[str]) -> dict[str, TensorPlace]:
    """Return where each tensor of the bundle's two-branch model lies, under its two-branch hub name.

    Raises:
        CheckpointError: a file is missing or is no safetensors file.
    """
    root = Path(directory)
    shared = shared_branch(root)
    places: dict[str, TensorPlace] = {}
    for branch, folder in BRANCH_DIRECTORIES.items():
        for file in _weight_files(root / folder):
            for key in _keys(file):
                name = to_hub_name(key)
                if is_dense_ffn(name):
                    places[to_branch_name(name, branch)] = TensorPlace(file, key)
                elif branch == shared:
                    places[name] = TensorPlace(file, key)
    for key in _keys(root / ROUTER_FILE):
        if not key.startswith(ROUTER_PREFIX):
            raise CheckpointError(f"{root / ROUTER_FILE} holds {key!r}, which is no router tensor.")
        places[key] = TensorPlace(root / ROUTER_FILE, key)
    return places


def load_bundle(cls: Any, directory: str | os.PathLike[str], *model_args: Any, **kwargs: Any) -> Any:
    """What `from_pretrained` does with a bundle: read each tensor lazily from the branch that it belongs to.

    Args:
        cls: a model class of this package.
        directory: the bundle.
        model_args, kwargs: as given to `from_pretrained`.
    """
    from transformers import GenerationConfig

    config = kwargs.pop("config", None)
    if config is None:
        config = cls.config_class.from_pretrained(directory)
    with open_tensors(directory) as tensors:
        result = cls.from_pretrained(None, *model_args, config=config, state_dict=tensors, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    model.config.name_or_path = model.name_or_path = str(directory)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return result


@contextmanager
def open_tensors(directory: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """{two-branch name: lazy slice}, readable while the context is open; the files are mapped, not read."""
    from safetensors import safe_open

    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        tensors = {}
        for name, place in tensor_places(directory).items():
            if place.file not in handles:
                handles[place.file] = stack.enter_context(safe_open(place.file, framework="pt"))
            tensors[name] = handles[place.file].get_slice(place.key)
        yield tensors


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _SINGLE_FILE).is_file():
        return [directory / _SINGLE_FILE]
    try:
        names = sorted(set(json.loads((directory / _INDEX_FILE).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory} has neither {_SINGLE_FILE} nor a readable {_INDEX_FILE} ({error}). Make the bundle again."
        ) from None
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{directory / _INDEX_FILE} names {name!r}, which is no plain .safetensors file name."
            )
    return [directory / name for name in names]


def _keys(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as handle:
            return list(handle.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Make the bundle again.") from None

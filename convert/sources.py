"""From what a user names (a directory, a hub id, an adapter) to an open dense model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .dense import DenseSource, open_dense
from .hub import fetch, is_hub_id
from .writing import Progress

ADAPTER_CONFIG = "adapter_config.json"


@contextmanager
def open_source(
    where: str | Path, *, base: str | Path | None = None, progress: Progress | None = None
) -> Iterator[DenseSource]:
    """Open a dense model or a LoRA adapter of one; closed when the context ends.

    Args:
        where: a directory, or a hub id, with `@revision` if need be.
        base: the dense model under an adapter; None: the one that the adapter names.
        progress: called while downloading.
    Raises:
        CheckpointError: it does not exist, cannot be downloaded, or is no dense Qwen2.5-VL.
    """
    directory, name, revision = locate(where, progress)
    if (directory / ADAPTER_CONFIG).is_file():
        from .lora import open_adapter

        with open_adapter(directory, name, base, progress) as source:
            yield source
        return
    source = open_dense(directory, name=name, revision=revision)
    try:
        yield source
    finally:
        source.checkpoint.close()


def locate(where: str | Path, progress: Progress | None = None) -> tuple[Path, str, str | None]:
    """Return (directory, how to call it, revision), downloading a hub id first."""
    directory = Path(where)
    if not directory.exists() and isinstance(where, str) and is_hub_id(where):
        return fetch(where, progress)
    return directory, directory.resolve().name, None

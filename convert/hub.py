"""Download a checkpoint from a hub: only what a conversion needs, into the usual cache."""

import re
from pathlib import Path

from ..errors import CheckpointError
from .writing import Progress

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*", "NOTICE*"]


def is_hub_id(where: str) -> bool:
    """Does `where` read as `org/name` or `org/name@revision`?"""
    return _HUB_ID.fullmatch(where) is not None and ".." not in where


def fetch(where: str, progress: Progress | None = None) -> tuple[Path, str, str | None]:
    """Download `org/name[@revision]`, or find it in the cache.

    Pickled weights and code are not downloaded.

    Returns:
        (snapshot directory, `org/name`, commit).
    Raises:
        CheckpointError: no such repository or revision, no access, no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = where.partition("@")
    if progress is not None:
        progress(f"downloading {name}", 0, 0)
    try:
        snapshot = Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{where!r} is neither a directory nor a repository on the hub. If it is private or gated, log in with "
            "`hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{where!r} is no directory, is not in the cache, and the hub cannot be reached. Check name and network."
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{where!r} cannot be downloaded: {str(error).splitlines()[0]}") from None
    return snapshot, name, snapshot.name

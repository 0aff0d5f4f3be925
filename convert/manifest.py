"""`metis_home_manifest.json`: what a two-branch directory was made from, and the digest of every file in it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..branch import Branch
from ..errors import CheckpointError
from .journal import Digest
from .output import MANIFEST_FILE, Written
from .plan import json_bytes
from .strict_json import Json, parse_object

FORMAT = 1
ORIGINALS = "metis_home_originals"


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchRecord:
    """One source, as it can be given back.

    `files` and `headers` map a name in the source directory to the path, below the two-branch directory, where its
    bytes are kept: the output's own file where that is unchanged, else one below `metis_home_originals/`.
    """

    source: str
    """Hub id or directory name."""
    revision: str | None
    adapter: str | None
    exact: bool
    """Whether the branch's weights are the source's, bit for bit: no cast, no adapter, no foreign shared part."""
    digest: str
    """XXH3-128 over name, dtype, shape and digest of each tensor of the branch as a dense model."""
    files: dict[str, str]
    headers: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The record of one conversion."""

    path: Path
    """The two-branch directory."""
    fingerprint: str
    version: str
    options: dict[str, Json]
    branches: dict[Branch, BranchRecord]
    shared_mismatch: list[dict[str, Json]]
    """Shared tensors in which the sources differ: name, relative_norm, max_abs."""
    shards: dict[str, Digest]
    files: dict[str, Digest]
    notices: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """The text of the file."""
        return json_bytes(
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "metis_home": self.version,
                "options": self.options,
                "branches": {
                    branch.label: {
                        "source": record.source,
                        "revision": record.revision,
                        "adapter": record.adapter,
                        "exact": record.exact,
                        "digest": record.digest,
                        "files": record.files,
                        "headers": record.headers,
                    }
                    for branch, record in self.branches.items()
                },
                "shared_mismatch": self.shared_mismatch,
                "shards": {
                    name: {"size": d.size, "xxh3_128": d.xxh3_128, "tensors": d.tensors}
                    for name, d in self.shards.items()
                },
                "files": {name: {"size": d.size, "xxh3_128": d.xxh3_128} for name, d in self.files.items()},
                "notices": list(self.notices),
            }
        )

    @classmethod
    def read(cls, directory: Path | str) -> "Manifest":
        """Read the manifest of the two-branch directory.

        Raises:
            CheckpointError: there is none, or it is not one that this version understands.
        """
        directory = Path(directory)
        label = str(directory / MANIFEST_FILE)
        try:
            data = (directory / MANIFEST_FILE).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{label} cannot be read: {error.strerror}. Only `metis-home convert` writes one; a model that was "
                "saved after training has none."
            ) from None
        return cls.parse(data, directory)

    @classmethod
    def parse(cls, data: bytes, directory: Path) -> "Manifest":
        """Read a manifest from its text; raises CheckpointError as `read`."""
        label = str(directory / MANIFEST_FILE)
        value = parse_object(data, label)
        if value.get("format") != FORMAT:
            raise CheckpointError(f"{label} has format {value.get('format')!r}; this version reads {FORMAT}.")
        try:
            return cls._from(json.loads(data), directory)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{label} is damaged: {error!r}. Convert again.") from None

    @classmethod
    def _from(cls, value: dict, directory: Path) -> "Manifest":
        branches = {branch: BranchRecord(**value["branches"][branch.label]) for branch in reversed(Branch)}
        return cls(
            path=directory,
            fingerprint=value["fingerprint"],
            version=value["metis_home"],
            options=value["options"],
            branches=branches,
            shared_mismatch=value["shared_mismatch"],
            shards={name: Digest(**entry) for name, entry in value["shards"].items()},
            files={name: Digest(**entry) for name, entry in value["files"].items()},
            notices=tuple(value["notices"]),
        )


def branch_digest(tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """Digest a dense model whatever its shards and their order.

    Args:
        tensors: {hub name: (dtype, shape, XXH3-128 of the bytes)}.
    """
    digest = xxhash.xxh3_128()
    for name, (dtype, shape, of_bytes) in sorted(tensors.items()):
        digest.update(f"{name} {dtype} {list(shape)} {of_bytes}\n".encode())
    return digest.hexdigest()


def tensor_digests(written: Written) -> dict[str, str]:
    """{tensor: XXH3-128} over all shards."""
    return {name: of_bytes for shard in written.shards.values() for name, of_bytes in shard.tensors.items()}

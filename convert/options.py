"""The options of a conversion, checked before anything is opened."""

import re
from dataclasses import asdict, dataclass
from typing import Literal

from ..config_fields import ROOT_FIELDS
from ..errors import CheckpointError
from ..router_layout import POOLINGS
from .floats import DTYPE_NAMES
from .plan import DEFAULT_SHARD_BYTES
from .strict_json import Json

DtypeOption = Literal["keep", "bf16", "fp16", "fp32"]
SharedFrom = Literal["thinking", "non-thinking", "average"]
DEFAULT_SEED = 17
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What decides the bytes of the output, beside the sources."""

    dtype: DtypeOption = "keep"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    seed: int = DEFAULT_SEED
    allow_shared_mismatch: bool = False
    shared_from: SharedFrom = "thinking"
    router_hidden_size: int = int(ROOT_FIELDS["router_hidden_size"])
    router_pooling: str = str(ROOT_FIELDS["router_pooling"])

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, ("keep", *DTYPE_NAMES))
        _one_of("shared_from", self.shared_from, ("thinking", "non-thinking", "average"))
        _one_of("router_pooling", self.router_pooling, POOLINGS)
        for name in ("max_shard_bytes", "router_hidden_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be a positive whole number; found {getattr(self, name)!r}.")
        if type(self.seed) is not int or self.seed < 0:
            raise CheckpointError(f"seed must be a whole number from 0; found {self.seed!r}.")

    def to_json(self) -> dict[str, Json]:
        """For the manifest and the fingerprint."""
        return asdict(self)


def parse_size(text: str | int) -> int:
    """Bytes from `5GB`, `500 MiB` or a number.

    Raises:
        CheckpointError: something else, or less than one byte.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]{0,3})\s*", str(text))
        if match is None or match[2].upper() not in _UNITS:
            raise CheckpointError(
                f"a size is a number with B, KB, MB, GB, KiB, MiB or GiB, such as 5GB; found {text!r}."
            )
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise CheckpointError(f"a shard needs at least one byte; found {text!r}.")
    return size


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise CheckpointError(f"{name} must be one of {', '.join(allowed)}; found {value!r}.")

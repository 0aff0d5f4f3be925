"""A LoRA adapter as a source: its product is added to the dense weights while they stream by.

    W' = W + s B A,   s = lora_alpha / r,  or lora_alpha / sqrt(r) with use_rslora

computed in float32 and rounded once to the type of W. Only the rows of W that are being written are in memory, beside
A and B.
Source: LoRA (arXiv 2106.09685), equation 3; rsLoRA (arXiv 2312.03732). File layout: PEFT 0.18 to 0.21.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError
from ..names import to_hub_name
from .checkpoint import Checkpoint, StoredTensor
from .contents import Content
from .dense import DenseSource, open_dense
from .files import open_inside
from .floats import FLOAT_BYTES, from_float32, to_float32
from .header import read_header
from .strict_json import Json, parse_object
from .writing import Progress

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
_BLOCK_BYTES = 4 * 2**20  # float32 rows that are folded at a time
# Fields whose value changes what the adapter means, and the only values that are folded here.
_ONLY: dict[str, tuple[Json, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
}


@dataclass(frozen=True, slots=True)
class Folded:
    """`base` plus the product of two small matrices; `down` is A (rank, columns), `up` is B (rows, rank)."""

    base: StoredTensor
    down: StoredTensor
    up: StoredTensor
    scale: float

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def size(self) -> int:
        return self.base.size

    def chunks(self) -> Iterator[bytes | memoryview]:
        rows, columns = self.shape
        rank = self.down.shape[0]
        down_RC = to_float32(b"".join(self.down.chunks()), self.down.dtype).reshape(rank, columns)
        up_FR = to_float32(b"".join(self.up.chunks()), self.up.dtype).reshape(rows, rank)
        width = columns * FLOAT_BYTES[self.dtype]
        step = max(1, _BLOCK_BYTES // (4 * columns))
        for row in range(0, rows, step):
            count = min(step, rows - row)
            data = self.base.file.read_range(self.base.offset + row * width, count * width)
            block = up_FR[row : row + count] @ down_RC
            block *= self.scale
            block += to_float32(data, self.dtype).reshape(count, columns)
            yield from_float32(block.reshape(-1), self.dtype).data.cast("B")

    def identity(self) -> list[Json]:
        parts: list[Json] = [part.identity() for part in (self.base, self.down, self.up)]
        return ["folded", self.scale, *parts]


@contextmanager
def open_adapter(
    directory: Path, name: str, base: str | Path | None, progress: Progress | None
) -> Iterator[DenseSource]:
    """Open a LoRA adapter and the dense model under it as one dense model; closed when the context ends.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        name: how to call the adapter in errors.
        base: the dense model; None: what the adapter's config names.
        progress: called while downloading.
    Raises:
        CheckpointError: an adapter of a kind that is not folded here, or one that does not fit the model.
    """
    from .sources import locate

    with ExitStack() as stack:
        adapter = Checkpoint(path=directory)
        stack.callback(adapter.close)
        adapter.small_files["adapter_config.json"] = open_inside(directory, "adapter_config.json")
        config = parse_object(adapter.small_files["adapter_config.json"].read(), f"{directory / 'adapter_config.json'}")
        _check_kind(config, directory)
        under = base if base is not None else config.get("base_model_name_or_path")
        if not isinstance(under, str | Path) or not str(under):
            raise CheckpointError(f"{directory} does not name its base model. Give it with --base.")
        where, base_name, revision = locate(under, progress)
        if not where.is_dir():
            raise CheckpointError(f"{directory}: its base model {str(under)!r} is not there. Give it with --base.")
        dense = open_dense(where, name=base_name, revision=revision)
        stack.callback(dense.checkpoint.close)
        _open_weights(adapter)
        yield replace(dense, tensors=_fold(dense, adapter, config), adapter=adapter)


def _check_kind(config: dict[str, Json], directory: Path) -> None:
    for field, allowed in _ONLY.items():
        if field in config and config[field] not in allowed:
            raise CheckpointError(
                f"{directory}: {field} = {config[field]!r} is not folded here. Merge the adapter with PEFT "
                "(model.merge_and_unload().save_pretrained(DIR)) and convert DIR."
            )
    if "peft_type" not in config:
        raise CheckpointError(f"{directory / 'adapter_config.json'} has no peft_type. Is this a LoRA adapter?")


def _open_weights(adapter: Checkpoint) -> None:
    directory = adapter.path
    if not (directory / ADAPTER_WEIGHTS).exists():
        raise CheckpointError(
            f"{directory} has no {ADAPTER_WEIGHTS}; pickled weights are never read. Save the adapter as safetensors."
        )
    file = open_inside(directory, ADAPTER_WEIGHTS)
    adapter.shards[ADAPTER_WEIGHTS] = file
    header = read_header(file.fd, str(directory / ADAPTER_WEIGHTS))
    for entry in header.entries:
        adapter.tensors[entry.name] = StoredTensor(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            file=file,
            offset=header.data_start + entry.begin,
            size=entry.end - entry.begin,
        )


def _fold(dense: DenseSource, adapter: Checkpoint, config: dict[str, Json]) -> dict[str, Content]:
    factors: dict[str, dict[str, StoredTensor]] = {}
    for key, stored in adapter.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None or not key.startswith(_PREFIX):
            raise CheckpointError(
                f"{adapter.path}: {key!r} is no LoRA factor of a linear layer. Merge it with PEFT first."
            )
        factors.setdefault(match["module"].removeprefix(_PREFIX), {})[match["factor"]] = stored
    if not factors:
        raise CheckpointError(f"{adapter.path / ADAPTER_WEIGHTS} holds no tensors.")
    tensors = dict(dense.tensors)
    for module, pair in factors.items():
        name = to_hub_name(f"{module}.weight")
        base = tensors.get(name)
        if not isinstance(base, StoredTensor):
            raise CheckpointError(f"{adapter.path}: the adapter changes {name!r}, which {dense.path} has not.")
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{adapter.path}: {module!r} has lora_{min(pair)} only. Is the file complete?")
        down, up = pair["A"], pair["B"]
        rank = down.shape[0] if down.shape else 0
        if len(base.shape) != 2 or down.shape != (rank, base.shape[1]) or up.shape != (base.shape[0], rank) or not rank:
            raise CheckpointError(
                f"{adapter.path}: factors {list(up.shape)} and {list(down.shape)} do not fit {name!r}, "
                f"{list(base.shape)}. Is {dense.path} the adapter's base model?"
            )
        for factor in (down, up):
            if factor.dtype not in FLOAT_BYTES:
                raise CheckpointError(f"{adapter.path}: {factor.name!r} is {factor.dtype}, no float type read here.")
        tensors[name] = Folded(base=base, down=down, up=up, scale=_scale(config, module, rank, adapter.path))
    return tensors


def _scale(config: dict[str, Json], module: str, rank: int, path: Path) -> float:
    alpha, wanted = _of(config, "lora_alpha", "alpha_pattern", module), _of(config, "r", "rank_pattern", module)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(f"{path}: lora_alpha must be a number; found {alpha!r}.")
    if wanted != rank:
        raise CheckpointError(f"{path}: {module!r} has rank {rank}, adapter_config.json says {wanted!r}.")
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _of(config: dict[str, Json], field: str, patterns: str, module: str) -> Json:
    """The value for `module`: of the first pattern that names the end of its path, else the general one.

    PEFT reads patterns as regular expressions; only plain names are read here, since a stranger's expression can hang.
    """
    special = config.get(patterns)
    for pattern, value in special.items() if isinstance(special, dict) else ():
        name = pattern.replace("\\.", ".")
        if not re.fullmatch(r"\^?[\w.]+", name):
            raise CheckpointError(f"{patterns} has {pattern!r}; only plain module names are read. Merge it with PEFT.")
        if module == name.removeprefix("^") or (not name.startswith("^") and module.endswith("." + name)):
            return value
    return config.get(field)

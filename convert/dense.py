"""A dense Qwen2.5-VL checkpoint as a source: opened, checked to be complete, its tensors named in the hub layout."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..config_fields import MODEL_TYPE
from ..errors import CheckpointError
from ..names import is_dense_ffn, to_hub_name
from .checkpoint import Checkpoint, open_checkpoint
from .contents import Content
from .floats import FLOAT_BYTES
from .schema import DENSE_MODEL_TYPE, EMBEDDING, HEAD, DenseShape, read_shape
from .strict_json import Json


@dataclass(frozen=True, slots=True)
class DenseSource:
    """One dense model. `tensors` have hub names and are in the order of the files."""

    name: str
    """How to call it in reports: the hub id, or the name of its directory (never a path of this machine)."""
    revision: str | None
    checkpoint: Checkpoint
    config: dict[str, Json]
    shape: DenseShape
    tensors: Mapping[str, Content]
    adapter: Checkpoint | None = None

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def ffn_names(self) -> list[str]:
        """The text-decoder FFN weights: what a branch has of its own."""
        return [name for name in self.tensors if is_dense_ffn(name)]

    def shared_names(self) -> list[str]:
        """Everything else."""
        return [name for name in self.tensors if not is_dense_ffn(name)]


def open_dense(directory: Path, *, name: str | None = None, revision: str | None = None) -> DenseSource:
    """Open and check the dense checkpoint in `directory`; its files stay open until `checkpoint.close()`.

    Raises:
        CheckpointError: another architecture, a quantised model, missing or unknown or misshapen tensors, or anything
            `open_checkpoint` refuses.
    """
    # the config first: of another architecture nothing else needs to be looked at
    with open_checkpoint(directory, weights=False) as first_look:
        config = first_look.read_object("config.json")
    check_architecture(config, directory)
    shape = read_shape(config, str(directory / "config.json"))
    checkpoint = open_checkpoint(directory)
    try:
        tensors = _named(checkpoint)
        check_tensors(tensors, shape, str(directory))
        tensors = _without_redundant_head(tensors, shape, directory)
    except BaseException:
        checkpoint.close()
        raise
    return DenseSource(
        name=name or directory.resolve().name,
        revision=revision,
        checkpoint=checkpoint,
        config=config,
        shape=shape,
        tensors=tensors,
    )


def check_architecture(config: dict[str, Json], directory: Path) -> None:
    """Raise CheckpointError unless `config` is that of a dense, unquantised Qwen2.5-VL."""
    found = config.get("model_type")
    if found == MODEL_TYPE:
        raise CheckpointError(
            f"{directory} already has two branches. To get a dense model out of it: "
            f"metis-home split {directory} OUT --branch thinking"
        )
    if found != DENSE_MODEL_TYPE:
        raise CheckpointError(
            f"{directory}: expected model_type {DENSE_MODEL_TYPE!r} in config.json, found {found!r}. "
            "Only dense Qwen2.5-VL checkpoints can become branches."
        )
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{directory} is quantised. Convert the unquantised model, split it, and quantise each branch."
        )


def check_tensors(tensors: Mapping[str, Content], shape: DenseShape, label: str) -> None:
    """Raise CheckpointError unless `tensors` are exactly those of a dense model of this `shape`, as floats."""
    expected = shape.tensors()
    if not shape.tied and HEAD not in tensors and EMBEDDING in tensors:
        raise CheckpointError(
            f"{label} has no {HEAD}, and config.json does not say that it is tied to the embeddings. Set "
            "'tie_word_embeddings' to true in config.json if it is; else the download is incomplete."
        )
    optional = {HEAD: (shape.vocab_size, shape.hidden_size)}  # saved by some although it is tied
    unknown = [name for name in tensors if name not in expected and name not in optional]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(expected), n=1)
        hint = f" Did its writer mean {near[0]!r}?" if near else ""
        raise CheckpointError(
            f"{label} has {len(unknown)} tensors that Qwen2.5-VL has not, first {unknown[0]!r}.{hint} "
            "They would be lost, so nothing was written."
        )
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{label} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}. Is the download complete?"
        )
    for name, tensor in tensors.items():
        want = expected.get(name) or optional[name]
        if tensor.shape != want:
            raise CheckpointError(
                f"{label}: {name!r} has shape {list(tensor.shape)}, config.json makes it {list(want)}. "
                "Do the config and the weights belong together?"
            )
        if tensor.dtype not in FLOAT_BYTES:
            raise CheckpointError(
                f"{label}: {name!r} is {tensor.dtype}; only BF16, F16 and F32 are converted. "
                "Is this a quantised model? Convert the unquantised one."
            )


def _named(checkpoint: Checkpoint) -> dict[str, Content]:
    tensors: dict[str, Content] = {}
    for name, stored in checkpoint.tensors.items():
        hub_name = to_hub_name(name)
        if hub_name in tensors:
            raise CheckpointError(
                f"{checkpoint.path}: {hub_name!r} is there in both key layouts, once as {name!r}. Save the model again."
            )
        tensors[hub_name] = replace(stored, name=hub_name)
    return tensors


def _without_redundant_head(tensors: dict[str, Content], shape: DenseShape, directory: Path) -> dict[str, Content]:
    """Drop a head that is stored although it is tied; refuse one that differs from the embeddings."""
    if not shape.tied or HEAD not in tensors:
        return tensors
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    same = head.dtype == embedding.dtype and all(
        one == other for one, other in zip(head.chunks(), embedding.chunks(), strict=True)
    )
    if not same:
        raise CheckpointError(
            f"{directory}: config.json ties the head to the embeddings, but {HEAD} differs from {EMBEDDING}. "
            "Set 'tie_word_embeddings' to false in config.json if the head was trained; else remove it."
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}

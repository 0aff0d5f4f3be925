"""A two-branch checkpoint as a source: what `split` and `verify` read; from `upcycle`, or trained and saved again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..branch import Branch
from ..config_fields import MODEL_TYPE, ROOT_FIELDS
from ..errors import CheckpointError
from ..names import ROUTER_PREFIX, branch_of, is_dense_ffn, to_branch_name, to_dense_name, to_hub_name
from ..router_layout import POOLINGS, router_tensors
from .checkpoint import Checkpoint, StoredTensor, open_checkpoint
from .dense import check_tensors
from .manifest import Manifest
from .output import MANIFEST_FILE
from .schema import DenseShape, read_shape
from .strict_json import Json


@dataclass(frozen=True, slots=True)
class TwoBranchSource:
    """An open two-branch checkpoint. `tensors` have the names of the two-branch hub layout."""

    checkpoint: Checkpoint
    config: dict[str, Json]
    shape: DenseShape
    tensors: Mapping[str, StoredTensor]
    manifest: Manifest | None

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def branch_tensors(self, branch: Branch) -> dict[str, StoredTensor]:
        """The dense model of `branch`, under the names it has in the hub layout."""
        tensors = {}
        for name, stored in self.tensors.items():
            if not name.startswith(ROUTER_PREFIX) and branch_of(name) in (None, branch):
                dense_name = to_dense_name(name)
                tensors[dense_name] = replace(stored, name=dense_name)
        return tensors


def open_two_branch(directory: Path) -> TwoBranchSource:
    """Open and check the two-branch checkpoint in `directory`.

    Raises:
        CheckpointError: another model, missing, unknown or misshapen tensors, or whatever `open_checkpoint` refuses.
    """
    with open_checkpoint(directory, weights=False) as first_look:
        config = first_look.read_object("config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{directory}: expected model_type {MODEL_TYPE!r} in config.json, found {config.get('model_type')!r}. "
            "A dense model has one branch only: there is nothing to take out of it."
        )
    shape = read_shape(config, str(directory / "config.json"))
    checkpoint = open_checkpoint(directory)
    try:
        tensors: dict[str, StoredTensor] = {}
        for name, stored in checkpoint.tensors.items():
            hub_name = name if name.startswith(ROUTER_PREFIX) else to_hub_name(name)
            tensors[hub_name] = replace(stored, name=hub_name)
        if len(tensors) != len(checkpoint.tensors):
            raise CheckpointError(f"{directory} holds tensors in both key layouts. Save the model again.")
        manifest_file = checkpoint.small_files.get(MANIFEST_FILE)
        manifest = Manifest.parse(manifest_file.read(), directory) if manifest_file else None
        source = TwoBranchSource(checkpoint=checkpoint, config=config, shape=shape, tensors=tensors, manifest=manifest)
        _check(source)
    except BaseException:
        checkpoint.close()
        raise
    return source


def _check(source: TwoBranchSource) -> None:
    label = str(source.path)
    for branch in Branch:
        check_tensors(source.branch_tensors(branch), source.shape, f"{label}, branch {branch.label},")
    width, pooling = (source.config.get(name, ROOT_FIELDS[name]) for name in ("router_hidden_size", "router_pooling"))
    if type(width) is not int or not 0 < width <= 2**20 or pooling not in POOLINGS:
        raise CheckpointError(f"{label}: config.json has router_hidden_size {width!r} and router_pooling {pooling!r}.")
    expected = {
        ROUTER_PREFIX + name: init.shape
        for name, init in router_tensors(source.shape.hidden_size, width, str(pooling)).items()
    }
    found = {name: stored.shape for name, stored in source.tensors.items() if name.startswith(ROUTER_PREFIX)}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{label}: {name!r} has shape {found.get(name)}, config.json makes it {expected.get(name)}."
            )
    for name in source.tensors:
        branch_number = branch_of(name)
        if branch_number is not None and branch_number not in tuple(Branch):
            raise CheckpointError(f"{label}: {name!r} belongs to branch {branch_number}; there are only 0 and 1.")


def two_branch_name(dense_name: str, branch: Branch) -> str:
    """Where the tensor of a dense model lies in a two-branch one."""
    return to_branch_name(dense_name, branch) if is_dense_ffn(dense_name) else dense_name

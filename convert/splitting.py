"""One branch of a two-branch checkpoint -> a dense checkpoint that stock engines serve."""

import os
from pathlib import Path
from typing import Literal

from ..branch import Branch
from ..errors import CheckpointError
from ..link_bundle import is_bundle
from ..names import to_hub_name
from .checkpoint import INDEX_FILE, StoredTensor
from .config_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    PROCESSOR_FILES,
    dense_config,
    dense_generation,
    with_processor_class,
)
from .disk import Disk
from .files import OpenFile, open_inside
from .header import encode_header, parse_header
from .manifest import ORIGINALS, BranchRecord
from .options import parse_size
from .output import MANIFEST_FILE, Written, check_target, write_output
from .plan import Plan, PlannedFile, PlannedShard, file_identities, fingerprint, json_bytes, lay_out, shard_of
from .schema import EMBEDDING, HEAD
from .small_files import CARD_FILE
from .strict_json import Json
from .two_branch import TwoBranchSource, open_two_branch
from .upcycling import check_apart, silent
from .writing import Progress, digest_of

BranchName = Literal["thinking", "non-thinking"]
Layout = Literal["hub", "source"]


def split(
    two_branch_dir: str | Path,
    out_dir: str | Path,
    branch: BranchName | Branch = "thinking",
    *,
    layout: Layout = "hub",
    max_shard_size: str | int = "5GB",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    disk: Disk | None = None,
) -> Path:
    """Make the dense Qwen2.5-VL checkpoint of one branch at `out_dir`; every weight is copied bit for bit.

    What `upcycle` changed is undone: config, generation and processor files are the source's own bytes again, and the
    weights are distributed over files as the source had them. After training, files that changed are translated.

    Args:
        two_branch_dir: what `upcycle` made, or a two-branch model that was saved later.
        out_dir: directory to make; its parent must exist.
        branch: which one.
        layout: `hub` names the tensors as every engine knows them; `source` as the source had them.
        max_shard_size: bytes per file, where the files of the source cannot be restored.
        resume, overwrite, progress, disk: as in `upcycle`.
    Returns:
        `out_dir`.
    Raises:
        CheckpointError: no two-branch checkpoint, or a damaged one.
        OutputError: `out_dir` cannot be written.
    """
    chosen = as_branch(branch)
    if layout not in ("hub", "source"):
        raise CheckpointError(f"layout must be 'hub' or 'source'; found {layout!r}.")
    model, out = Path(two_branch_dir), Path(out_dir)
    if is_bundle(model):
        raise CheckpointError(
            f"{model} is a link bundle: its branches lie in {model / 'branches'} as complete dense checkpoints. "
            "Use or copy them."
        )
    max_bytes = parse_size(max_shard_size)
    check_target(out, overwrite=overwrite, resume=resume)
    check_apart(out, model)
    source = open_two_branch(model)
    try:
        plan = _Planner(source, chosen, layout, max_bytes).plan()

        def late_files(written: Written) -> list[PlannedFile]:
            index = plan.index()
            has_one = any(file.name == INDEX_FILE for file in plan.files)
            return [] if index is None or has_one else [PlannedFile(INDEX_FILE, index)]

        write_output(plan, out, late_files, resume=resume, overwrite=overwrite, progress=progress, disk=disk or Disk())
    finally:
        source.checkpoint.close()
    return out


def as_branch(branch: str | int) -> Branch:
    """The branch that is meant by its label or its number.

    Raises:
        CheckpointError: neither.
    """
    for member in Branch:
        if branch == member.label or (not isinstance(branch, bool) and branch == member):
            return member
    raise CheckpointError(f"a branch is 'thinking' or 'non-thinking'; found {branch!r}.")


class _Planner:
    """Plans one split. A class because each step asks whether the files are still what the manifest says."""

    def __init__(self, source: TwoBranchSource, branch: Branch, layout: Layout, max_bytes: int) -> None:
        self.source, self.branch, self.layout, self.max_bytes = source, branch, layout, max_bytes
        self.tensors = source.branch_tensors(branch)
        self.record: BranchRecord | None = source.manifest.branches[branch] if source.manifest else None

    def plan(self) -> Plan:
        shards, restored = self._restored_shards()
        if not shards:
            shards = lay_out(self.tensors.items(), self.max_bytes)
        files = self._files(with_index=restored)
        identities = file_identities(self.source.checkpoint.shards.values())
        parts: list[Json] = ["dense", self.branch.label, self.layout, self.max_bytes, identities]
        mark = fingerprint(parts, shards, files)
        return Plan(kind="dense", shards=shards, files=tuple(files), fingerprint=mark)

    def _restored_shards(self) -> tuple[tuple[PlannedShard, ...], bool]:
        """The shards as the source had them, and whether their bytes will be the source's; () if that cannot be."""
        if self.record is None or not self.record.headers:
            return (), False
        shards: list[PlannedShard] = []
        placed: set[str] = set()
        same_names = True
        for name, kept in self.record.headers.items():
            raw = self._kept(kept)
            if raw is None:
                return (), False
            header = parse_header(raw, None, f"{self.source.path / kept}")
            entries: list[tuple[str, StoredTensor]] = []
            for entry in header.entries:
                dense_name = to_hub_name(entry.name)
                # a head that was stored although it is tied: the same bytes as the embeddings
                same_as = EMBEDDING if dense_name == HEAD and HEAD not in self.tensors else dense_name
                tensor = self.tensors.get(same_as)
                if tensor is None or (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
                    return (), False
                placed.add(same_as)
                same_names &= entry.name == dense_name
                entries.append((entry.name if self.layout == "source" else dense_name, tensor))
            unchanged = all(entry.name == written for entry, (written, _) in zip(header.entries, entries, strict=True))
            bytes_ = raw if unchanged else encode_header(((n, t.dtype, t.shape) for n, t in entries), header.metadata)
            shards.append(shard_of(name, list(entries), header.metadata, bytes_))
        if placed != set(self.tensors):
            return (), False
        return tuple(shards), self.layout == "source" or same_names

    def _files(self, *, with_index: bool) -> list[PlannedFile]:
        small = self.source.checkpoint.small_files
        if self.record is not None and self._is_unchanged(CONFIG_FILE):
            names = {name: kept for name, kept in self.record.files.items() if with_index or name != INDEX_FILE}
            files = [self._restore(name, kept) for name, kept in names.items()]
            return [file for file in files if file is not None]
        skipped = {CARD_FILE, INDEX_FILE, MANIFEST_FILE}
        names = {name: name for name in small if name not in skipped and not name.endswith(".py")}
        return [PlannedFile(name, self._translated(name)) for name in names]

    def _restore(self, name: str, kept: str) -> PlannedFile | None:
        """The source's own file, unless the two-branch one was changed since or holds another float type."""
        small = self.source.checkpoint.small_files
        cast = self.source.manifest is not None and self.source.manifest.options.get("dtype") != "keep"
        stays = name in small and (not self._is_unchanged(name) or (cast and name == CONFIG_FILE))
        if stays and name not in (CARD_FILE, INDEX_FILE):
            return PlannedFile(name, self._translated(name))
        if kept in small:
            return PlannedFile(name, small[kept])
        content = self._kept(kept)
        return None if content is None else PlannedFile(name, content)

    def _translated(self, name: str) -> bytes | OpenFile:
        checkpoint = self.source.checkpoint
        if name == CONFIG_FILE:
            return json_bytes(dense_config(self.source.config))
        if name == GENERATION_FILE:
            return json_bytes(dense_generation(checkpoint.read_object(name)))
        if name in PROCESSOR_FILES:
            content = checkpoint.read_object(name)
            changed = with_processor_class(content, "dense")
            return json_bytes(changed) if changed is not content else checkpoint.small_files[name]
        return checkpoint.small_files[name]

    def _is_unchanged(self, name: str) -> bool:
        """Is the file of the two-branch directory still the one that `upcycle` wrote?"""
        manifest, file = self.source.manifest, self.source.checkpoint.small_files.get(name)
        if manifest is None or file is None or name not in manifest.files:
            return False
        return digest_of(file.fd, file.size).xxh3_128 == manifest.files[name].xxh3_128

    def _kept(self, relative: str) -> bytes | None:
        """The bytes that the manifest keeps at `relative`; None if they are gone or were changed."""
        assert self.source.manifest is not None
        *folders, name = relative.split("/")
        if folders and folders != [ORIGINALS, self.branch.label] and folders != [ORIGINALS, "thinking"]:
            raise CheckpointError(f"{self.source.path / MANIFEST_FILE} names {relative!r}, which no conversion keeps.")
        recorded = self.source.manifest.files.get(relative)
        directory = self.source.path.joinpath(*folders)
        if not directory.resolve().is_relative_to(self.source.path.resolve()):
            raise CheckpointError(f"{directory} is a link that leads outside the checkpoint. Copy the files into it.")
        if recorded is None or not os.path.lexists(directory / name):
            return None
        file = open_inside(directory, name)
        try:
            same = digest_of(file.fd, file.size).xxh3_128 == recorded.xxh3_128
            return file.read() if same else None
        finally:
            os.close(file.fd)

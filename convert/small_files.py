"""Small files travel too: tokenizer, processor, templates, licence. Some are rewritten; their originals are kept."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..branch import Branch
from .checkpoint import INDEX_FILE
from .config_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    PROCESSOR_FILES,
    two_branch_config,
    two_branch_generation,
    with_processor_class,
)
from .dense import DenseSource
from .files import OpenFile
from .manifest import ORIGINALS
from .output import MANIFEST_FILE
from .plan import PlannedFile, json_bytes
from .strict_json import Json

CARD_FILE = "README.md"
_REPLACED = (CARD_FILE, INDEX_FILE, MANIFEST_FILE)


@dataclass(slots=True)
class SmallFiles:
    """The small files of a two-branch output and, per branch, where each file of the source is kept."""

    files: list[PlannedFile] = field(default_factory=list)
    origins: dict[Branch, dict[str, str]] = field(default_factory=dict)
    headers: dict[Branch, dict[str, str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def plan_small_files(
    thinking: DenseSource,
    non_thinking: DenseSource,
    *,
    dtype: str | None,
    router: dict[str, Json],
) -> SmallFiles:
    """Plan every file of the output that is no weight, except card, index and manifest.

    Tokenizer, processor and configs are the thinking source's. What is rewritten, and what the non-thinking source has
    otherwise, is kept below `metis_home_originals/`, so that `split` can give it back.

    Args:
        thinking: the source of branch 1.
        non_thinking: the source of branch 0; may be the same object.
        dtype: of cast weights as configs call it, or None.
        router: values for the router's config fields.
    """
    plan = SmallFiles()
    source = thinking.checkpoint
    rewritten = _rewritten(thinking, plan.notices, dtype, router)
    carried: dict[str, OpenFile] = {}
    for name, file in source.small_files.items():
        if name.endswith(".py"):
            plan.notices.append(f"{name} was left behind: code in a checkpoint is not carried over.")
        elif name not in rewritten and name not in _REPLACED:
            carried[name] = file
    plan.files += [PlannedFile(name, data) for name, data in rewritten.items()]
    plan.files += [PlannedFile(name, file) for name, file in carried.items()]
    _keep_originals(plan, Branch.THINKING, thinking, lambda name, file: name in carried)

    if non_thinking is not thinking:
        _notice_differences(plan, thinking, non_thinking)

        def same(name: str, file: OpenFile) -> bool:
            return name in carried and carried[name].size == file.size and carried[name].read() == file.read()

        _keep_originals(plan, Branch.NON_THINKING, non_thinking, same)
    else:
        plan.origins[Branch.NON_THINKING] = plan.origins[Branch.THINKING]
        plan.headers[Branch.NON_THINKING] = plan.headers[Branch.THINKING]
    return plan


def _rewritten(source: DenseSource, notices: list[str], dtype: str | None, router: dict[str, Json]) -> dict[str, bytes]:
    config, dropped = two_branch_config(source.config, dtype=dtype, router=router)
    notices.extend(f"config.json: the field {name!r} is no field of Qwen2.5-VL and was left out." for name in dropped)
    small = source.checkpoint.small_files
    generation = source.checkpoint.read_object(GENERATION_FILE) if GENERATION_FILE in small else None
    files = {
        CONFIG_FILE: json_bytes(config),
        GENERATION_FILE: json_bytes(two_branch_generation(generation, source.config)),
    }
    for name in PROCESSOR_FILES:
        if name in small:
            content = source.checkpoint.read_object(name)
            changed = with_processor_class(content, "two-branch")
            if changed is not content:
                files[name] = json_bytes(changed)
    return files


def _keep_originals(
    plan: SmallFiles, branch: Branch, source: DenseSource, is_carried: Callable[[str, OpenFile], bool]
) -> None:
    origins, headers = {}, {}
    for name, file in source.checkpoint.small_files.items():
        if name.endswith(".py"):
            continue
        if is_carried(name, file):
            origins[name] = name
            continue
        origins[name] = f"{ORIGINALS}/{branch.label}/{name}"
        plan.files.append(PlannedFile(origins[name], file))
    for shard, header in source.checkpoint.headers.items():
        headers[shard] = f"{ORIGINALS}/{branch.label}/{shard}.header"
        plan.files.append(PlannedFile(headers[shard], header.raw))
    plan.origins[branch], plan.headers[branch] = origins, headers


def _notice_differences(plan: SmallFiles, thinking: DenseSource, non_thinking: DenseSource) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja"):
        one, other = thinking.checkpoint.small_files.get(name), non_thinking.checkpoint.small_files.get(name)
        if one and other and (one.size != other.size or one.read() != other.read()):
            plan.notices.append(f"{name} differs between the sources; both branches use that of {thinking.name}.")

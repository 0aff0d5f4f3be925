"""`metis-home convert`, `split` and `verify`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..convert.upcycling import Conversion

DebugJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what a stopped run left in OUT.partial.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at OUT, in one step at the end.")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Bytes of tensors per file: 5GB, 512MiB, ...")]
Base = Annotated[str | None, typer.Option("--base", help="Dense model under an adapter, if not the one it names.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command("convert")(convert)
    app.command("split")(split)
    app.command("verify")(verify)


def convert(
    thinking: Annotated[str, typer.Argument(help="Dense model, or LoRA adapter: directory or hub id[@revision].")],
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    non_thinking: Annotated[
        str | None, typer.Option("--non-thinking", help="Dense model for the other branch; the same if not given.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read headers only, write nothing.")
    ] = False,
    as_json: DebugJson = False,
    dtype: Annotated[str, typer.Option("--dtype", help="keep, bf16, fp16 or fp32; the router stays fp32.")] = "keep",
    max_shard_size: ShardSize = "5GB",
    seed: Annotated[int, typer.Option("--seed", help="Of the new router's random numbers.")] = 17,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_shared_mismatch: Annotated[
        bool, typer.Option("--allow-shared-mismatch", help="Go on where the sources differ outside their FFNs.")
    ] = False,
    shared_from: Annotated[
        str, typer.Option("--shared-from", help="Whose shared weights then: thinking, non-thinking or average.")
    ] = "thinking",
    link: Annotated[
        bool,
        typer.Option("--link", help="Make a bundle of hard links: no bytes copied, each branch a dense directory."),
    ] = False,
    router_pooling: Annotated[str | None, typer.Option("--router-pooling", help="mean or attention.")] = None,
    router_hidden_size: Annotated[int | None, typer.Option("--router-hidden-size", help="Width of the router.")] = None,
    base: Base = None,
) -> None:
    """Make a two-branch checkpoint from one or two dense Qwen2.5-VL ones.

    Example: metis-home convert rl-7b home-7b --non-thinking instruct-7b
    """
    from ..convert.options import Options, parse_size

    _one_of("--dtype", dtype, ("keep", "bf16", "fp16", "fp32"))
    _one_of("--shared-from", shared_from, ("thinking", "non-thinking", "average"))
    if router_pooling is not None:
        _one_of("--router-pooling", router_pooling, ("mean", "attention"))
    if link and (resume or dtype != "keep" or base):
        raise typer.BadParameter("--link copies nothing, so it takes no --resume, --dtype or --base.")
    router: dict[str, Any] = {"router_hidden_size": router_hidden_size, "router_pooling": router_pooling}
    mismatch: dict[str, Any] = {"allow_shared_mismatch": allow_shared_mismatch, "shared_from": shared_from}
    if dry_run:
        from ..convert.output import check_target
        from ..convert.upcycling import open_conversion

        given = {name: value for name, value in router.items() if value is not None}
        options = Options(
            dtype=dtype,  # type: ignore[arg-type]
            max_shard_bytes=parse_size(max_shard_size),
            seed=seed,
            **mismatch,
            **given,
        )
        check_target(out, overwrite=overwrite, resume=resume)
        with open_conversion(thinking, non_thinking, options=options, compare=False, base=base) as conversion:
            _print_plan(conversion, out, as_json, link)
        return
    from .progress import progress_bar

    with progress_bar() as progress:
        if link:
            from ..convert import link as make_link

            made = make_link(
                thinking, out, non_thinking, seed=seed, overwrite=overwrite, progress=progress, **mismatch, **router
            )
            _print({"out": str(made), "bytes_copied": 0}, as_json, f"{made}: linked, no weights copied")
            return
        from ..convert import upcycle

        manifest = upcycle(
            thinking,
            out,
            non_thinking,
            dtype=dtype,  # type: ignore[arg-type]
            max_shard_size=max_shard_size,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            base=base,
            progress=progress,
            **mismatch,
            **router,
        )
    for notice in manifest.notices:
        typer.echo(f"note: {notice}", err=True)
    size = sum(digest.size for digest in manifest.shards.values())
    branches = {branch.label: record.digest for branch, record in manifest.branches.items()}
    result = {"out": str(out), "shards": len(manifest.shards), "bytes": size, "branches": branches}
    result["notices"] = list(manifest.notices)
    _print(
        result, as_json, f"{out}: {len(manifest.shards)} shards, {size / 1e9:.2f} GB, two branches, router untrained"
    )


def split(
    model: Annotated[Path, typer.Argument(help="Two-branch directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to make; with --branch both it will hold two.")],
    branch: Annotated[str, typer.Option("--branch", help="thinking, non-thinking or both.")] = "thinking",
    layout: Annotated[
        str, typer.Option("--layout", help="Tensor names: hub (what engines know) or source (as they were).")
    ] = "hub",
    max_shard_size: ShardSize = "5GB",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: DebugJson = False,
) -> None:
    """Make the dense Qwen2.5-VL checkpoint of a branch, bit for bit.

    Example: metis-home split home-7b thinking-7b --branch thinking
    """
    from ..convert import split as make_split
    from .progress import progress_bar

    _one_of("--branch", branch, ("thinking", "non-thinking", "both"))
    _one_of("--layout", layout, ("hub", "source"))
    targets = {branch: out}
    if branch == "both":
        out.mkdir(exist_ok=True)
        targets = {"thinking": out / "thinking", "non-thinking": out / "non-thinking"}
    with progress_bar() as progress:
        for label, target in targets.items():
            make_split(
                model,
                target,
                label,  # type: ignore[arg-type]
                layout=layout,  # type: ignore[arg-type]
                max_shard_size=max_shard_size,
                resume=resume and target.with_name(target.name + ".partial").exists(),
                overwrite=overwrite,
                progress=progress,
            )
    written = {label: str(target) for label, target in targets.items()}
    _print(written, as_json, "\n".join(f"{target}: the {label} branch" for label, target in written.items()))


def verify(
    model: Annotated[Path, typer.Argument(help="Two-branch directory.")],
    thinking: Annotated[str | None, typer.Option("--thinking", help="Source of the thinking branch.")] = None,
    non_thinking: Annotated[str | None, typer.Option("--non-thinking", help="Source of the other branch.")] = None,
    logits: Annotated[bool, typer.Option("--logits", help="Load the models and compare logits, too.")] = False,
    base: Base = None,
    as_json: DebugJson = False,
) -> None:
    """Check a two-branch checkpoint: files by digest, weights and logits against their sources.

    Example: metis-home verify home-7b --thinking rl-7b --non-thinking instruct-7b
    """
    from dataclasses import asdict

    from ..convert import verify as check
    from .progress import progress_bar

    with progress_bar() as progress:
        found = check(model, thinking, non_thinking, logits=logits, base=base, progress=progress)
    lines = [f"{model}: {found.tensors} tensors, names and shapes right"]
    if found.digested_bytes:
        lines.append(f"  {found.digested_bytes / 1e9:.2f} GB have the digests of the manifest")
    else:
        lines.append("  no manifest (a model that was saved after training has none): digests not checked")
    for label, count in found.compared.items():
        lines.append(f"  {label}: {count} tensors equal the source bit for bit")
        if found.not_compared[label]:
            lines.append(
                f"  {label}: {found.not_compared[label]} shared tensors are the other source's, as was asked for"
            )
    lines += [f"  {label}: logits differ by at most {value:g}" for label, value in found.logits.items()]
    _print(asdict(found), as_json, "\n".join(lines))


def _print_plan(conversion: "Conversion", out: Path, as_json: bool, link: bool) -> None:
    from ..convert.output import check_space, free_space
    from ..names import ROUTER_PREFIX, branch_of

    plan = conversion.plan
    tensors = [(tensor, shard) for shard in plan.shards for tensor in shard.tensors]
    groups: dict[str, dict[str, int]] = {}
    for tensor, _ in tensors:
        branch = branch_of(tensor.name)
        part = "router (new)" if tensor.name.startswith(ROUTER_PREFIX) else "shared"
        part = part if branch is None else ("thinking" if branch else "non-thinking")
        group = groups.setdefault(part, {"tensors": 0, "bytes": 0})
        group["tensors"] += 1
        group["bytes"] += tensor.content.size
    copied = sum(run[2] for shard in plan.shards for run in shard.runs() if isinstance(run, tuple))
    runs = sum(isinstance(run, tuple) for shard in plan.shards for run in shard.runs())
    result: dict[str, Any] = {
        "sources": {branch.label: source.name for branch, source in conversion.sources.items()},
        "shards": [{"name": s.name, "bytes": s.size, "tensors": len(s.tensors)} for s in plan.shards],
        "tensors": groups,
        "bytes": plan.size,
        "bytes_copied_by_the_kernel": copied,
        "copy_runs": runs,
        "bytes_needed": 0 if link else plan.size,
        "bytes_free": free_space(out.absolute()),
        "small_files": [file.name for file in plan.files],
        "shared_weights_compared": False,
        "options": conversion.options.to_json(),
        "notices": list(plan.notices),
    }
    lines = [
        f"would write {len(plan.shards)} shards, {plan.size / 1e9:.2f} GB, to {out} "
        f"({result['bytes_free'] / 1e9:.1f} GB free), router random, seed {conversion.options.seed}"
        if not link
        else f"would link {plan.size / 1e9:.2f} GB of weights as {out}, copying none"
    ]
    lines += [f"  {part}: {g['tensors']} tensors, {g['bytes'] / 1e9:.3f} GB" for part, g in groups.items()]
    lines += [f"  {s.name}: {s.size / 1e9:.3f} GB, {len(s.tensors)} tensors" for s in plan.shards if not link]
    if len(set(result["sources"].values())) > 1:
        lines.append("  not read yet: whether the shared weights of the two sources are equal")
    lines += [f"  note: {notice}" for notice in plan.notices]
    _print(result, as_json, "\n".join(lines))
    if not link:
        check_space(plan, out.absolute())


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(result, indent=2) if as_json else text)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"{option} must be one of {', '.join(allowed)}; found {value!r}.")

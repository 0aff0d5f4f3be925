"""The model card of a converted checkpoint: what it is, what it was made from, how to use it."""

import json

from ..branch import Branch
from .dense import DenseSource
from .manifest import Manifest

_CARRIED = ("license", "license_name", "license_link", "language")


def model_card(manifest: Manifest, source: DenseSource) -> bytes:
    """Return the text of README.md. No time, host or path in it: the same conversion gives the same card."""
    thinking, non_thinking = manifest.branches[Branch.THINKING], manifest.branches[Branch.NON_THINKING]
    bases = [record.source for record in (thinking, non_thinking) if "/" in record.source]
    front = _carried_lines(source)
    front += [
        "library_name: metis_home",
        "pipeline_tag: image-text-to-text",
        "tags: [metis_home, two-branch, qwen2_5_vl]",
    ]
    if bases:
        front.append("base_model: " + json.dumps(sorted(set(bases))))
    rows = [
        f"| {branch.label} | `mlp.experts.{int(branch)}` | {_origin(record.source, record.revision, record.adapter)} "
        f"| {'yes' if record.exact else 'no'} | `{record.digest}` |"
        for branch, record in manifest.branches.items()
    ]
    lines = [
        "---",
        *front,
        "---",
        "",
        "# A two-branch Qwen2.5-VL",
        "",
        "Each decoder layer has two FFN branches, and a router sends each query to one of them (Metis-HOME, arXiv "
        "2510.20519). **The router is new and untrained**: force a branch until it is trained.",
        "",
        "```python",
        "from metis_home import MetisHomeForConditionalGeneration",
        "",
        'model = MetisHomeForConditionalGeneration.from_pretrained("THIS_DIRECTORY")',
        "model.generate(**inputs, thinking=True)   # or False",
        "```",
        "",
        "## Where it comes from",
        "",
        "| branch | weights | source | equals its source bit for bit | XXH3-128 of the dense model |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Options: " + ", ".join(f"`{name}={value}`" for name, value in manifest.options.items()) + ".",
        f"Converted by metis_home {manifest.version}; digests of every tensor are in `metis_home_manifest.json`.",
    ]
    if manifest.shared_mismatch:
        worst = manifest.shared_mismatch[0]
        lines += [
            "",
            f"**The sources differed in {len(manifest.shared_mismatch)} shared tensors** (most in `{worst['name']}`, "
            f"relative norm {worst['relative_norm']:.3g}); kept: {manifest.options['shared_from']}.",
        ]
    if manifest.notices:
        lines += ["", "Notices:", "", *(f"- {notice}" for notice in manifest.notices)]
    lines += ["", "`metis-home split THIS_DIRECTORY OUT --branch thinking` gives the dense model of a branch back.", ""]
    return "\n".join(lines).encode()


def _origin(source: str, revision: str | None, adapter: str | None) -> str:
    text = f"`{source}`" + (f" at `{revision}`" if revision else "")
    return f"adapter `{adapter}` on {text}" if adapter else text


def _carried_lines(source: DenseSource) -> list[str]:
    """The licence and language lines of the source's own card."""
    file = source.checkpoint.small_files.get("README.md")
    text = file.read().decode("utf-8", errors="replace") if file else ""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return []
    end = next(number for number, line in enumerate(lines[1:], 1) if line.strip() == "---")
    carried, keeps = [], False
    for line in lines[1:end]:
        if line and not line[0].isspace() and not line.startswith("-"):
            keeps = line.split(":", 1)[0] in _CARRIED
        if keeps:
            carried.append(line)
    return carried

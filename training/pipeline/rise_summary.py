"""What a run of `metis-home rise` came to: the steps' own reports, put together."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUCKETS = ("prompts", "solved", "sometimes", "never", "unjudged", "held_out")
ROWS = ("self_distilled", "expert", "expert_missing", "expert_wrong", "expert_badly_formatted", "non_thinking", "rows")


def summarize_rise(output_dir: str | Path, steps: list[dict[str, object]]) -> dict[str, Any]:
    """Read the reports below `output_dir`.

    Args:
        steps: what `run_rise` returned.
    Returns:
        `steps` {name: seconds}, `sft_set` (counts), `modes` {mode: accuracy, thinking_ratio, mean_tokens; by source too}.
    """
    out = Path(output_dir)
    chosen = _read(out / "3-sft-set" / "sft.report.json")
    evaluated = _read(out / "6-evaluate" / "report" / "report.json")
    return {
        "steps": {str(step["name"]): step["seconds"] for step in steps},
        "sft_set": {name: chosen[name] for name in (*BUCKETS, *ROWS, "histogram")},
        "modes": {
            mode: {
                **_group(report["all"]),
                "sources": {source: _group(group) for source, group in report["sources"].items()},
            }
            for mode, report in evaluated["modes"].items()
        },
    }


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """A table for people."""
    counts = summary["sft_set"]
    lines = [
        f"{counts['prompts']} prompts: {counts['solved']} always solved, {counts['sometimes']} sometimes, "
        f"{counts['never']} never",
        f"{counts['rows']} SFT rows: {counts['self_distilled']} of the model's own, {counts['expert']} of the expert's, "
        f"{counts['non_thinking']} non-thinking",
    ]
    for mode, group in summary["modes"].items():
        accuracy, ratio = group["accuracy"]["value"], group["thinking_ratio"]
        lines.append(
            f"thinking {mode:4}  accuracy {'-' if accuracy is None else f'{accuracy:.1%}':>6}  "
            f"thought {'-' if ratio is None else f'{ratio:.1%}':>6}  {group['mean_tokens']:.1f} tokens per answer"
        )
    return lines


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    thinking = group["thinking"]
    return {
        "accuracy": group["accuracy"],
        "thinking_ratio": None if thinking is None else thinking["value"],
        "mean_tokens": group["mean_tokens"],
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))

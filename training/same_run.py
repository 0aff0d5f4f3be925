"""Is a run that should be resumed still the same run?"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from metis_home.errors import RecipeError

from .recipe import Recipe

SETTINGS_FILE = "recipe.json"
# Of `training`: what changes no step that is still to come, how far it goes, and how it is watched.
_HARMLESS = frozenset(
    {
        *(
            "max_steps",
            "num_train_epochs",
            "output_dir",
            "overwrite_output_dir",
            "run_name",
            "report_to",
            "disable_tqdm",
        ),
        *(
            "plots",
            "log_completions",
            "watchdog_seconds",
            "self_check",
            "self_check_tolerance",
            "check_data",
            "cache_gib",
        ),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "push_to_hub", "project"),
        *("server_urls", "server_urls_non_thinking", "server_timeout_seconds", "server_concurrency"),
        *("server_weights_dir", "rollout_batch_tokens", "tool_workers"),
    }
)
_HARMLESS_STARTS = ("eval_", "save_", "logging_", "log_level", "log_on_", "dataloader_", "hub_", "trackio_", "include_")


def recipe_settings(recipe: Recipe) -> dict[str, object]:
    """All that a run uses, as plain JSON values."""
    return dict(json.loads(json.dumps(dataclasses.asdict(recipe), default=str)))


def refuse_other_settings(recipe: Recipe, file: Path) -> None:
    """Compare a recipe with the one that the run was started with.

    Steps, evaluation, logging, saving, the image root and where things lie may differ.

    Raises:
        RecipeError: something else does; says what it was and what it is now.
    """
    if not file.is_file():
        return
    before, now = dict(_flat(json.loads(file.read_text(encoding="utf-8")))), dict(_flat(recipe_settings(recipe)))
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not _is_harmless(key)
    ]
    if changed:
        raise RecipeError(
            f"{file.parent} was begun with other settings: {'; '.join(changed)}. Resume with the settings of "
            f"{file.name}, or start anew in another training.output_dir."
        )


def _is_harmless(key: str) -> bool:
    section, _, name = key.partition(".")
    if section == "training":
        return name.partition(".")[0] in _HARMLESS or name.startswith(_HARMLESS_STARTS)
    return key in ("data.eval", "data.image_root")


def _flat(tree: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value

"""Measure a model: accuracy, thinking ratio, tokens, seconds and the router; pick its threshold; adapters for two kits.

    records --answering--> completions.jsonl --report--> report.json, table, plots, view
    answers of both branches --tradeoff--> every threshold's outcome --calibration--> router_threshold

Importing this package imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .calibration import Calibration, calibrate, write_threshold
    from .completions import Completion
    from .report import EvaluationReport
    from .run import evaluate
    from .tradeoff import Target

_HOME_OF = {
    "Calibration": "calibration",
    "Completion": "completions",
    "EvaluationReport": "report",
    "Target": "tradeoff",
    "calibrate": "calibration",
    "evaluate": "run",
    "write_threshold": "calibration",
}

__all__ = ["Calibration", "Completion", "EvaluationReport", "Target", "calibrate", "evaluate", "write_threshold"]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

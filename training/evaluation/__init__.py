"""Measure a model: accuracy, thinking ratio, tokens, seconds and the router; pick its threshold; adapters for two kits.

    records --answering--> completions.jsonl --report--> report.json, table, plots, view
    answers of both branches --tradeoff--> every threshold's outcome --calibration--> router_threshold

Importing this package imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from metis_home.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOME_OF)

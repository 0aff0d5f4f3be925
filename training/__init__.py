"""Stage-SFT, Stage-RL and HDPO: data, rewards, trainers, evaluation, and the Metis-RISE pipeline around them.

Importing this package imports neither torch nor transformers: names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rl import MetisRLConfig, MetisRLTrainer
    from .sft import MetisSFTConfig, MetisSFTTrainer

_HOME_OF = {
    "MetisRLConfig": "rl",
    "MetisRLTrainer": "rl",
    "MetisSFTConfig": "sft",
    "MetisSFTTrainer": "sft",
}

__all__ = ["MetisRLConfig", "MetisRLTrainer", "MetisSFTConfig", "MetisSFTTrainer"]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

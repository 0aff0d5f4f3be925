"""Stage-SFT, Stage-RL and HDPO: data, rewards, trainers, evaluation, and the Metis-RISE pipeline around them.

Importing this package imports neither torch nor transformers: names are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from metis_home.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOME_OF)

"""Stage-RL and HDPO: a policy learns from rewards of its own rollouts.

PromptSource --prompts--> RolloutEngine --rollouts--> Scorer --rewards--> advantages --plan--> Buffer --> updates
"""

from .config import MetisRLConfig
from .trainer import MetisRLTrainer

__all__ = ["MetisRLConfig", "MetisRLTrainer"]

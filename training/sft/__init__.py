"""Stage-SFT: both branches and the router learn from labelled answers."""

from .config import MetisSFTConfig
from .lora import branch_lora_config, merge_branch_lora
from .trainer import MetisSFTTrainer

__all__ = ["MetisSFTConfig", "MetisSFTTrainer", "branch_lora_config", "merge_branch_lora"]

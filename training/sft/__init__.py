"""Stage-SFT: both branches and the router learn from labelled answers."""

from .config import MetisSFTConfig
from .lora import branch_lora_config, dense_lora_config, merge_branch_lora
from .router_only import RouterTraining, train_router
from .trainer import MetisSFTTrainer

__all__ = [
    "MetisSFTConfig",
    "MetisSFTTrainer",
    "RouterTraining",
    "branch_lora_config",
    "dense_lora_config",
    "merge_branch_lora",
    "train_router",
]

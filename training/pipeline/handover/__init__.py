"""Hand a Stage-RL recipe to another trainer: data set, reward file and configuration, ready to start.

Metis-RISE's RL runs on the dense, stock Qwen2.5-VL, so whatever trains that can carry it out at any scale; the checkpoint
that comes back is converted like every dense one.
"""

from .export import TARGETS, Handover, export_recipe

__all__ = ["TARGETS", "Handover", "export_recipe"]

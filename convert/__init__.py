"""Conversion: dense Qwen2.5-VL checkpoints -> one two-branch checkpoint, and back.

    from metis_home.convert import upcycle, split, verify

Imports no torch; only `verify(..., logits=True)` loads a model. See docs/convert.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .linking import link
    from .manifest import BranchRecord, Manifest
    from .splitting import split
    from .upcycling import upcycle
    from .verifying import Verification, verify

_HOME_OF = {
    "BranchRecord": "manifest",
    "Manifest": "manifest",
    "Verification": "verifying",
    "link": "linking",
    "split": "splitting",
    "upcycle": "upcycling",
    "verify": "verifying",
}

__all__ = ["BranchRecord", "Manifest", "Verification", "link", "split", "upcycle", "verify"]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value

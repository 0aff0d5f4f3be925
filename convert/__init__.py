"""Conversion: dense Qwen2.5-VL checkpoints -> one two-branch checkpoint, and back.

    from metis_home.convert import upcycle, split, verify

Imports no torch; only `verify(..., logits=True)` loads a model. See docs/convert.md.
"""

from typing import TYPE_CHECKING

from metis_home.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOME_OF)

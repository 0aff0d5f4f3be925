"""Launch tables: which kernel, with which blocks, for how many rows. Data, not search: nothing is tuned at run time.

A table is a JSON file:

    {"target": "sm_90", "device": null, "triton": null, "measured": false,
     "shapes": {"any" | "3584x18944 bfloat16": {
         "forward": {"0": "decode", "8": "grouped"},               implementation from 2**0, from 2**8 rows
         "gate_up": {"0": {"BLOCK_ROWS": 128, ..., "num_warps": 8}},   configuration, likewise
         ...}}}

Looked up in this order: the file named by METIS_HOME_KERNEL_TABLE; the user's own (written by
`python -m metis_home.kernels.tune`); one shipped for this device and Triton minor version; the shipped defaults of
the architecture. Only a measured table makes `backend="auto"` use the kernels: the defaults are guesses
that compile.
"""

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from .interpreter import INTERPRETING

ENVIRONMENT_VARIABLE = "METIS_HOME_KERNEL_TABLE"
SHIPPED = Path(__file__).parent / "tables"
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

Config = dict[str, Any]
"""Keyword arguments of one launch: capital constexprs, num_warps, num_stages; `variant` names the kernel's form."""


@dataclass(frozen=True, slots=True)
class LaunchTable:
    """What to launch on one device."""

    path: Path
    target: str
    measured: bool
    shapes: dict[str, dict[str, dict[str, Any]]]

    def find(self, kernel: str, hidden: int, features: int, dtype: torch.dtype, rows: int) -> Any:
        """The entry of `kernel` for (D, F), dtype and row count: of the largest power of two that is not above `rows`.

        A copy: callers may change it.
        """
        shape = self.shapes.get(shape_key(hidden, features, dtype), {})
        entries = shape.get(kernel) or self.shapes["any"][kernel]
        bucket = max(rows, 1).bit_length() - 1
        below = [int(key) for key in entries if int(key) <= bucket]
        entry = entries[str(max(below) if below else min(int(key) for key in entries))]
        return dict(entry) if isinstance(entry, dict) else entry


def shape_key(hidden: int, features: int, dtype: torch.dtype) -> str:
    """How a table names a shape: `3584x18944 bfloat16`."""
    return f"{hidden}x{features} {str(dtype).removeprefix('torch.')}"


def target_of(device: torch.device) -> str:
    """The architecture whose defaults a device uses: its own, else the newest older one of its family."""
    if device.type != "cuda":
        return "sm_80" if INTERPRETING else "none"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942"
    number = properties.major * 10 + properties.minor
    known = [int(target[3:]) for target in TARGETS if target.startswith("sm_")]
    older = [candidate for candidate in known if candidate <= number]
    # 10.3 is 10.0's family; 12.x is not: consumer parts have less shared memory than 9.0 and 10.0.
    return f"sm_{max(older)}" if older else "none"


def device_slug(name: str) -> str:
    """A device's name as a file name: `nvidia_h200`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def triton_minor() -> str:
    """`3.9`: configurations regress from one minor version to the next, so it is part of a table's name."""
    return ".".join(triton.__version__.split(".")[:2])


def user_table(device_name: str) -> Path:
    """Where `tune` writes, and where it is found again."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "metis_home" / "kernels" / f"{device_slug(device_name)}.triton-{triton_minor()}.json"


def read_table(path: Path) -> LaunchTable:
    """Read one JSON table."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return LaunchTable(path, data["target"], bool(data["measured"]), data["shapes"])


@cache
def _table(device: torch.device, override: str | None) -> LaunchTable:
    if override:
        return read_table(Path(override))
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        own = user_table(name)
        for path in (own, SHIPPED / own.name):
            if path.is_file():
                return read_table(path)
    return read_table(SHIPPED / f"{target_of(device)}.json")


def table_for(device: torch.device) -> LaunchTable:
    """The table of a device; read once per process and value of the environment variable."""
    return _table(device, os.environ.get(ENVIRONMENT_VARIABLE))

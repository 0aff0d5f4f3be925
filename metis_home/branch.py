"""The two branches and their numbers. No imports beyond the standard library."""

from enum import IntEnum


class Branch(IntEnum):
    """Which expert branch answers. The value is the index into `mlp.experts` of every layer."""

    NON_THINKING = 0
    THINKING = 1

    @property
    def label(self) -> str:
        """The name used on the command line and in reports: `non-thinking` or `thinking`."""
        return "thinking" if self is Branch.THINKING else "non-thinking"


NUM_BRANCHES = len(Branch)

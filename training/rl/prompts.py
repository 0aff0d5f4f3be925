"""Where prompts come from: records in a seeded order, each rank its own share, resumable."""

import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from metis_home.errors import DataError

from ..data.check import Purpose, check_records
from ..data.encode import Encoder
from ..data.records import Record
from ..rollouts.types import Prompt, make_prompt

if TYPE_CHECKING:
    from metis_home.processing import MetisHomeProcessor

logger = logging.getLogger(__name__)
_KEPT = 256  # encoded prompts in memory; ours


def check_prompts(
    records: Sequence[Record],
    rewards: Sequence[object],
    processor: "MetisHomeProcessor",
    system_prompt: str | None,
) -> None:
    """Look at all rows before anything is trained.

    Args:
        rewards: names or functions. Golds are asked for where answers are verified; other functions may need none.
    Raises:
        DataError: lists every bad row with its number, id and reason.
    """
    names = [reward if isinstance(reward, str) else getattr(reward, "__name__", "") for reward in rewards]
    # Without a limit: prompts that are too long are left out, and reported, by `PromptSource`.
    encoder = Encoder(processor, system_prompt=system_prompt, max_length=None)
    purpose: Purpose = "rl" if "accuracy_reward" in names else "prompts"
    check_records(records, purpose=purpose, encoder=encoder).raise_if_bad()


class PromptSource:
    """An endless stream of prompts: every epoch a new order, that follows from seed and epoch alone.

    Args:
        records: all of them, the same on every rank.
        encoder: tokenizes; its `max_length` is the longest prompt.
        seed: of the orders.
        rank, world_size: which share this is.
    Raises:
        DataError: no record, or none that is short enough.
    """

    def __init__(
        self, records: Sequence[Record], encoder: Encoder, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.records, self.encoder, self.seed = list(records), encoder, seed
        self.rank, self.world_size = rank, world_size
        self.usable = self._short_enough()
        if not self.records:
            raise DataError("the data set has no rows: there are no prompts.")
        if len(self.usable) < world_size:
            raise DataError(
                f"{len(self.usable)} of {len(self.records)} rows can be prompts (limit: {encoder.max_length} tokens), "
                f"and {world_size} ranks need at least one each."
            )
        self.epoch = self.position = 0
        self._encoded: dict[int, Prompt] = {}

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts of this rank's share."""
        return [self.prompt(self._next()) for _ in range(count)]

    def prompt(self, index: int) -> Prompt:
        """The prompt of record number `index`."""
        if index not in self._encoded:
            if len(self._encoded) >= _KEPT:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[index] = make_prompt(self.records[index], self.encoder, index=index)
        return self._encoded[index]

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.position = state["epoch"], state["position"]

    def _next(self) -> int:
        share = self._share(self.epoch)
        if self.position >= len(share):
            self.epoch, self.position = self.epoch + 1, 0
            share = self._share(self.epoch)
        self.position += 1
        return share[self.position - 1]

    def _share(self, epoch: int) -> list[int]:
        order = list(self.usable)
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order[self.rank :: self.world_size]

    def _short_enough(self) -> list[int]:
        limit = self.encoder.max_length
        if limit is None:
            return list(range(len(self.records)))
        usable = [number for number, record in enumerate(self.records) if self.encoder.count(record).prompt <= limit]
        if len(usable) < len(self.records):
            logger.warning(
                "left out %d of %d prompts: more than %d tokens (prompts are never truncated)",
                len(self.records) - len(usable),
                len(self.records),
                limit,
            )
        return usable

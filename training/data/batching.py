"""Which rows make a batch: bounded by tokens, image tokens counted, not by rows.

A padded batch costs rows x longest tokens, a packed one the sum of its tokens.
"""

import random
from collections.abc import Iterator, Sequence

from metis_home.errors import DataError

from .packing import pack_lengths

_SPREAD = 0.1  # how far the order of an epoch departs from the order by length
_SLACK = 1.02  # room for epochs that need more batches than the first
_TRIES = 4


def batches_by_length(lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Group rows of similar length into padded batches, longest first; the same for the same lengths.

    Every row is in exactly one batch, and no batch is padded to more than `max_tokens`, but a row that is longer than
    that by itself: it makes a batch of its own.

    Args:
        lengths: tokens of each row, image tokens included.
        max_tokens: most tokens of a batch, padding included. max_rows: most rows of a batch.
    Returns:
        Lists of row numbers.
    Raises:
        DataError: a limit is not positive.
    """
    _check_limits(max_tokens, max_rows)
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return _cut(order, lengths, max_tokens, max_rows)


class TokenBudgetSampler:
    """A batch sampler whose batches hold at most `max_tokens` tokens, padding included.

    Each epoch has its own composition and order, which follow from seed and epoch alone; every rank gets equally many
    batches in every epoch, and the ranks of one step get batches of similar size. All rows of an epoch are used once,
    except that a data set with too few rows for all ranks repeats some (`repeated` says how many).

    To resume in the middle of an epoch, `set_epoch(epoch, start=batches already used)`.

    Args:
        lengths: tokens of each row, image tokens included.
        max_tokens: most tokens of a batch.
        seed: order and composition follow from it.
        max_rows: most rows of a batch.
        packed: batches are packed into one row (`PackingCollator`), so no padding counts.
        rank, world_size: which of how many equal shares this sampler yields.
        largest_first: the batches with the most tokens come first, so that a lack of memory shows in step one.
    Raises:
        DataError: no rows, a row of more than `max_tokens` tokens, or impossible limits.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        seed: int,
        *,
        max_rows: int | None = None,
        packed: bool = False,
        rank: int = 0,
        world_size: int = 1,
        largest_first: bool = False,
    ) -> None:
        _check_limits(max_tokens, max_rows)
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be in [0, world_size); found rank {rank} of {world_size}.")
        if not lengths:
            raise DataError("there are no rows to make batches of.")
        too_long = [row for row, length in enumerate(lengths) if length > max_tokens]
        if too_long:
            worst = max(too_long, key=lambda row: lengths[row])
            raise DataError(
                f"{len(too_long)} rows have more tokens than a batch may hold ({max_tokens}); the longest is number "
                f"{worst} with {lengths[worst]}. Rows are not truncated: raise max_tokens, or leave these rows out."
            )
        self.lengths = list(lengths)
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.seed = seed
        self.packed = packed
        self.rank = rank
        self.world_size = world_size
        self.largest_first = largest_first
        self._epoch = self._start = 0
        # The same number in every epoch: trainers count the steps of a run once, and resume by it.
        first = self._composed(0, 0)
        self._batches_per_rank = -(-int(len(first) * _SLACK) // world_size)
        self.repeated = max(0, self._batches_per_rank * world_size - len(lengths))

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Choose the epoch that the next iteration yields, from batch number `start` of this rank on."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        """Batches of this rank in every epoch."""
        return self._batches_per_rank

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of this rank, each a list of row numbers."""
        start, self._start = self._start, 0
        yield from self.batches(self._epoch)[start:]

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of this rank in `epoch`."""
        return [step[self.rank] for step in self._steps(epoch)]

    def cost(self, batch: Sequence[int]) -> int:
        """Tokens that a batch computes, padding included."""
        batch_lengths = [self.lengths[row] for row in batch]
        return sum(batch_lengths) if self.packed else len(batch) * max(batch_lengths)

    def _steps(self, epoch: int) -> list[list[list[int]]]:
        """Per step, the batch of each rank."""
        total = self._batches_per_rank * self.world_size
        tries = (self._composed(epoch, attempt) for attempt in range(_TRIES))
        batches = next((found for found in tries if len(found) <= total), None) or self._composed(0, 0)
        _split_until(batches, total)
        for row in range(total - len(batches)):
            batches.append([row % len(self.lengths)])

        generator = random.Random(f"{self.seed}/{epoch}/order")
        generator.shuffle(batches)
        batches.sort(key=self.cost, reverse=True)  # stable: ties stay shuffled
        steps = [batches[begin : begin + self.world_size] for begin in range(0, total, self.world_size)]
        for step in steps:
            generator.shuffle(step)
        if not self.largest_first:
            generator.shuffle(steps)
            return steps
        rest = steps[1:]
        generator.shuffle(rest)
        return [steps[0], *rest]

    def _composed(self, epoch: int, attempt: int) -> list[list[int]]:
        generator = random.Random(f"{self.seed}/{epoch}/{attempt}")
        noise = [1 + _SPREAD * (2 * generator.random() - 1) for _ in self.lengths]
        order = sorted(range(len(self.lengths)), key=lambda row: (-self.lengths[row] * noise[row], row))
        if self.packed:
            return pack_lengths(self.lengths, max_tokens=self.max_tokens, max_rows=self.max_rows, order=order)
        return _cut(order, self.lengths, self.max_tokens, self.max_rows)


def _cut(order: Sequence[int], lengths: Sequence[int], max_tokens: int, max_rows: int | None) -> list[list[int]]:
    """Cut `order` into batches, each as large as it may be."""
    batches: list[list[int]] = []
    longest = 0
    for row in order:
        longest = max(longest, lengths[row])
        current = batches[-1] if batches else []
        fits = (len(current) + 1) * longest <= max_tokens and (max_rows is None or len(current) < max_rows)
        if current and fits:
            current.append(row)
        else:
            batches.append([row])
            longest = lengths[row]
    return batches


def _split_until(batches: list[list[int]], total: int) -> None:
    """Halve the batch with the most rows until there are `total` batches, or only single rows."""
    while len(batches) < total:
        widest = max(range(len(batches)), key=lambda number: len(batches[number]))
        batch = batches[widest]
        if len(batch) < 2:
            return
        middle = len(batch) // 2
        batches[widest] = batch[:middle]
        batches.append(batch[middle:])


def _check_limits(max_tokens: int, max_rows: int | None) -> None:
    if max_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise DataError(f"max_tokens and max_rows must be positive; found {max_tokens} and {max_rows}.")

"""Batches are bounded by tokens, follow from the seed, and are equally many on each rank."""

import random

import pytest

from metis_home.errors import DataError
from metis_home.training.data.batching import TokenBudgetSampler, batches_by_length

GENERATOR = random.Random(0)
LENGTHS = [GENERATOR.choice([GENERATOR.randint(20, 200), GENERATOR.randint(20, 1000)]) for _ in range(700)]


def padded(batch, lengths=LENGTHS):
    return len(batch) * max(lengths[row] for row in batch)


def summed(batch, lengths=LENGTHS):
    return sum(lengths[row] for row in batch)


class TestByLength:
    def test_by_hand(self):
        # sorted: 9 | 7 7 | 4 4 3 | 1: 3 * 4 = 12 fit, 4 * 4 do not
        assert batches_by_length([4, 7, 1, 9, 7, 3, 4], max_tokens=14) == [[3], [1, 4], [0, 6, 5], [2]]
        assert batches_by_length([1] * 5, max_tokens=14, max_rows=2) == [[0, 1], [2, 3], [4]]
        assert batches_by_length([], max_tokens=14) == []

    def test_every_row_once_within_the_budget_and_little_padding(self):
        batches = batches_by_length(LENGTHS, max_tokens=4096)

        assert sorted(row for batch in batches for row in batch) == list(range(700))
        assert all(padded(batch) <= 4096 for batch in batches)
        assert sum(map(padded, batches)) <= 1.1 * sum(LENGTHS)
        assert batches == batches_by_length(list(LENGTHS), max_tokens=4096)

    def test_a_row_longer_than_the_budget_is_alone(self):
        assert batches_by_length([3, 50, 3], max_tokens=10) == [[1], [0, 2]]

    def test_impossible_limits_are_refused(self):
        with pytest.raises(DataError, match="must be positive; found 0 and None"):
            batches_by_length([1], max_tokens=0)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
class TestSampler:
    @pytest.mark.parametrize("world_size", [1, 3, 8])
    def test_ranks_share_each_epoch_evenly(self, packed, world_size):
        samplers = [
            TokenBudgetSampler(LENGTHS, 4096, seed=5, packed=packed, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for epoch in range(4):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            shares = [list(sampler) for sampler in samplers]

            assert {len(share) for share in shares} == {len(samplers[0])}
            assert sorted(row for share in shares for batch in share for row in batch) == list(range(700))
            cost = summed if packed else padded
            assert all(cost(batch) <= 4096 for share in shares for batch in share)

    def test_ranks_get_batches_of_similar_size_in_each_step(self, packed):
        samplers = [TokenBudgetSampler(LENGTHS, 4096, 5, packed=packed, rank=rank, world_size=4) for rank in range(4)]
        steps = list(zip(*(sampler.batches(0) for sampler in samplers), strict=True))

        waste = sum(max(map(samplers[0].cost, step)) * 4 - sum(map(samplers[0].cost, step)) for step in steps)

        assert waste <= 0.05 * sum(samplers[0].cost(batch) for step in steps for batch in step)

    def test_epochs_and_seeds_differ_and_repeat(self, packed):
        def batches(seed, epoch):
            return TokenBudgetSampler(LENGTHS, 4096, seed, packed=packed).batches(epoch)

        assert batches(1, 3) == batches(1, 3)
        compositions = {frozenset(map(frozenset, batches(*key))) for key in [(1, 0), (1, 1), (2, 0), (2, 1)]}
        assert len(compositions) == 4
        assert [max(batch) for batch in batches(1, 0)] != sorted(max(batch) for batch in batches(1, 0))

    def test_tokens_are_used_well(self, packed):
        sampler = TokenBudgetSampler(LENGTHS, 4096, 1, packed=packed)

        used = sum(LENGTHS) / sum(map(sampler.cost, sampler.batches(2)))

        assert used == 1.0 if packed else used > 0.85  # 10 % noise in the order by length costs some padding
        if packed:
            assert len(sampler) <= 1.04 * sum(LENGTHS) / 4096 + 1

    def test_it_resumes_where_it_stopped(self, packed):
        whole = TokenBudgetSampler(LENGTHS, 4096, 1, packed=packed)
        whole.set_epoch(2)
        expected = list(whole)

        resumed = TokenBudgetSampler(LENGTHS, 4096, 1, packed=packed)
        resumed.set_epoch(2, start=17)

        assert list(resumed) == expected[17:]
        assert list(resumed) == expected  # the next iteration is a whole one again

    def test_the_largest_batch_comes_first_if_wanted(self, packed):
        for rank in (0, 1):
            sampler = TokenBudgetSampler(LENGTHS, 4096, 1, packed=packed, rank=rank, world_size=2, largest_first=True)
            costs = [sampler.cost(batch) for batch in sampler]
            assert costs[0] == max(costs)
        assert costs != sorted(costs, reverse=True)

    def test_fewer_rows_than_ranks_repeat_some(self, packed):
        samplers = [TokenBudgetSampler([5, 6, 7], 20, 1, packed=packed, rank=r, world_size=5) for r in range(5)]

        rows = [row for sampler in samplers for batch in sampler for row in batch]

        assert [len(list(sampler)) for sampler in samplers] == [1] * 5
        assert samplers[0].repeated == 2
        assert len(rows) == 5
        assert set(rows) == {0, 1, 2}

    def test_at_most_so_many_rows(self, packed):
        sampler = TokenBudgetSampler(LENGTHS, 4096, 1, packed=packed, max_rows=3)

        assert max(map(len, sampler)) == 3

    def test_what_cannot_be_sampled_is_refused(self, packed):
        with pytest.raises(
            DataError, match="2 rows have more tokens than a batch may hold .100.; the longest is number 2"
        ):
            TokenBudgetSampler([5, 101, 103], 100, 1, packed=packed)
        with pytest.raises(DataError, match="no rows"):
            TokenBudgetSampler([], 100, 1, packed=packed)
        with pytest.raises(DataError, match="rank 2 of 2"):
            TokenBudgetSampler([5], 100, 1, packed=packed, rank=2, world_size=2)

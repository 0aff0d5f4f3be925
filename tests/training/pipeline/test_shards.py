"""Units of work are there whole or not at all, and the last rank joins what all have done."""

from pathlib import Path

import pytest

from metis_home.errors import OutputError
from metis_home.training.pipeline.shards import ShardFile

SETTINGS = {"samples": 4, "seed": 0}


def shard(out: Path, rank: int = 0, world_size: int = 1, **changes: object) -> ShardFile:
    file = ShardFile(out, rank, world_size, {**SETTINGS, **changes})
    file.open()
    return file


def test_what_is_finished_is_joined_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    file = shard(out)
    file.add(1, [{"row": 2}])
    file.add(0, [{"row": 0}, {"row": 1}])

    assert file.finish(2)
    assert out.read_text() == '{"row": 0}\n{"row": 1}\n{"row": 2}\n'
    assert sorted(tmp_path.iterdir()) == [out, file.settings_path]
    assert file.is_complete()


def test_a_unit_that_was_cut_is_done_again(tmp_path: Path) -> None:
    file = shard(tmp_path / "out.jsonl")
    file.add(0, [{"row": 0}])
    whole = file.path.read_bytes()
    file.add(1, [{"row": 1}])
    for cut in range(len(whole) + 1, file.path.stat().st_size):
        file.path.write_bytes(file.path.read_bytes()[:cut] if cut < file.path.stat().st_size else whole)

        assert shard(tmp_path / "out.jsonl").units == {0: [{"row": 0}]}
        again = shard(tmp_path / "out.jsonl")
        again.add(1, [{"row": 1}])
        assert shard(tmp_path / "out.jsonl").units == {0: [{"row": 0}], 1: [{"row": 1}]}


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    shard(tmp_path / "out.jsonl")

    with pytest.raises(OutputError, match="samples: 4 then, 8 now"):
        shard(tmp_path / "out.jsonl", samples=8)


def test_the_last_rank_joins_all(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first, second = shard(out, 0, 2), shard(out, 1, 2)
    first.add(0, [{"row": 0}])
    first.add(2, [{"row": 2}])

    assert not first.finish(3)
    assert not out.exists()

    second.add(1, [{"row": 1}])
    assert second.finish(3)
    assert out.read_text() == '{"row": 0}\n{"row": 1}\n{"row": 2}\n'

"""Padded batches hold every example unchanged. (Packed ones: tests/model/test_packing.py.)"""

import pytest
import torch

from metis_home.errors import DataError
from metis_home.training.data.collate import PackingCollator, PaddingCollator
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import load_records
from tests.model.pico import pico_config
from tests.training.data.test_encode import ROWS
from tests.training.data.tiny_rows import tiny_processor

IGNORE = -100


@pytest.fixture(scope="module")
def examples():
    encoder = Encoder(tiny_processor())
    return [encoder.example(record) for record in load_records(ROWS[:3])]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_surrounds_each_example(examples, side):
    batch = PaddingCollator(9, side)(examples)

    longest = max(map(len, examples))
    assert batch["input_ids"].shape == (3, longest)
    for row, example in enumerate(examples):
        kept = slice(0, len(example)) if side == "right" else slice(longest - len(example), longest)
        mask = batch["attention_mask"][row].bool()
        assert torch.equal(mask.nonzero().flatten(), torch.arange(longest)[kept])
        for name in ("input_ids", "labels", "mm_token_type_ids"):
            assert batch[name][row][kept].tolist() == getattr(example, name)
        assert set(batch["input_ids"][row][~mask].tolist()) <= {9}
        assert set(batch["labels"][row][~mask].tolist()) <= {IGNORE}
        assert not batch["mm_token_type_ids"][row][~mask].any()
    assert batch["router_labels"].tolist() == [1, 0, 0]
    assert batch["record_index"].tolist() == [0, 1, 2]


def test_images_of_all_rows_stand_one_after_the_other(examples):
    batch = PaddingCollator(0)(examples)

    assert torch.equal(batch["pixel_values"], torch.cat([examples[0].pixel_values, examples[1].pixel_values]))
    assert batch["image_grid_thw"].shape == (4, 3)
    assert "pixel_values" not in PaddingCollator(0)(examples[2:])


def test_a_packed_row_holds_every_example_in_order(examples):
    config = pico_config()
    config.vision_config.spatial_merge_size = 2

    batch = PackingCollator(config, 0)(examples)

    lengths = [len(example) for example in examples]
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert batch["position_ids"].shape == (4, 1, sum(lengths))
    for number, ids in enumerate(batch["input_ids"][0].split(lengths)):
        assert ids.tolist() == examples[number].input_ids
    assert batch["query_ids"][0].tolist() == [number for number, n in enumerate(lengths) for _ in range(n)]
    assert batch["record_index"].tolist() == [0, 1, 2]
    assert batch["image_grid_thw"].shape == (4, 3)
    assert "attention_mask" not in batch


def test_an_unknown_side_is_refused():
    with pytest.raises(DataError, match='side must be "right" or "left"'):
        PaddingCollator(0, "both")

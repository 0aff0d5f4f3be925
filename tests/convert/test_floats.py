"""The casts, against torch bit for bit: every bf16 and fp16 number, and float32 numbers around every tie."""

from pathlib import Path

import numpy as np
import pytest

from metis_home.convert import split, upcycle, verify
from metis_home.convert.floats import bf16_to_fp16, from_float32, to_float32
from metis_home.errors import CheckpointError
from tests.convert.pico import read_all, snapshot, tensors, write_dense

torch = pytest.importorskip("torch")
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_narrow_number_widens_as_in_torch(dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)

    ours = to_float32(bits.tobytes(), dtype)

    expected = torch.from_numpy(bits.view(np.int16)).view(TORCH[dtype]).float().numpy()
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.isnan(ours), ~numbers)
    assert np.array_equal(ours[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_is_to_nearest_even_as_in_torch(dtype: str) -> None:
    high = np.arange(2**16, dtype=np.uint32) << 16
    # below, at and above one half of the last place of bf16 and of fp16, and the largest remainder
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x3000], dtype=np.uint32)
    values = (high[:, None] | low[None, :]).reshape(-1).view(np.float32)

    ours = from_float32(values, dtype).view(np.int16)

    expected = torch.from_numpy(values).to(TORCH[dtype])
    numbers = ~torch.isnan(expected).numpy()
    assert np.array_equal(ours[numbers], expected.view(torch.int16).numpy()[numbers])
    assert np.isnan(to_float32(ours[~numbers].tobytes(), dtype)).all()


def test_every_bf16_number_becomes_the_fp16_number_of_torch() -> None:
    bits = np.arange(2**16, dtype=np.uint16)

    ours = bf16_to_fp16(bits).view(np.int16)

    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(torch.float16)
    numbers = ~torch.isnan(expected).numpy()
    assert np.array_equal(ours[numbers], expected.view(torch.int16).numpy()[numbers])
    assert np.isnan(ours[~numbers].view(np.float16)).all()


@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("option", "dtype"), [("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")])
def test_a_cast_conversion_equals_torch(source: str, option: str, dtype: str, tmp_path: Path) -> None:
    content = tensors(dtype=source)
    dense = write_dense(tmp_path / "d", content)

    upcycle(dense, tmp_path / "two", dtype=option, max_shard_size=9000)  # type: ignore[arg-type]
    split(tmp_path / "two", tmp_path / "back")
    verify(tmp_path / "two", dense)

    back = read_all(tmp_path / "back")
    for name, (_, shape, data) in content.items():
        wide = torch.from_numpy(to_float32(data, source).copy())
        expected = wide.to(TORCH[dtype]).view(torch.int16 if dtype != "F32" else torch.int32).numpy().tobytes()
        assert back[name] == (dtype, shape, expected), name
    config = snapshot(tmp_path / "two")["config.json"]
    assert {"bf16": b"bfloat16", "fp16": b"float16", "fp32": b"float32"}[option] in config
    assert read_all(tmp_path / "two")["model.router.hidden.weight"][0] == "F32"


def test_a_number_beyond_fp16_is_refused(tmp_path: Path) -> None:
    content = tensors()
    dtype, shape, _ = content["model.norm.weight"]
    content["model.norm.weight"] = (dtype, shape, np.full(8, 70000.0, np.float32).tobytes())
    dense = write_dense(tmp_path / "d", content)

    with pytest.raises(CheckpointError, match=r"'model.norm.weight' holds 70000; fp16 ends at 65504"):
        upcycle(dense, tmp_path / "out", dtype="fp16")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    upcycle(dense, tmp_path / "out", dtype="bf16")

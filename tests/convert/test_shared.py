"""Two sources whose shared weights differ: said with names and sizes, then done as asked."""

from pathlib import Path

import numpy as np
import pytest

from metis_home.branch import Branch
from metis_home.convert import Manifest, upcycle, verify
from metis_home.errors import CheckpointError
from tests.convert.pico import CONFIG, read_all, tensors, write_dense

NORM = "model.norm.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    one, other = tensors(ffn_seed=1), tensors(ffn_seed=2)
    one[NORM] = ("F32", (8,), np.full(8, 2.0, np.float32).tobytes())
    other[NORM] = ("F32", (8,), np.full(8, 3.0, np.float32).tobytes())
    return write_dense(tmp_path / "t", one), write_dense(tmp_path / "n", other)


def test_the_difference_is_named_and_measured(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        upcycle(pair[0], tmp_path / "out", pair[1])

    text = str(refused.value)
    assert "1 of 39 shared tensors differ" in text
    assert "model.norm.weight: relative norm 0.5, largest difference 1" in text  # |2 - 3| sqrt 8 / (2 sqrt 8)
    assert "--allow-shared-mismatch" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n", "t"]


@pytest.mark.parametrize(("choice", "value"), [("thinking", 2.0), ("non-thinking", 3.0), ("average", 2.5)])
def test_what_is_kept_is_what_was_asked_for(choice: str, value: float, pair: tuple[Path, Path], tmp_path: Path) -> None:
    upcycle(pair[0], tmp_path / "out", pair[1], allow_shared_mismatch=True, shared_from=choice)  # type: ignore[arg-type]

    assert np.frombuffer(read_all(tmp_path / "out")[NORM][2], np.float32).tolist() == [value] * 8
    found = verify(tmp_path / "out", *pair)
    manifest = Manifest.read(tmp_path / "out")
    assert [d["name"] for d in manifest.shared_mismatch] == [NORM]
    exact = {branch.label for branch, record in manifest.branches.items() if record.exact}
    assert exact == {choice} & {"thinking", "non-thinking"}
    assert found.compared[Branch.THINKING.label] == (44 if choice == "non-thinking" else 45)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The sources differed in 1 shared tensors" in card
    assert "license: apache-2.0" in card


def test_the_average_of_equal_weights_is_their_own_bits(tmp_path: Path) -> None:
    one, other = tensors(ffn_seed=1), tensors(ffn_seed=2)
    other[NORM] = ("F32", (8,), bytes(32))
    a, b = write_dense(tmp_path / "t", one), write_dense(tmp_path / "n", other)

    upcycle(a, tmp_path / "out", b, allow_shared_mismatch=True, shared_from="average")

    two = read_all(tmp_path / "out")
    assert all(two[name] == one[name] for name in one if ".mlp." not in name and name != NORM)


@pytest.mark.parametrize(
    ("field", "change"),
    [("rms_norm_eps", {"rms_norm_eps": 1e-6}), ("rope_theta", {"rope_parameters": {"rope_theta": 5.0}})],
)
def test_configs_that_compute_otherwise_are_no_pair(field: str, change: dict, tmp_path: Path) -> None:
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], **change}}  # type: ignore[dict-item]
    a, b = write_dense(tmp_path / "t"), write_dense(tmp_path / "n", config=config)

    with pytest.raises(CheckpointError, match=field):
        upcycle(a, tmp_path / "out", b)


def test_flat_and_nested_configs_of_one_model_are_a_pair(tmp_path: Path) -> None:
    text = dict(CONFIG["text_config"])  # type: ignore[call-overload]
    rope = text.pop("rope_parameters")
    flat = {k: v for k, v in CONFIG.items() if k != "text_config"} | {
        k: v for k, v in text.items() if k != "model_type"
    }
    flat |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    a, b = write_dense(tmp_path / "t", ffn_seed=1), write_dense(tmp_path / "n", config=flat, ffn_seed=2)

    upcycle(a, tmp_path / "one", b)
    upcycle(b, tmp_path / "two", a)

    verify(tmp_path / "one", a, b)
    verify(tmp_path / "two", b, a)

"""`calibrate`: both branches once, then arithmetic; and one field of one file."""

import json
import os
import shutil

import pytest

from metis_home.errors import CheckpointError, DataError, OutputError
from metis_home.training.evaluation import Target, calibrate, evaluate, write_threshold
from metis_home.training.evaluation.calibration import _auto_differs
from tests.training.evaluation.material import SHORT, completion, records


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return records(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def calibrated(loaded, asked, tmp_path_factory):
    directory = tmp_path_factory.mktemp("calibrated")
    target = Target(kind="thinking_ratio", value=0.5)
    return calibrate(*loaded, asked, target, out_dir=directory, **{**SHORT, "plots": True}), directory


def test_the_picked_threshold_does_on_the_data_what_the_curve_says(calibrated, loaded, asked, tmp_path) -> None:
    found, _ = calibrated

    routed = evaluate(*loaded, asked, out_dir=tmp_path, threshold=found.picked.threshold, **SHORT)

    assert found.picked.thinking_ratio == 0.5
    assert routed.modes["auto"].all.thinking.value == 0.5
    assert found.current.threshold == 0.5  # what the model had


def test_the_curve_and_the_pick_are_written_down(calibrated) -> None:
    from PIL import Image

    found, directory = calibrated
    written = json.loads((directory / "calibration.json").read_text())

    assert written["picked"]["threshold"] == found.picked.threshold
    assert len(written["curve"]) == len(found.curve) == 7
    assert {"queries", "tied", "unscored", "settings", "environment", "model", "data"} <= written.keys()
    with Image.open(directory / "tradeoff.png") as drawn:
        assert len(set(drawn.convert("L").resize((200, 80)).tobytes())) > 20


def test_answers_of_an_evaluation_are_used(loaded, asked, tmp_path, monkeypatch) -> None:
    evaluate(*loaded, asked, thinking=("auto", "on", "off"), out_dir=tmp_path, **SHORT)
    monkeypatch.setattr(loaded[0], "generate", lambda **inputs: pytest.fail("generated again"))

    found = calibrate(*loaded, asked, Target(kind="mean_tokens", value=100), out_dir=tmp_path, **SHORT)

    assert found.queries == 6
    assert found.auto_differs is not None


def test_an_unreachable_target_is_an_error_after_which_nothing_is_lost(loaded, asked, tmp_path) -> None:
    with pytest.raises(DataError, match=r"tokens per query: .* between"):
        calibrate(*loaded, asked[:2], Target(kind="mean_tokens", value=1), out_dir=tmp_path, **SHORT)

    assert calibrate(*loaded, asked[:2], Target(kind="mean_tokens", value=99), out_dir=tmp_path, **SHORT).queries == 2


def test_a_dense_model_has_no_router_to_calibrate(dense_directory, asked, tmp_path) -> None:
    from metis_home.training.loading import load_model, load_processor

    dense = load_model(str(dense_directory), device="cpu"), load_processor(str(dense_directory))
    with pytest.raises(CheckpointError, match="no router"):
        calibrate(*dense, asked, Target(kind="accuracy", value=0), out_dir=tmp_path, **SHORT)


def test_answers_that_auto_gave_differently_are_counted() -> None:
    prefixed = {"prefix": "<think>", "completion": "a</think>b"}
    rows = [
        completion("a", "on", **prefixed),
        completion("a", "auto", branch="thinking", completion="<think>a</think>b"),
        completion("b", "off", prefix="<think></think>", completion="c"),
        completion("b", "auto", branch="non-thinking", completion="c"),
    ]

    assert _auto_differs(rows) == 1
    assert _auto_differs([row for row in rows if row.thinking != "auto"]) is None


# ---- the model's file -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(model_directory, tmp_path):
    return shutil.copytree(model_directory, tmp_path / "model")


def test_only_the_threshold_changes(model) -> None:
    path = model / "generation_config.json"
    before = {"router_threshold": 0.5, "temperature": 0.1, "unknown_field": [1, "ü"], "_from_model_config": False}
    path.write_text(json.dumps(before))
    path.chmod(0o640)
    others = {file.name: file.read_bytes() for file in model.iterdir() if file != path}

    changed = write_threshold(model, 0.3125)

    assert changed == ["router_threshold"]
    after = json.loads(path.read_text())
    assert after == {**before, "router_threshold": 0.3125}
    assert list(after) == list(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert {file.name: file.read_bytes() for file in model.iterdir() if file != path} == others


@pytest.mark.parametrize("before", ["{}", '{"_from_model_config": true}', None, "as saved"])
def test_the_model_uses_the_threshold_when_it_is_loaded_again(model, before) -> None:
    from transformers import AutoModelForImageTextToText

    import metis_home  # noqa: F401  registers the model

    path = model / "generation_config.json"
    if before is None:
        path.unlink()
    elif before != "as saved":
        path.write_text(before)

    write_threshold(model, 0.4195623993873596)

    assert AutoModelForImageTextToText.from_pretrained(model).generation_config.router_threshold == 0.4195623993873596
    assert write_threshold(model, 0.4195623993873596) == []


def test_a_linked_file_is_replaced_and_what_it_links_to_stays(model, tmp_path) -> None:
    path, source = model / "generation_config.json", tmp_path / "shared.json"
    path.rename(source)
    before = source.read_bytes()
    path.symlink_to(source)

    write_threshold(model, 0.25)

    assert source.read_bytes() == before
    assert json.loads(path.read_text())["router_threshold"] == 0.25


def test_a_write_that_fails_leaves_the_old_file(model, monkeypatch) -> None:
    path = model / "generation_config.json"
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_threshold(model, 0.25)

    assert path.read_bytes() == before
    assert not list(model.glob(".*partial"))


def test_what_is_no_model_directory_is_refused(tmp_path, model) -> None:
    with pytest.raises(OutputError, match="not a local model directory"):
        write_threshold(tmp_path / "some" / "hub-id", 0.5)
    (model / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        write_threshold(model, 0.5)

"""`metis-home pass-rates --server`: answers come from the server, and no weights are loaded here."""

import json
from pathlib import Path
from typing import Any

import pytest

from metis_home.cli import main
from metis_home.training.data.records import write_rows
from tests.processing.tiny import write_dense_model, write_model
from tests.training.rl.pico_rl import dense, processor
from tests.training.rollouts.local_server import LocalServer, running


def arguments(kind: str, folder: Path) -> list[str]:
    model = (write_dense_model if kind == "dense" else write_model)(folder / "model")
    (model / "model.safetensors").unlink()
    write_rows(folder / "prompts.jsonl", [{"id": f"q{n}", "prompt": f"{n}?", "solution": str(n)} for n in range(3)])
    options = ["--samples", "2", "--max-new-tokens", "3", "--prompts-per-unit", "2", "--top-p", "0.9"]
    return ["pass-rates", str(model), str(folder / "prompts.jsonl"), "--out", str(folder / "rates.jsonl"), *options]


@pytest.mark.parametrize("kind", ["dense", "two-branch"])
def test_pass_rates_are_of_a_servers_answers(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(LocalServer(dense(), processor(), max_model_len=2000)) as server:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments(kind, tmp_path), "--server", server.url])
        asked: list[dict[str, Any]] = [body for path, body in server.requests if path == "/inference/v1/generate"]

    assert not stopped.value.code, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "rates.jsonl").read_text().splitlines()]
    assert [(row["id"], len(row["completions"])) for row in rows] == [("q0", 2), ("q1", 2), ("q2", 2)]
    assert [body["sampling_params"]["n"] for body in asked] == [2, 2, 2]
    assert {body["sampling_params"]["top_p"] for body in asked} == {0.9}


def test_a_server_that_is_down_is_an_error_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metis_home.training.rollouts.vllm_client.time.sleep", lambda seconds: None)

    with pytest.raises(SystemExit) as stopped:
        main([*arguments("dense", tmp_path), "--server", "http://127.0.0.1:9"])

    assert stopped.value.code == 1
    assert "Is the server up" in capsys.readouterr().err

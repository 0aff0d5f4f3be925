"""Our model inside the real VLMEvalKit: registered, asked a small data set, its thoughts split off, read by think-ratio.

VLMEVAL_TEST_PYTHON names the interpreter of an environment that holds VLMEvalKit and this package (tests/adapters/run.sh).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from metis_home.training.evaluation.think_ratio import think_ratios
from tests.adapters.small_tasks import TASK, write_vlmeval_rows
from tests.processing.tiny import write_model

PYTHON = os.environ.get("VLMEVAL_TEST_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="VLMEVAL_TEST_PYTHON names no environment with VLMEvalKit (make test-adapters)"
)


def test_the_kit_gets_our_answers_and_their_thoughts(tmp_path) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_vlmeval_rows(tmp_path / "data")
    script = Path(__file__).with_name("run_vlmeval.py")
    command = [PYTHON, str(script), str(model), TASK, str(tmp_path / "router.jsonl")]
    command += ["--judge", "exact_matching", "--work-dir", str(tmp_path / "out")]
    # A table of text: this environment reads it without a spreadsheet library.
    environment = {**os.environ, "LMUData": str(tmp_path / "data"), "SPLIT_THINK": "True", "PRED_FORMAT": "tsv"}

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = [path for path in (tmp_path / "out").rglob(f"*{TASK}.*") if path.suffix in (".tsv", ".xlsx")]
    whole, colour, shape = think_ratios(file, sidecar=[tmp_path / "router.jsonl"])
    assert (whole.thinking.value, whole.thinking.total, whole.unmatched) == (1.0, 5, 0)
    assert 0 < whole.mean_probability < 1
    assert (colour.subject, colour.thinking.total, shape.thinking.total) == ("colour", 3, 2)
    logged = [json.loads(line) for line in (tmp_path / "router.jsonl").read_text().splitlines()]
    assert [row["task"] for row in logged] == [TASK] * 5
    assert '"accuracy": 0.0' in done.stdout + done.stderr

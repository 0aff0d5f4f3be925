"""Our model inside the real lmms-eval: found by its entry point, asked a small task, scored, read by think-ratio.

LMMS_EVAL_TEST_PYTHON names the interpreter of an environment that holds lmms-eval and this package (tests/adapters/run.sh).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from metis_home.chat import answer
from metis_home.training.evaluation.think_ratio import think_ratios
from metis_home.training.loading import load_model, load_processor
from tests.adapters.small_tasks import QUESTIONS, TASK, write_lmms_task
from tests.processing.tiny import write_dense_model, write_model

PYTHON = os.environ.get("LMMS_EVAL_TEST_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="LMMS_EVAL_TEST_PYTHON names no environment with lmms-eval (make test-adapters)"
)


def run_kit(folder: Path, include: Path, **model_args: object) -> tuple[dict, list[dict], Path]:
    """Run lmms-eval's own command; returns (results, samples, samples file)."""
    out = folder / "out"
    arguments = ",".join(f"{name}={value}" for name, value in {"max_new_tokens": 12, **model_args}.items())
    command = [PYTHON, "-m", "lmms_eval", "--model", "metis_home", "--model_args", arguments]
    command += ["--include_path", str(include), "--tasks", TASK, "--batch_size", "2", "--device", "cpu"]
    command += ["--output_path", str(out), "--log_samples"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (samples,) = out.rglob(f"*_samples_{TASK}.jsonl")
    (results,) = out.rglob("*_results.json")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"][TASK], sorted(rows, key=lambda row: row["doc_id"]), samples


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    return write_lmms_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "home")


def test_the_kit_gets_our_answers_and_the_router_is_logged(model, task, tmp_path) -> None:
    results, samples, file = run_kit(
        tmp_path, task, pretrained=model, route="think", system_prompt="none", router_log=tmp_path / "router.jsonl"
    )

    loaded, processor = load_model(str(model), device="cpu").eval(), load_processor(str(model))
    for row, (question, _, _) in zip(samples, QUESTIONS, strict=True):
        content = [{"type": "image", "image": row["input_media"][0]}, {"type": "text", "text": question}]
        alone = answer(
            loaded, processor, [{"role": "user", "content": content}], thinking=True, max_new_tokens=12, do_sample=False
        )
        assert row["filtered_resps"] == "<think>" + alone.text  # cut in the thought, so the kit strips nothing
    assert results["exact_match,none"] == 0
    (whole,) = think_ratios(file, sidecar=[tmp_path / "router.jsonl"])
    assert (whole.benchmark, whole.thinking.value, whole.thinking.total, whole.unmatched) == (TASK, 1.0, 5, 0)
    assert 0 < whole.mean_probability < 1


def test_the_router_decides_by_default(model, task, tmp_path) -> None:
    _, _, file = run_kit(
        tmp_path, task, pretrained=model, threshold=0, router_log=tmp_path / "router.jsonl", system_prompt="none"
    )

    (whole,) = think_ratios(file, sidecar=[tmp_path / "router.jsonl"])
    assert whole.thinking.value == 1.0  # at threshold 0 everybody thinks


def test_a_dense_model_runs_in_the_same_harness(task, tmp_path) -> None:
    dense = write_dense_model(tmp_path / "dense")

    results, samples, _ = run_kit(tmp_path, task, pretrained=dense, system_prompt="none")

    assert len(samples) == 5
    assert "exact_match,none" in results

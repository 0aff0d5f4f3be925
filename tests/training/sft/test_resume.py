"""A resumed run is the uninterrupted one, bit for bit: weights, optimizer, random numbers, order of rows, logs."""

import json
from pathlib import Path

import pytest
import torch

from tests.training.sft.small import records, small_model, trainer

# Wall-clock and process numbers are not part of a run's result.
NOT_REPEATABLE = ("per_second", "memory_gib", "runtime")
SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "logging_steps": 2, "data_seed": 5}

PADDED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
BY_TOKENS = {"max_tokens_per_batch": 400, "gradient_accumulation_steps": 2}
PACKED = {"max_tokens_per_batch": 400, "packing": True}


def run_with_order(out: Path, settings: dict, *, resume: str | None = None, stop_at: int | None = None):
    """Train and return the trainer with the order in which rows were used."""
    import transformers

    order = []

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop_at:
                control.should_save = control.should_training_stop = True
            return control

    run = trainer(out, records(14), small_model(), weight_decay=0.01, **SAVING, **settings)
    run.add_callback(Stop())
    compute = run.compute_loss

    def noted(model, inputs, *args, **kwargs):
        order.append(inputs["record_index"].tolist())
        return compute(model, inputs, *args, **kwargs)

    run.compute_loss = noted
    run.train(resume_from_checkpoint=resume)
    return run, order


def repeatable(log_history: list[dict]) -> list[dict]:
    entries = [entry for entry in log_history if "loss" in entry]
    return [{k: v for k, v in entry.items() if not any(word in k for word in NOT_REPEATABLE)} for entry in entries]


@pytest.mark.parametrize("settings", [PADDED, BY_TOKENS, PACKED], ids=["padded", "by tokens", "packed"])
def test_three_steps_and_three_after_a_resume_are_six_steps(tmp_path, settings: dict) -> None:
    whole, order = run_with_order(tmp_path / "whole", settings)
    _, first = run_with_order(tmp_path / "halves", settings, stop_at=3)

    second, rest = run_with_order(tmp_path / "halves", settings, resume=str(tmp_path / "halves" / "checkpoint-3"))

    assert first + rest == order
    assert len({str(batch) for batch in order}) > 4  # shuffled: epochs differ
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    ours, theirs = (tmp_path / name / "checkpoint-6" for name in ("halves", "whole"))
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert_same(torch.load(ours / file, weights_only=False), torch.load(theirs / file, weights_only=False), file)
    assert repeatable(second.state.log_history) == repeatable(whole.state.log_history)
    saved = json.loads((theirs / "trainer_state.json").read_text())
    assert saved["global_step"] == 6


def assert_same(left: object, right: object, where: str) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert bool((left == right) if not hasattr(left, "shape") else (left == right).all()), where

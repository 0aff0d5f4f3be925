"""Evaluation: both losses of the whole data set, whatever the batches; logs, plots and saved models."""

import pytest
import torch
import transformers

from metis_home import MetisHomeForConditionalGeneration, MetisHomeProcessor
from metis_home.errors import TrainingError, UnsupportedError
from metis_home.training.sft import MetisSFTTrainer
from metis_home.training.sft.plots import draw_curves
from tests.training.sft.oracle import by_hand
from tests.training.sft.small import batch_of, config, processor, records, rows, small_model, trainer


@pytest.mark.parametrize("per_batch", [1, 3, 8])
def test_the_evaluation_loss_is_the_definitions_for_every_batch_size(tmp_path, per_batch: int) -> None:
    held_out = records(8, unlabelled=(4, 5))
    run = trainer(tmp_path, records(2), per_device_eval_batch_size=per_batch, router_loss_weight=0.5)

    metrics = run.evaluate(held_out)

    loss, _ = by_hand(8, (4, 5), router_weight=0.5)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_lm_loss"] + 0.5 * metrics["eval_router_loss"])
    assert 0 <= metrics["eval_router_ece"] <= 1


def test_rows_without_any_router_label_still_have_an_evaluation_loss(tmp_path) -> None:
    run = trainer(tmp_path, records(2), freeze=["router"])
    without = run.evaluate(records(4, unlabelled=(0, 1, 2, 3)))

    assert without["eval_loss"] == pytest.approx(without["eval_lm_loss"])
    assert "eval_router_loss" not in without
    assert "eval_thinking_ratio" in without  # the router routed them

    batch = run._eval_collator([run._dataset(records(2))[index] for index in range(2)])
    del batch["router_labels"]
    loss, _, _ = run.prediction_step(run.model.eval(), batch, prediction_loss_only=True)
    assert torch.isfinite(loss)


def test_several_evaluation_sets_are_reported_by_name(tmp_path) -> None:
    run = MetisSFTTrainer(
        small_model(),
        config(tmp_path, eval_strategy="steps", eval_steps=2, per_device_train_batch_size=2),
        train_dataset=records(4),
        eval_dataset={"few": rows(2), "more": rows(4)},
        processing_class=processor(),
    )

    run.train()

    names = {name for entry in run.state.log_history for name in entry}
    assert {
        "eval_few_loss",
        "eval_more_loss",
        "eval_more_thinking_ratio/sums",
        "lm_loss_thinking",
        "router_auc",
    } <= names


def test_the_training_log_is_the_mean_over_its_steps(tmp_path) -> None:
    fine = trainer(tmp_path, records(8), per_device_train_batch_size=2, max_steps=4, logging_steps=1)
    coarse = trainer(tmp_path, records(8), per_device_train_batch_size=2, max_steps=4, logging_steps=4)

    fine.train()
    coarse.train()

    losses = [entry["loss"] for entry in fine.state.log_history if "loss" in entry]
    assert coarse.state.log_history[0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert len(losses) == 4


def test_a_saved_model_loads_with_its_processor_and_knows_that_its_router_is_trained(tmp_path) -> None:
    run = trainer(tmp_path, records(4))
    assert run.model.config.router_trained is False

    run.train()
    run.save_model(str(tmp_path / "saved"))

    model = MetisHomeForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert model.config.router_trained is True
    assert model.config.text_config.use_cache is True  # Trainer switches caches off while it trains
    assert "use_cache" not in model.config.to_dict()
    assert model.generation_config.use_cache is not False
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert isinstance(MetisHomeProcessor.from_pretrained(tmp_path / "saved"), MetisHomeProcessor)
    frozen = trainer(tmp_path, records(4), freeze=["router"])
    frozen.train()
    assert frozen.model.config.router_trained is False


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path) -> None:
    run = MetisSFTTrainer(
        small_model(),
        config(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="router_ece",
        ),
        train_dataset=records(4),
        eval_dataset=records(4),
        processing_class=processor(),
    )

    run.train()

    best = MetisHomeForConditionalGeneration.from_pretrained(run.state.best_model_checkpoint)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, best.state_dict()[name]), name


def test_tensorboard_gets_the_curves_and_pictures_are_drawn(tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    run = trainer(tmp_path / "out", records(4), report_to="tensorboard", plots=True, per_device_train_batch_size=4)

    run.train()

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"train/loss", "train/lm_loss_thinking", "train/router_auc", "train/thinking_ratio/sums"} <= {
        *events.Tags()["scalars"]
    }
    drawn = {path.stem for path in (tmp_path / "out" / "plots").glob("*.png")}
    assert {"losses", "router", "thinking_ratio", "optimizer", "learning_rate", "throughput"} <= drawn


def test_nothing_is_drawn_of_an_empty_log(tmp_path) -> None:
    pytest.importorskip("matplotlib")

    assert draw_curves([{"step": 1, "epoch": 0.1}], tmp_path) == []


def test_wrong_arguments_are_named(tmp_path) -> None:
    args = config(tmp_path)
    dense = transformers.Qwen2_5_VLForConditionalGeneration.__new__(transformers.Qwen2_5_VLForConditionalGeneration)

    with pytest.raises(TrainingError, match="metis-home convert"):
        MetisSFTTrainer(dense, args, train_dataset=rows(2), processing_class=processor())
    with pytest.raises(TrainingError, match="processing_class"):
        MetisSFTTrainer(small_model(), args, train_dataset=rows(2))
    with pytest.raises(TrainingError, match="MetisSFTConfig"):
        MetisSFTTrainer(small_model(), transformers.TrainingArguments(output_dir=str(tmp_path)), train_dataset=rows(2))
    with pytest.raises(TrainingError, match="no rows"):
        trainer(tmp_path, [])
    with pytest.raises(UnsupportedError, match="liger"):
        trainer(tmp_path, records(2), use_liger_kernel=True)


@pytest.mark.parametrize("sets", [None, ["router"]])
def test_predictions_come_with_labels(tmp_path, sets: list[str] | None) -> None:
    run = trainer(tmp_path, records(2), train_only=sets, per_device_eval_batch_size=4)

    output = run.predict(records(4))

    assert output.metrics["test_loss"] > 0
    classes = 2 if sets else len(processor().tokenizer)
    assert output.predictions.shape == (*output.label_ids.shape, classes)


def test_weights_in_16_bits_are_warned_of(tmp_path, caplog) -> None:
    trainer(tmp_path, records(2), small_model().bfloat16(), train_only=["thinking_branch"])
    assert "torch.bfloat16" in caplog.text

    caplog.clear()
    trainer(tmp_path, records(2))
    assert "rounded away" not in caplog.text


def test_a_record_that_fills_up_the_last_batch_of_a_distributed_run_counts_once(tmp_path) -> None:
    run = trainer(tmp_path, records(3))
    batches = [batch_of(rows(3)), batch_of(rows(1))]  # the first row again
    for batch in batches:
        run.prediction_step(run.model.eval(), batch, prediction_loss_only=True)

    once = run._eval_journal.report(lambda index: "all", 1.0, each_record_once=True)

    expected = run.evaluate(records(3))
    for name in ("lm_loss", "router_loss", "thinking_ratio", "router_ece"):
        assert once[name] == pytest.approx(expected[f"eval_{name}"], rel=1e-6), name

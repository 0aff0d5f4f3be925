"""HDPO, KL, adapters, Qwen3-VL, the completions table, plots, truncation: each in a small run."""

import json

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from metis_home.training.rl import MetisRLTrainer
from metis_home.training.rl.plots import PLOTS
from tests.processing.tiny import model_fields, tiny_tokenizer
from tests.training.rl.pico_rl import config, dense, processor, records, trainer, two_branch, vowels


def log_of(built) -> list[dict[str, float]]:
    return [entry for entry in built.state.log_history if "loss" in entry]


def correct(completions, completion_ids, **columns) -> list[float]:
    return [float(sum(ids) % 3 != 0) for ids in completion_ids]


def efficiency_reward(completions, completion_ids, **columns) -> list[float]:
    return [1 / (1 + sum(ids) % 5) if sum(ids) % 3 != 0 else 0.0 for ids in completion_ids]


@pytest.mark.parametrize("compat", [None, "reference"])
def test_hdpo_trains_with_two_advantages(tmp_path, compat) -> None:
    built = trainer(
        tmp_path,
        rewards=[correct, vowels, efficiency_reward],
        advantage="hdpo",
        hdpo_compat=compat,
        num_generations=8,
        reward_weights=[0.9, 0.1, 1.0],
        dynamic_sampling=False,
        max_steps=2,
        updates_per_rollout=2,
    )
    built.train()

    samples = built.buffer.samples
    members = [sample for sample in samples if sample.is_tool_member]
    assert members
    assert all(sample.rewards["efficiency_reward"] > 0 and sample.is_correct for sample in members)
    assert any(sample.tool_advantage for sample in members)
    assert all(sample.tool_advantage == 0 for sample in samples if not sample.is_tool_member)
    assert all(0 <= sample.reward <= 1 for sample in samples)  # efficiency is no part of it
    assert len(log_of(built)) == 2


def test_kl_starts_at_zero_and_holds_the_policy_back(tmp_path) -> None:
    distances = {}
    for coef in (1e-9, 5.0):
        model = dense()
        built = trainer(tmp_path, model, kl_coef=coef, max_steps=4, learning_rate=3e-3)
        built.train()
        log = log_of(built)
        assert log[0]["kl/ref"] == pytest.approx(0, abs=1e-6)
        distances[coef] = log[-1]["kl/ref"]

    assert distances[1e-9] > 1e-4
    assert distances[5.0] < 0.7 * distances[1e-9]


def test_adapters_train_alone_and_the_model_without_them_is_the_reference(tmp_path) -> None:
    from peft import LoraConfig

    from metis_home.training.rl import MetisRLTrainer
    from tests.training.rl.pico_rl import config, processor, records

    model = dense()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapter = LoraConfig(r=2, target_modules="model.language_model.*(q_proj|v_proj)", init_lora_weights=False)
    built = MetisRLTrainer(
        model, config(tmp_path, kl_coef=0.1, max_steps=2), [vowels], records(), processor(), peft_config=adapter
    )
    start = {n: p.clone() for n, p in built.model.named_parameters() if p.requires_grad}
    built.train()

    assert all("lora" in name for name in start)
    after = dict(built.model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in start.items())
    plain = {name.replace(".base_layer", ""): value for name, value in built.base.named_parameters()}
    assert all(torch.equal(plain[name], value) for name, value in before.items())
    assert log_of(built)[0]["kl/ref"] > 1e-4  # random adapters differ from no adapter
    assert log_of(built)[0]["ratio/max"] == 1


def test_qwen3_vl_trains(tmp_path) -> None:
    fields = model_fields(tiny_tokenizer())
    vision = fields["vision_config"]
    kept = (
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "out_hidden_size",
        "patch_size",
        "spatial_merge_size",
    )
    fields["vision_config"] = {
        **{name: vision[name] for name in kept},
        "temporal_patch_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    fields["text_config"]["head_dim"] = 8
    fields["text_config"]["rope_parameters"] = {**fields["text_config"]["rope_parameters"], "mrope_interleaved": True}
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**fields))
    before = model.lm_head.weight.detach().clone()

    built = trainer(tmp_path, model, max_steps=2, updates_per_rollout=2, old_logprobs="recompute")
    built.train()

    assert not torch.equal(model.lm_head.weight, before)
    assert log_of(built)[0]["ratio/max"] == 1


def test_the_likelihood_of_correct_rollouts_rises_with_the_nll_term(tmp_path) -> None:
    values = []
    for coef in (0.0, 10.0):
        model = dense()
        built = trainer(
            tmp_path, model, rewards=[correct], nll_coef=coef, max_steps=1, learning_rate=1e-2, dynamic_sampling=False
        )
        built.train()
        good = {n: sample for n, sample in enumerate(built.buffer.samples) if sample.is_correct}
        after = built.updater.score_samples(model, built.buffer.samples, built.buffer.steps)
        values.append(sum(sum(after[n]) - sum(sample.rollout.logprobs) for n, sample in good.items() if n in after))

    assert values[1] > values[0]


def test_cut_answers_can_be_left_out(tmp_path) -> None:
    built = trainer(tmp_path, mask_truncated=True, dynamic_sampling=False, max_steps=1)
    built.train()

    for sample in built.buffer.samples:
        assert (sample.tokens > 0) == sample.rollout.finished
    assert log_of(built)[0]["length/truncated_fraction"] > 0


def test_the_table_has_image_answer_rewards_and_branch_and_the_plots_are_drawn(tmp_path) -> None:
    built = trainer(
        tmp_path,
        two_branch(),
        rewards=[vowels, correct],
        reward_weights=[1.0, 0.0],
        correct_reward="correct",
        thinking="sample",
        log_completions=True,
        plots=True,
        max_steps=2,
    )
    built.train()

    rows = [json.loads(line) for line in (tmp_path / "completions/rank0.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2}
    assert {row["branch"] for row in rows} == {"thinking", "non-thinking"}
    first = next(row for row in rows if row["images"])
    assert Image.open(tmp_path / "completions" / first["images"][0]).size == (56, 56)
    assert first["rewards"]["vowels"] == first["reward"]
    assert set(first) >= {"prompt", "completion", "answer", "gold", "tokens", "finished", "tool_calls", "prompt_id"}
    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert drawn == {*PLOTS, "router_confidence", "router_calibration"} - {"tool_calls", "tool_failures"}
    for path in (tmp_path / "plots").iterdir():
        assert Image.open(path).size[0] > 300


def test_a_row_whose_writing_was_cut_is_forgotten(tmp_path) -> None:
    fields = {"log_completions": True, "save_strategy": "steps", "save_steps": 1}
    first = trainer(tmp_path, max_steps=2, **fields)
    first.train()
    whole = first.completions.path.read_text(encoding="utf-8")
    first.completions.path.write_text(whole + whole.splitlines()[0][:50], encoding="utf-8")

    trainer(tmp_path, max_steps=3, **fields).train(resume_from_checkpoint=True)

    rows = [json.loads(line) for line in first.completions.path.read_text(encoding="utf-8").splitlines()]
    assert {row["step"] for row in rows} == {1, 2, 3}


def test_dropout_is_off_where_log_probabilities_are_compared(tmp_path) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "gate_proj"], lora_dropout=0.5, init_lora_weights=False)
    built = MetisRLTrainer(
        dense(),
        config(tmp_path, passes_per_rollout=2, old_logprobs="recompute"),
        [vowels],
        records(),
        processor(),
        peft_config=lora,
    )

    built.train()  # the self-check passes

    old = [sample for sample in built.buffer.samples if sample.old_logprobs]
    assert old
    for sample in old:
        assert sample.old_logprobs == pytest.approx(sample.rollout.logprobs, abs=1e-4)


def test_adapters_on_frozen_parts_do_not_train(tmp_path) -> None:
    from peft import LoraConfig

    def trained(model, **fields) -> list[str]:
        lora = LoraConfig(r=2, target_modules=["q_proj", "gate_proj"])
        built = MetisRLTrainer(model, config(tmp_path, **fields), [vowels], records(), processor(), peft_config=lora)
        return [name for name, parameter in built.model.named_parameters() if parameter.requires_grad]

    text_only = set(trained(dense()))
    assert text_only
    assert not [name for name in text_only if ".visual." in name]
    assert set(trained(dense(), freeze_vision=False)) > text_only
    both = trained(two_branch(), thinking=True)
    assert [name for name in both if ".experts.1." in name]
    chosen = trained(two_branch(), thinking=True, freeze=["vision", "thinking_branch"])
    assert chosen
    assert not [name for name in chosen if ".visual." in name or ".experts.1." in name]


def test_kl_can_be_logged_without_a_loss(tmp_path) -> None:
    logs = {}
    for fields in ({}, {"log_kl": True}):
        model = dense()
        built = trainer(tmp_path, model, max_steps=3, **fields)
        built.train()
        logs[len(fields)] = ([entry.get("kl/ref") for entry in log_of(built)], model.state_dict())

    assert logs[0][0] == [None] * 3
    assert logs[1][0][0] == pytest.approx(0, abs=1e-6)
    assert logs[1][0][2] > 0
    assert all(torch.equal(value, logs[1][1][name]) for name, value in logs[0][1].items())


def test_an_epoch_shows_every_prompt_once_however_many_passes(tmp_path) -> None:
    built = trainer(tmp_path, max_steps=-1, num_train_epochs=1, passes_per_rollout=3, dynamic_sampling=False)
    built.train()

    assert built.state.global_step == 9
    assert built.source.state_dict() == {"epoch": 0, "position": 6}


def test_numbers_that_are_none_stop_the_run_before_the_weights_change(tmp_path) -> None:
    from metis_home.errors import TrainingError

    model = dense()
    built = trainer(tmp_path, model, max_steps=1, self_check=False)
    before = model.lm_head.weight.detach().clone()
    original = built.updater.presence.ensured

    def spoil(batch):
        model.model.language_model.norm.weight.data[0] = float("nan")
        return original(batch)

    built.updater.presence.ensured = spoil

    with pytest.raises(TrainingError):
        built.train()

    assert torch.equal(model.lm_head.weight, before)

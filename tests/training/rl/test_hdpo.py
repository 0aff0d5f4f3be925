"""HDPO with tools in the real trainer, against two surrogates that are written out by hand, rollout by rollout."""

import json
import logging
import math
from statistics import mean, stdev

import pytest
import torch

from metis_home.errors import RecipeError
from metis_home.training.advantages import grpo_advantages, hdpo_advantages
from metis_home.training.rl import MetisRLConfig, MetisRLTrainer
from metis_home.training.rl.tools import describe_tools
from metis_home.training.rl.update import Updater
from metis_home.training.rollouts.tool_rollouts import ToolRollouts
from tests.training.rl.pico_rl import config
from tests.training.rollouts.pico_tools import END, WORDS, Echo, caller, rows, tool_processor

PROCESSOR = tool_processor()
REWARDS = ("accuracy_reward", "format_reward", "efficiency_reward")
HDPO = {
    "advantage": "hdpo",
    "reward_weights": [0.9, 0.1, 0.0],
    "num_generations": 8,
    "prompts_per_step": 4,
    "max_completion_tokens": 250,
    "dynamic_sampling": False,
    "describe_tools": False,  # 600 tokens of this tokenizer
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "loss_aggregation": "token_mean",
}


def trainer(folder, model=None, *, objects=None, **fields) -> MetisRLTrainer:
    model = caller(PROCESSOR) if model is None else model
    # Gradient descent of rate 1: the change of the weights is the gradient.
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if ".visual." not in n], lr=1.0)
    return MetisRLTrainer(
        model,
        config(folder, **{**HDPO, **fields}),
        list(REWARDS),
        rows(),
        PROCESSOR,
        tools=[Echo()] if objects is None else objects,
        optimizers=(optimizer, None),
    )


def by_hand(rollout) -> tuple[float, float, list[int]]:
    """r_acc, r_tool and the places of the policy's tokens, from the tokens alone."""
    tokenizer = PROCESSOR.tokenizer
    own_tokens = {*tokenizer.convert_tokens_to_ids([*WORDS, "x", END])}
    texts = [tokenizer.decode([token]) for token in rollout.completion_ids]
    places, inside, last_turn, calls = [], True, "", 0
    for place, text in enumerate(texts):  # an observation goes from the end of a turn to the next "assistant\n"
        before = "".join(texts[:place])
        if not inside and before.endswith("<|im_start|>assistant\n"):
            inside, last_turn = True, ""
        if inside:
            places.append(place)
            last_turn += text
            if text.startswith("<tool_call>") and place + 1 < len(texts):
                inside, calls = False, calls + 1
    assert rollout.completion_ids[places[0]] in own_tokens
    answers = last_turn.count("<answer>")
    answer = last_turn.rsplit("<answer>", 1)[-1].split("</answer>")[0] if answers else ""
    right = float(answer == "4")
    is_formatted = answers == 1 and last_turn.replace(END, "").endswith("</answer>") and last_turn.startswith("<think>")
    return 0.9 * right + 0.1 * is_formatted, right / (calls + 1), places


def normalised(values: list[float]) -> list[float]:
    if len(values) < 2 or max(values) == min(values):
        return [0.0] * len(values)
    return [(value - mean(values)) / (stdev(values) + 1e-6) for value in values]


def logprobs_by_hand(model, rollout, places: list[int], suppress) -> torch.Tensor:
    """With gradient: one plain row through the model."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    pixels = [rollout.prompt.pixel_values, rollout.observation_pixel_values]
    grids = [rollout.prompt.image_grid_thw, rollout.observation_grid_thw]
    images = {}
    if any(grid is not None for grid in grids):
        images["pixel_values"] = torch.cat([part for part in pixels if part is not None])
        images["image_grid_thw"] = torch.cat([part for part in grids if part is not None])
        images["mm_token_type_ids"] = (ids == PROCESSOR.image_token_id).long()
    logits = model(input_ids=ids, **images).logits[0]
    floor = torch.zeros(logits.shape[-1])
    floor[list(suppress)] = -math.inf
    logp = (logits + floor).log_softmax(-1)
    columns = torch.tensor(places) + len(rollout.prompt)
    return logp[columns - 1].gather(1, ids[0, columns, None])[:, 0]


def gradients(before, after) -> dict[str, torch.Tensor]:
    return {name: before[name] - value for name, value in after.named_parameters() if ".visual." not in name}


@pytest.mark.parametrize("w_tool", [0.15, 2.0])
def test_loss_and_gradient_are_those_of_two_surrogates_by_hand(tmp_path, w_tool: float) -> None:
    """At ratio 1 the gradient of both surrogates together is the closed form: -(w_acc A_acc / N + w_tool A_tool / N_Q)."""
    model, twin = caller(PROCESSOR), caller(PROCESSOR)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    built = trainer(tmp_path, model, w_tool=w_tool, per_device_train_batch_size=3)
    built.train()
    samples = built.buffer.samples
    groups = [samples[start : start + 8] for start in range(0, len(samples), 8)]

    accuracy, efficiency, members, places = {}, {}, {}, {}
    for group in groups:
        found = [by_hand(sample.rollout) for sample in group]
        correct = [n for n, (_, tool, _) in enumerate(found) if tool > 0]
        tool = normalised([found[n][1] for n in correct])
        has_spread = any(tool)
        for n, (sample, advantage) in enumerate(zip(group, normalised([r for r, _, _ in found]), strict=True)):
            accuracy[id(sample)] = advantage
            members[id(sample)] = has_spread and n in correct
            efficiency[id(sample)] = tool[correct.index(n)] if n in correct else 0.0
            places[id(sample)] = found[n][2]
    assert 1 < sum(members.values()) < len(samples)
    assert {sample.rollout.tool_calls for sample in samples} >= {0, 1}
    assert any(sample.rollout.observation_grid_thw is not None and accuracy[id(sample)] for sample in samples)

    tokens = sum(len(places[id(sample)]) for sample in samples)
    member_tokens = sum(len(places[id(sample)]) for sample in samples if members[id(sample)])
    loss = torch.zeros(())
    value = 0.0
    for sample in samples:
        key = id(sample)
        logp = logprobs_by_hand(twin, sample.rollout, places[key], built.sampling.suppress_token_ids)
        ratio = (logp - logp.detach()).exp()
        loss = loss - accuracy[key] * ratio.sum() / tokens - w_tool * efficiency[key] * ratio.sum() / member_tokens
        value -= (accuracy[key] / tokens + w_tool * efficiency[key] / member_tokens) * len(places[key])
    loss.backward()

    [log] = [entry for entry in built.state.log_history if "loss" in entry]
    assert log["loss"] == pytest.approx(value, abs=2e-6)
    assert abs(value) > 1e-3
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, gradient in gradients(before, model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-6)


def test_reference_numbers_normalise_inside_each_micro_batch(tmp_path) -> None:
    built = trainer(tmp_path, hdpo_compat="reference", per_device_train_batch_size=4)
    built.train()
    samples = built.buffer.samples
    [step] = built.buffer.steps

    value = 0.0
    for batch in step.micro_batches:
        rollouts = [samples[row.sample] for row in batch]
        tokens = [len(by_hand(sample.rollout)[2]) for sample in rollouts]
        own = [count for count, sample in zip(tokens, rollouts, strict=True) if sample.tool_advantage != 0]
        share = len(batch) / len(samples)
        accuracy = sum(-sample.advantage * count for sample, count in zip(rollouts, tokens, strict=True)) / sum(tokens)
        tool = sum(-sample.tool_advantage * count for sample, count in zip(rollouts, tokens, strict=True))
        value += share * (accuracy + 0.15 * tool / (sum(own) or sum(tokens)))

    [log] = [entry for entry in built.state.log_history if "loss" in entry]
    assert log["loss"] == pytest.approx(value, abs=2e-6)
    assert len(step.micro_batches) > 3
    for start in range(0, len(samples), 8):  # the group's own float32 arithmetic, bit for bit
        found = [by_hand(sample.rollout) for sample in samples[start : start + 8]]
        reward_G = torch.tensor([r for r, _, _ in found])
        expected = (reward_G - reward_G.mean()) / (reward_G.std() + 1e-6)
        torch.testing.assert_close(
            torch.tensor([sample.advantage for sample in samples[start : start + 8]]), expected, rtol=1e-5, atol=1e-6
        )


def test_observation_tokens_have_no_gradient(tmp_path, monkeypatch) -> None:
    """The gradient of the loss with respect to each token's log-probability: 0 at observations, prompts and padding."""
    seen = []
    original = Updater._score

    def watch(updater, model, batch, **options):
        scores = original(updater, model, batch, **options)
        if scores.logp_BT.requires_grad:
            scores.logp_BT.retain_grad()
            seen.append((batch, scores.logp_BT))
        return scores

    monkeypatch.setattr(Updater, "_score", watch)
    trainer(tmp_path, per_device_train_batch_size=1).train()

    observed = 0
    for batch, logp_BT in seen:
        outside = batch.mask_BT == 0
        observed += int(outside[0, batch.starts[0] :].sum())
        assert logp_BT.grad[outside].eq(0).all()
        assert logp_BT.grad[~outside].ne(0).any()
    assert observed > 100


def test_the_released_codes_rounding_noise_and_ours() -> None:
    """The table of docs/hdpo.md: equal rewards in a group, float32, as the released code computes them."""
    noisy = largest = 0
    for calls in range(11):
        for size in range(2, 17):
            reward_PG = torch.full((1, size), 1 / (calls + 1))
            _, reference = hdpo_advantages(reward_PG, reward_PG, compat="reference")
            _, ours = hdpo_advantages(reward_PG, reward_PG)
            noisy += bool(reference.ne(0).any())
            largest = max(largest, float(reference.abs().max()))
            assert ours.eq(0).all()
    accuracy_noisy, accuracy_largest = 0, 0.0
    for reward in (0.0, 0.1, 0.9, 1.0):
        for size in range(2, 17):
            reward_PG = torch.full((1, size), reward)
            reference, _ = hdpo_advantages(reward_PG, reward_PG, compat="reference")
            accuracy_noisy += bool(reference.ne(0).any())
            accuracy_largest = max(accuracy_largest, float(reference.abs().max()))
            assert grpo_advantages(reward_PG).eq(0).all()
    t2n7 = hdpo_advantages(torch.full((1, 7), 1 / 3), torch.full((1, 7), 1 / 3), compat="reference")[1]

    assert (noisy, accuracy_noisy) == (57, 20)  # of 165 and of 60 groups
    assert (largest, accuracy_largest) == (pytest.approx(0.0561, abs=5e-4), pytest.approx(0.1061, abs=5e-4))
    assert float(t2n7.abs().max()) == pytest.approx(0.0289, abs=5e-4)


def test_training_with_tools_goes_on_from_a_checkpoint_bit_for_bit(tmp_path) -> None:
    fields = {"updates_per_rollout": 2, "prompts_per_step": 2, "num_generations": 4, "learning_rate": 1e-2}
    whole = trainer(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=3, **fields)
    whole.train()

    resumed = trainer(tmp_path / "resumed", max_steps=4, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))

    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert any(sample.rollout.observation_grid_thw is not None for sample in whole.buffer.samples)


def test_a_two_branch_model_trains_with_tools_and_a_table_shows_the_conversations(tmp_path, caplog) -> None:
    model = caller(PROCESSOR, branches=True)
    with caplog.at_level(logging.INFO):
        built = trainer(tmp_path, model, thinking="sample", log_completions=True, num_generations=4, max_steps=1)
        built.train()

    [log] = [entry for entry in built.state.log_history if "loss" in entry]
    assert log["tool_calls"] > 0
    assert log["tools/calls"] > 0
    assert 0 < log["thinking_ratio"] < 1
    assert log["ratio/max"] == 1
    table = [json.loads(line) for line in (tmp_path / "completions/rank0.jsonl").read_text().splitlines()]
    called = [row for row in table if row["tool_calls"]]
    assert any("[image]" in row["completion"] for row in called)
    assert all("<tool_response>" in row["completion"] for row in called)
    assert all(row["answer"].strip() in ("4", "5") for row in called if row["rewards"]["format_reward"])
    assert "self-check" in caplog.text


def test_prompts_describe_the_tools_also_where_rows_have_a_system_message(tmp_path) -> None:
    records = rows(2)
    own = records[0].messages
    records[0].messages[:] = [{"role": "system", "content": "Be brief."}, *own]
    args = MetisRLConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)

    described, prompt = describe_tools(records, None, [Echo()], args)
    twice, _ = describe_tools(described, None, [Echo()], args)
    nothing, plain = describe_tools(records, "S", [], args)

    assert str(described[0].messages[0]["content"]).startswith("Be brief.\n\n# Tools")
    assert '"name": "echo"' in str(described[0].messages[0]["content"])
    assert described[1].messages == records[1].messages
    assert prompt.startswith("You are a helpful assistant.\n\n# Tools")
    assert twice == described
    assert (nothing, plain) == (records, "S")


def test_tools_of_the_settings_are_made_and_wrap_the_engine(tmp_path) -> None:
    pytest.importorskip("bm25s", reason="the local index library bm25s is not installed")
    corpus = tmp_path / "facts.jsonl"
    corpus.write_text('{"text": "The sky is blue."}\n{"text": "Grass is green."}\n')
    settings = {"tools": [{"text_search": {"corpus": str(corpus)}}], "describe_tools": True, "max_tool_turns": 3}

    built = trainer(tmp_path, objects=[], **settings)

    assert isinstance(built.engine, ToolRollouts)
    assert built.engine.limits.turns == 4
    assert [tool.name for tool in built.engine.tools] == ["text_search"]
    assert "text_search" in PROCESSOR.tokenizer.decode(built.source.prompt(0).input_ids)
    with pytest.raises(RecipeError, match="Did you mean 'python'"):
        trainer(tmp_path, objects=[], **{**settings, "tools": ["pyhton"]})
    with pytest.raises(RecipeError, match="one of them"):
        trainer(tmp_path, **settings)
    with pytest.raises(RecipeError, match="max_tool_turns"):
        trainer(tmp_path, max_tool_turns=0)

"""The trainer as a whole on tiny models: equal results for equal work, exact resume, refill, branches, router."""

import json
import logging
import math
import random

import numpy
import pytest
import torch

from metis_home.errors import DataError, RecipeError, TrainingError
from metis_home.training.data.records import load_records
from metis_home.training.rollouts.hf import HFEngine
from tests.training.rl.pico_rl import config, dense, processor, records, trainer, two_branch, vowels


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def with_sgd(built, lr: float = 0.5):
    """Adam divides tiny gradients by themselves, which would blow up differences of rounding."""
    built.optimizer = torch.optim.SGD([p for p in built.model.parameters() if p.requires_grad], lr=lr)
    return built


def metrics(built, *, without_times: bool = True) -> list[dict[str, float]]:
    logged = [entry for entry in built.state.log_history if "loss" in entry]
    if not without_times:
        return logged
    return [{k: v for k, v in entry.items() if "second" not in k} for entry in logged]


@pytest.mark.parametrize("aggregation", ["token_mean", "dapo"])
def test_batch_1_times_8_equals_batch_8_times_1(tmp_path, aggregation: str) -> None:
    results = []
    for rows, tokens in ((1, 32768), (8, 32768), (8, 160)):
        built = with_sgd(
            trainer(
                tmp_path,
                per_device_train_batch_size=rows,
                micro_batch_tokens=tokens,
                loss_aggregation=aggregation,
                updates_per_rollout=2,
            )
        )
        forwards = []
        built.model.lm_head.register_forward_hook(lambda *a, seen=forwards: seen.append(1))
        built.train()
        results.append((weights(built.model), [entry["loss"] for entry in metrics(built)], len(forwards)))

    assert moved(weights(dense()), results[0][0])
    assert results[0][2] > results[2][2] > results[1][2]
    for others, losses, _ in results[1:]:
        assert losses == pytest.approx(results[0][1], abs=1e-6)
        for name, parameter in results[0][0].items():
            # float32 sums in another order
            torch.testing.assert_close(others[name], parameter, rtol=1e-4, atol=2e-6)


def noisy(completions, **columns) -> list[float]:
    """Draws from every global generator: a resumed run must find all of them where they were."""
    return [
        base + random.random() + float(numpy.random.rand()) + float(torch.rand(()))
        for base in vowels(completions=completions)
    ]


@pytest.mark.parametrize("step", [1, 3])
def test_resume_is_bit_exact_also_in_the_middle_of_a_buffer(tmp_path, step: int) -> None:
    """After 1 and 3 of 5 steps, half a buffer is left; after 3, an epoch of the step counter ends too."""
    fields = {"updates_per_rollout": 2, "max_steps": 5, "log_completions": True}
    whole = trainer(tmp_path / "a", rewards=[noisy], save_strategy="steps", save_steps=1, **fields)
    whole.train()

    resumed = trainer(tmp_path / "b", dense(seed=5), rewards=[noisy], **fields)
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))

    saved = torch.load(tmp_path / f"a/checkpoint-{step}/rl_state_0.pt", weights_only=True)
    assert len(saved["buffer"]["steps"]) == 2
    assert moved(weights(whole.model), weights(resumed.model)) == set()
    assert metrics(resumed)[step:] == metrics(whole)[step:]
    tables = [
        [json.loads(line) for line in (tmp_path / run / "completions/rank0.jsonl").read_text().splitlines()]
        for run in ("a", "b")
    ]
    assert [row for row in tables[0] if row["step"] > step] == tables[1]
    assert tables[1]


def test_a_checkpoint_without_the_rl_state_is_refused(tmp_path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    (tmp_path / "checkpoint-1/rl_state_0.pt").unlink()

    with pytest.raises(TrainingError, match="rl_state_0.pt is missing"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_data_is_refused(tmp_path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()

    edited = [{"prompt": "Who", "answer": str(number), "id": f"q{number}"} for number in range(6)]
    for other in (records(4), load_records(edited), records()[::-1]):
        with pytest.raises(TrainingError, match="same data"):
            trainer(tmp_path, data=other, max_steps=2).train(resume_from_checkpoint=True)


def test_no_rows_are_no_prompts(tmp_path) -> None:
    with pytest.raises(DataError, match="no rows"):
        trainer(tmp_path, data=[])


def test_rows_that_would_stop_a_run_later_stop_it_before_the_first_step(tmp_path) -> None:
    good = [{"prompt": f"What {number}", "answer": str(number), "id": f"q{number}"} for number in range(3)]
    broken = [
        {"prompt": "Where", "answer": "1", "image": "nowhere.png", "id": "gone"},
        {"prompt": "Where", "answer": "1", "id": "q0"},
        {"prompt": "Where <|im_end|>", "answer": "1", "id": "ends"},
    ]
    unread = [
        {"prompt": "Who", "id": "empty"},
        {"prompt": "Who", "answer": "\\frac{1}{", "kind": "expression", "id": "cut"},
    ]

    with pytest.raises(DataError, match=r"(?s)gone.*q0.*ends"):
        trainer(tmp_path, data=load_records([*good, *broken]))
    with pytest.raises(DataError, match=r"(?s)empty.*cut"):
        trainer(tmp_path, rewards=["accuracy_reward"], data=load_records([*good, *unread]))
    trainer(tmp_path, data=load_records([*good, *unread]))  # `vowels` reads no golds
    trainer(tmp_path, rewards=["accuracy_reward"], data=load_records([*good, *unread]), check_data=False)


def test_equal_rewards_draw_again_up_to_the_bound_and_then_change_nothing(tmp_path, caplog) -> None:
    def constant(completions, **columns) -> list[float]:
        return [0.9 for _ in completions]

    built = trainer(tmp_path, rewards=[constant], max_sampling_rounds=3, max_steps=2, self_check=False)
    before = weights(built.model)
    with caplog.at_level(logging.WARNING):
        built.train()

    assert moved(before, weights(built.model)) == set()
    assert [entry["groups/rounds"] for entry in metrics(built)] == [3, 3]
    assert [entry["groups/drawn"] for entry in metrics(built)] == [6, 6]
    assert metrics(built)[0]["groups/zero_std_fraction"] == 1
    assert "nothing to learn" in caplog.text


def test_prompts_without_signal_are_replaced_by_others(tmp_path) -> None:
    def only_some(completions, solution, **columns) -> list[float]:
        return [v if int(gold) >= 3 else 1.0 for v, gold in zip(vowels(completions=completions), solution, strict=True)]

    built = trainer(tmp_path, rewards=[only_some], max_steps=1)
    built.train()

    trained = {sample.rollout.prompt.columns["solution"] for sample in built.buffer.samples}
    assert trained <= {"3", "4", "5"}
    assert len({sample.group for sample in built.buffer.samples}) == 2
    assert metrics(built)[0]["groups/drawn"] > 2


def test_without_dynamic_sampling_nothing_is_drawn_twice(tmp_path) -> None:
    built = trainer(tmp_path, dynamic_sampling=False, max_steps=1)
    built.train()

    assert metrics(built)[0]["groups/drawn"] == 2


def test_rollouts_that_cannot_be_scored_are_left_out(tmp_path) -> None:
    def sometimes(completions, **columns) -> list[float | None]:
        return [None if n % 4 == 0 else value for n, value in enumerate(vowels(completions=completions))]

    built = trainer(tmp_path, rewards=[sometimes], max_steps=1, dynamic_sampling=False)
    built.train()

    unscored = built.buffer.samples[::4]
    assert all(sample.reward is None and sample.tokens == 0 and sample.advantage == 0 for sample in unscored)
    assert metrics(built)[0]["unscored_fraction"] == 0.25
    computed = {row.sample for step in built.buffer.steps for batch in step.micro_batches for row in batch}
    assert not computed & {0, 4}


def test_skipping_idle_rollouts_changes_nothing(tmp_path) -> None:
    def mostly_equal(completions, **columns) -> list[float]:
        return [float(n % 8 == 0) if n < 8 else 1.0 for n, _ in enumerate(completions)]

    results = []
    for skip in (True, False):
        fields = {"prompts_per_step": 3, "num_generations": 8, "dynamic_sampling": False, "max_steps": 1}
        built = with_sgd(trainer(tmp_path, rewards=[mostly_equal], skip_idle_rollouts=skip, **fields))
        built.train()
        rows = sum(len(batch) for step in built.buffer.steps for batch in step.micro_batches)
        results.append((weights(built.model), rows))

    assert [rows for _, rows in results] == [8, 24]
    for name, parameter in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], parameter, rtol=1e-4, atol=1e-6)


def test_several_passes_over_the_same_rollouts_leave_ratio_one(tmp_path) -> None:
    built = trainer(tmp_path, updates_per_rollout=2, passes_per_rollout=2, max_steps=4, learning_rate=5e-3)
    built.train()

    log = metrics(built)
    assert ["groups/drawn" in entry for entry in log] == [True, False, False, False]
    assert log[0]["ratio/max"] == pytest.approx(1, abs=1e-5)  # the sampler's log-probabilities, not recomputed
    assert log[2]["ratio/max"] > 1.01
    assert log[3]["clip/low"] + log[3]["clip/high"] > 0
    assert log[3]["kl/old"] > log[0]["kl/old"] >= 0


# ---- two branches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [True, False])
def test_one_branch_trains_alone(tmp_path, thinking: bool) -> None:
    built = trainer(tmp_path, two_branch(), thinking=thinking)
    before = weights(built.model)
    built.train()

    changed = moved(before, weights(built.model))
    assert changed
    assert all(f".experts.{int(thinking)}." in name for name in changed)
    assert {sample.rollout.branch for sample in built.buffer.samples} == {int(thinking)}


def thinks(completions, branch, **columns) -> list[float]:
    return [float(value) for value in branch]


def test_the_router_learns_from_reward_what_its_decisions_bring(tmp_path) -> None:
    model = two_branch()
    fields = {"max_steps": 8, "learning_rate": 2e-2, "num_generations": 8, "prompts_per_step": 4}
    built = trainer(tmp_path, model, rewards=[thinks], thinking="sample", train_only=["router"], **fields)
    before = weights(model)
    built.train()

    ratios = [entry["thinking_ratio"] for entry in metrics(built)]
    assert ratios[-1] > ratios[0] + 0.2
    changed = moved(before, weights(model))
    assert changed
    assert all(".router." in name for name in changed)
    assert metrics(built)[0]["router/entropy"] > 0


def test_both_branches_and_the_router_train_together(tmp_path) -> None:
    built = trainer(tmp_path, two_branch(), thinking="sample", num_generations=8, max_steps=2)
    before = weights(built.model)
    built.train()

    changed = moved(before, weights(built.model))
    for part in (".router.", ".experts.0.", ".experts.1."):
        assert any(part in name for name in changed)
    assert not any(part in name for name in changed for part in (".self_attn.", "embed_tokens", ".visual."))


def test_the_update_replays_the_branch_even_if_the_router_has_moved(tmp_path) -> None:
    model = two_branch()
    built = trainer(
        tmp_path, model, thinking="sample", train_only=["thinking_branch", "non_thinking_branch"], max_steps=1
    )
    layer = model.model.language_model.layers[0].mlp
    used = []
    original = built.filler.fill

    def fill_and_turn_the_router(state):
        filling = original(state)
        with torch.no_grad():
            model.model.router.output.bias.copy_(torch.tensor([50.0, -50.0]))  # now nothing thinks
        layer.register_forward_pre_hook(lambda module, arguments: used.append(arguments[1]))
        return filling

    built.filler.fill = fill_and_turn_the_router
    before = weights(model)
    built.train()

    [step] = built.buffer.steps
    stored = [built.buffer.samples[row.sample].rollout.branch for batch in step.micro_batches for row in batch]
    assert set(stored) == {0, 1}
    assert set(used) == {0, 1}
    changed = moved(before, weights(model))
    assert any(".experts.1." in name for name in changed)
    assert any(".experts.0." in name for name in changed)


# ---- settings that do not fit ---------------------------------------------------------------------------------------


def test_settings_that_do_not_fit_the_model_are_refused(tmp_path) -> None:
    with pytest.raises(RecipeError, match="two branches"):
        trainer(tmp_path, two_branch())
    with pytest.raises(RecipeError, match="dense model"):
        trainer(tmp_path, thinking=True)
    with pytest.raises(RecipeError, match="freeze_vision"):
        trainer(tmp_path, freeze=["vision"])
    with pytest.raises(RecipeError, match="drawn from it"):
        trainer(tmp_path, two_branch(), thinking=True, train_only=["router"])
    with pytest.raises(RecipeError, match="gradient_accumulation_steps"):
        config(tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(RecipeError, match="loss_aggregation"):
        config(tmp_path, loss_aggregation="mean")
    with pytest.raises(RecipeError, match="num_generations"):
        config(tmp_path, num_generations=1)


def test_weights_in_16_bits_are_warned_of(tmp_path, caplog) -> None:
    trainer(tmp_path, dense().bfloat16())
    assert "torch.bfloat16" in caplog.text

    caplog.clear()
    trainer(tmp_path)
    assert "rounded away" not in caplog.text


def test_long_prompts_are_left_out_and_never_cut(tmp_path, caplog) -> None:
    lengths = [len(trainer(tmp_path).source.prompt(n)) for n in range(6)]
    limit = sorted(lengths)[3]

    with caplog.at_level(logging.WARNING):
        built = trainer(tmp_path, max_prompt_tokens=limit)

    assert [lengths[n] for n in built.source.usable] == [n for n in lengths if n <= limit]
    assert "left out" in caplog.text
    with pytest.raises(DataError, match="0 of 6 rows"):
        trainer(tmp_path, max_prompt_tokens=5)


def test_vision_tokens_can_never_be_sampled(tmp_path) -> None:
    built = trainer(tmp_path)

    tokens = processor().tokenizer.convert_ids_to_tokens(list(built.sampling.suppress_token_ids))
    assert set(tokens) == {"<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"}


class ForeignEngine(HFEngine):
    """Samples right and reports log-probabilities that are `gap` too low, as another engine's numerics would."""

    shares_weights = False
    gap = 0.2

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.updated = 0

    def generate(self, prompts, num_generations, sampling):
        groups = super().generate(prompts, num_generations, sampling)
        for rollout in (rollout for group in groups for rollout in group):
            rollout.logprobs = [value - self.gap for value in rollout.logprobs]
        return groups

    def update_weights(self, model) -> None:
        self.updated += 1


def test_the_self_check_prints_the_difference_and_stops_a_sampler_that_disagrees(tmp_path, caplog) -> None:
    model = dense()
    engine = ForeignEngine(model, processor().tokenizer)

    with caplog.at_level(logging.INFO):
        trainer(tmp_path, max_steps=1).train()
    with pytest.raises(TrainingError, match=r"differ by 0\.2 nats"):
        trainer(tmp_path, model, engine=engine, max_steps=1, self_check_tolerance=0.1).train()

    assert "2 with images" in caplog.text


@pytest.mark.parametrize("updates", [1, 2])
def test_a_foreign_sampler_is_corrected_up_to_the_cap(tmp_path, updates: int) -> None:
    results = {}
    for cap in (None, 10.0, 1.05):
        model = dense()
        engine = ForeignEngine(model, processor().tokenizer, seed=7000)
        built = with_sgd(
            trainer(
                tmp_path,
                model,
                engine=engine,
                importance_cap=cap,
                max_steps=1,
                updates_per_rollout=updates,
                max_grad_norm=0.0,
            )
        )
        before = weights(model)
        built.train()
        after = weights(model)
        results[cap] = {name: after[name] - before[name] for name in moved(before, after)}
        assert engine.updated == 1
        if cap is not None:
            assert metrics(built)[0]["sampler/gap"] == pytest.approx(0.2, abs=1e-4)
            assert metrics(built)[0]["sampler/importance"] == pytest.approx(min(math.exp(0.2), cap), abs=1e-4)

    # Every token has the same factor, and SGD's step is linear in it where the norm is not clipped.
    name = "lm_head.weight"
    plain, corrected, capped = (results[cap][name] for cap in (None, 10.0, 1.05))
    torch.testing.assert_close(capped / 1.05, corrected / math.exp(0.2), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(capped / 1.05, plain, rtol=1e-3, atol=1e-7)

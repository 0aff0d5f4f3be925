"""The HF engine against `generate`, against forward, and against its promises."""

import math

import pytest
import torch

from metis_home import Branch
from metis_home.errors import EngineError
from metis_home.training.logprobs import score_tokens
from metis_home.training.rollouts.decoding import draw
from metis_home.training.rollouts.engine import RolloutEngine
from metis_home.training.rollouts.hf import HFEngine
from metis_home.training.rollouts.positions import rollout_positions, rope_index_of
from metis_home.training.rollouts.types import Rollout, check_rollouts
from tests.model.pico import IMAGE, IMAGE_ROWS, TEXT_ROWS, collate, dense_twin, pico_model
from tests.training.rollouts.pico_rollouts import SUPPRESS, NumberTokenizer, prompt_of, qwen3_vl, sampling

PROMPTS = [prompt_of(row, index) for index, row in enumerate(IMAGE_ROWS)]


def engine(model, **options) -> HFEngine:
    return HFEngine(model, NumberTokenizer(), **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [IMAGE_ROWS, TEXT_ROWS], ids=["images", "text"])
def test_greedy_rollouts_are_those_of_generate(rows, attention) -> None:
    model = dense_twin(pico_model(), Branch.THINKING)
    model.set_attn_implementation(attention)

    groups = engine(model).generate([prompt_of(row) for row in rows], 3, sampling(temperature=0))

    expected = model.generate(**collate(rows), max_new_tokens=8, do_sample=False)[:, -8:].tolist()
    assert [[rollout.completion_ids for rollout in group] for group in groups] == [[row] * 3 for row in expected]
    assert isinstance(engine(model), RolloutEngine)


def test_greedy_rollouts_of_qwen3_vl_are_those_of_generate() -> None:
    model = qwen3_vl()

    groups = engine(model).generate(PROMPTS, 2, sampling(temperature=0))

    expected = model.generate(**collate(IMAGE_ROWS), max_new_tokens=8, do_sample=False)[:, -8:].tolist()
    assert [group[1].completion_ids for group in groups] == expected


@pytest.mark.parametrize("branch", list(Branch))
def test_a_forced_branch_rolls_out_as_its_dense_model(branch: Branch) -> None:
    model = pico_model()

    groups = engine(model).generate(PROMPTS, 2, sampling(temperature=0, branch=branch))

    dense = engine(dense_twin(model, branch)).generate(PROMPTS, 2, sampling(temperature=0))
    for ours, theirs in zip(groups, dense, strict=True):
        assert [(r.completion_ids, r.branch) for r in ours] == [(r.completion_ids, int(branch)) for r in theirs]


def test_the_router_decides_as_generate_does() -> None:
    model = pico_model(seed=3)

    groups = engine(model).generate(PROMPTS, 1, sampling(temperature=0, branch="router"))

    output = model.generate(
        **collate(IMAGE_ROWS), max_new_tokens=8, do_sample=False, thinking="auto", return_dict_in_generate=True
    )
    assert [group[0].branch for group in groups] == output.branch_ids.tolist()
    assert [group[0].completion_ids for group in groups] == output.sequences[:, -8:].tolist()


def test_sampled_branches_follow_the_routers_probability() -> None:
    model = pico_model(seed=3)
    probability = model.route(**collate(IMAGE_ROWS[:1])).thinking_probability.item()
    assert 0.1 < probability < 0.9  # else this test shows nothing

    [group] = engine(model).generate(PROMPTS[:1], 400, sampling(1, branch="sample"))

    share = sum(rollout.branch for rollout in group) / 400
    assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / 400)
    for rollout in group:
        chosen = probability if rollout.branch else 1 - probability
        assert rollout.branch_logprob == pytest.approx(math.log(chosen), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["dense", "qwen3_vl", "two branches"])
def test_log_probabilities_of_a_left_padded_image_batch_are_those_of_forward(temperature: float, kind: str) -> None:
    model = {"dense": lambda: dense_twin(pico_model(), 1), "qwen3_vl": qwen3_vl, "two branches": pico_model}[kind]()
    settings = sampling(temperature=temperature, branch="sample" if kind == "two branches" else None)

    groups = engine(model).generate(PROMPTS, 3, settings)

    for rollout in [rollout for group in groups for rollout in group]:
        expected = forward_logprobs(model, rollout, temperature)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, rtol=0, atol=2e-5)


def forward_logprobs(model, rollout: Rollout, temperature: float) -> torch.Tensor:
    """One unpadded row, full logits, plain log-softmax."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    types = torch.tensor([rollout.prompt.mm_token_type_ids + [0] * len(rollout.completion_ids)])
    images = {"pixel_values": rollout.prompt.pixel_values, "image_grid_thw": rollout.prompt.image_grid_thw}
    branch = {} if rollout.branch is None else {"branch_ids": rollout.branch}
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=types, **images, **branch).logits[0].double() / temperature
    logits[:, list(SUPPRESS)] = -math.inf
    start = len(rollout.prompt)
    logp = logits.log_softmax(-1)[start - 1 : -1]
    return logp.gather(1, ids[0, start:, None])[:, 0].float()


def test_image_tokens_are_never_sampled_although_the_model_wants_them() -> None:
    model = dense_twin(pico_model(), 1)
    with torch.no_grad():
        model.lm_head.weight[IMAGE] = model.lm_head.weight.mean(0) + 5 * model.lm_head.weight[20:40].mean(0)

    wanted = engine(model).generate(PROMPTS, 32, sampling().__class__(max_new_tokens=8))
    suppressed = engine(model).generate(PROMPTS, 32, sampling())

    assert any(IMAGE in rollout.completion_ids for group in wanted for rollout in group)
    assert not any(set(SUPPRESS) & set(rollout.completion_ids) for group in suppressed for rollout in group)
    with pytest.raises(EngineError, match="suppressed"):
        check_rollouts([rollout for group in wanted for rollout in group], SUPPRESS)
    check_rollouts([rollout for group in suppressed for rollout in group], SUPPRESS)


def test_ended_answers_leave_the_batch_and_keep_their_end_token() -> None:
    model = dense_twin(pico_model(), 1)
    ends = tuple(range(40, 70))  # about a third of all tokens
    batch_sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: batch_sizes.append(output.shape[0]))

    groups = engine(model).generate(PROMPTS, 16, sampling(12, eos_token_ids=ends))

    rollouts = [rollout for group in groups for rollout in group]
    for rollout in rollouts:
        assert not set(rollout.completion_ids[:-1]) & set(ends)
        assert rollout.finished == (rollout.completion_ids[-1] in ends)
        assert rollout.finished or len(rollout.completion_ids) == 12
        torch.testing.assert_close(
            torch.tensor(rollout.logprobs), forward_logprobs(model, rollout, 1.0), rtol=0, atol=2e-5
        )
    assert len({len(rollout.completion_ids) for rollout in rollouts}) > 3
    assert batch_sizes[0] == 4  # prefill: one row per prompt
    assert batch_sizes[1] <= 64
    assert batch_sizes[-1] < 32


def test_the_vision_tower_and_the_prefill_see_each_prompt_once() -> None:
    for model, branch in (
        (dense_twin(pico_model(), 1), None),
        (pico_model(), Branch.THINKING),
        (pico_model(), "sample"),
    ):
        patches = []
        model.model.visual.register_forward_pre_hook(lambda module, args, seen=patches: seen.append(len(args[0])))

        engine(model).generate(PROMPTS, 8, sampling(branch=branch))

        assert sum(patches) == sum(len(row.patches) for row in IMAGE_ROWS if row.patches is not None)


def test_small_batches_give_the_same_answers() -> None:
    model = dense_twin(pico_model(), 1)

    whole = engine(model).generate(PROMPTS, 2, sampling(temperature=0))
    single = engine(model, max_tokens=1).generate(PROMPTS, 2, sampling(temperature=0))

    assert [[r.completion_ids for r in group] for group in whole] == [[r.completion_ids for r in g] for g in single]
    assert engine(model).generate([], 2, sampling()) == []


def test_drawn_tokens_follow_the_distribution() -> None:
    model = dense_twin(pico_model(), 1)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)  # flatter, so that several tokens are likely

    [group] = engine(model, max_tokens=10**6).generate(PROMPTS[:1], 4000, sampling(1))

    counts = torch.zeros(99)
    for rollout in group:
        counts[rollout.completion_ids[0]] += 1
    probability = {rollout.completion_ids[0]: math.exp(rollout.logprobs[0]) for rollout in group}
    for token, p in probability.items():
        assert abs(counts[token] / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000)


def test_draws_are_in_proportion_and_never_of_probability_zero() -> None:
    probability = torch.tensor([[0.0, 0.25, 0.0, 0.6, 0.15, 0.0]]).expand(20000, -1)

    tokens = draw(probability, torch.Generator().manual_seed(0))

    share = tokens.flatten().bincount(minlength=6) / 20000
    assert share[[0, 2, 5]].eq(0).all()
    torch.testing.assert_close(share, probability[0], rtol=0, atol=0.015)


def test_many_unlikely_tokens_are_drawn_as_often_as_they_should() -> None:
    tail = torch.full((100_000,), 2e-8)  # 0.2 % in all, each below what float32 keeps beside 0.998
    probability = torch.cat([torch.tensor([0.998]), tail])[None].expand(5000, -1)

    tokens = torch.cat([draw(part, torch.Generator().manual_seed(n)) for n, part in enumerate(probability.split(100))])

    assert 3 <= int((tokens > 0).sum()) <= 20


def test_top_k_and_top_p_limit_what_is_drawn_and_not_the_log_probability() -> None:
    model = dense_twin(pico_model(), 1)
    greedy = engine(model).generate(PROMPTS, 4, sampling(temperature=0))

    for limits in ({"top_k": 1}, {"top_p": 1e-6}):
        limited = engine(model).generate(PROMPTS, 4, sampling(**limits))
        assert [[r.completion_ids for r in g] for g in limited] == [[r.completion_ids for r in g] for g in greedy]
        assert limited[0][0].logprobs == pytest.approx(greedy[0][0].logprobs, abs=1e-5)
        assert limited[0][0].logprobs[0] < 0


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    from metis_home.training.rollouts.decoding import _limited

    probability = torch.tensor([[0.1, 0.5, 0.25, 0.15]])

    assert _limited(probability, sampling(top_p=0.7)).gt(0).tolist() == [[False, True, True, False]]
    assert _limited(probability, sampling(top_k=3)).gt(0).tolist() == [[False, True, True, True]]


def test_a_stop_text_ends_an_answer_and_stays_in_it() -> None:
    model = dense_twin(pico_model(), 1)
    first = engine(model).generate(PROMPTS, 1, sampling(temperature=0))[0][0].completion_ids
    third = f"{first[1]} {first[2]}"

    stopped = engine(model).generate(PROMPTS, 1, sampling(temperature=0, stop=(third,)))

    assert stopped[0][0].completion_ids == first[:3]
    assert stopped[0][0].finished


def test_a_saved_random_state_gives_the_same_rollouts() -> None:
    model = dense_twin(pico_model(), 1)
    one, other = engine(model, seed=5), engine(model, seed=6)
    one.generate(PROMPTS, 2, sampling())

    other.load_state_dict(one.state_dict())
    torch.manual_seed(1)  # nothing but the engine's own state matters

    expected = [[r.completion_ids for r in g] for g in one.generate(PROMPTS, 2, sampling())]
    assert [[r.completion_ids for r in g] for g in other.generate(PROMPTS, 2, sampling())] == expected
    assert [[r.completion_ids for r in g] for g in other.generate(PROMPTS, 2, sampling())] != expected


def test_the_model_keeps_its_mode_and_a_wrong_branch_is_refused() -> None:
    model = dense_twin(pico_model(), 1).train()

    engine(model).generate(PROMPTS, 1, sampling(1))

    assert model.training
    with pytest.raises(EngineError, match="no branches"):
        engine(model).generate(PROMPTS, 1, sampling(branch=Branch.THINKING))
    with pytest.raises(EngineError, match="two branches"):
        engine(pico_model()).generate(PROMPTS, 1, sampling())


def test_images_that_tools_return_have_their_positions() -> None:
    model = dense_twin(pico_model(), 1)
    first, second = IMAGE_ROWS[0], IMAGE_ROWS[2]
    prompt = prompt_of(first)
    rollout = Rollout(
        prompt=prompt,
        completion_ids=list(second.ids),
        logprobs=[0.0] * len(second.ids),
        loss_mask=[0] * len(second.ids),
        observation_pixel_values=second.patches,
        observation_grid_thw=torch.tensor(second.grids),
        observation_types=second.types,
    )

    positions = rollout_positions(rollout, rope_index_of(model))

    expected, _ = model.model.get_rope_index(
        torch.tensor([first.ids + second.ids]),
        mm_token_type_ids=torch.tensor([first.types + second.types]),
        image_grid_thw=torch.tensor([*first.grids, *second.grids]),
    )
    assert torch.equal(positions, expected[:, 0])


def test_scores_of_a_training_forward_agree_with_the_sampler() -> None:
    model = pico_model()
    [group] = engine(model).generate(PROMPTS[:1], 2, sampling(branch=Branch.THINKING))
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids for rollout in group])
    mask = torch.zeros_like(ids)
    mask[:, len(PROMPTS[0]) :] = 1
    row = IMAGE_ROWS[0]
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": torch.tensor([row.types + [0] * 8] * 2),
        "pixel_values": torch.cat([row.patches] * 2),
        "image_grid_thw": torch.tensor(list(row.grids) * 2),
        "branch_ids": torch.tensor([1, 1]),
    }

    scores = score_tokens(model, inputs, mask, suppress_token_ids=SUPPRESS)

    sampled = torch.tensor([rollout.logprobs for rollout in group])
    torch.testing.assert_close(scores.logp_BT[:, len(row.ids) :], sampled, rtol=0, atol=2e-5)

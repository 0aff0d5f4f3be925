"""Chunked scores against full logits in float64, for every model that is trained."""

import pytest
import torch

from metis_home.errors import TrainingError
from metis_home.training.logprobs import score_tokens
from tests.model.pico import IMAGE_ROWS, collate, dense_twin, pico_model
from tests.training.rollouts.pico_rollouts import SUPPRESS, qwen3_vl

BRANCHES = torch.tensor([1, 0, 0, 1])


def case(kind: str):
    model = {"dense": lambda: dense_twin(pico_model(), 1), "qwen3_vl": qwen3_vl, "two branches": pico_model}[kind]()
    inputs = collate(IMAGE_ROWS, side="right")
    mask = inputs.pop("attention_mask") * (torch.arange(inputs["input_ids"].shape[1]) >= 6)
    mask[inputs["mm_token_type_ids"] == 1] = 0
    mask = mask * ~torch.isin(inputs["input_ids"], torch.tensor(SUPPRESS))
    if kind == "two branches":
        inputs["branch_ids"] = BRANCHES
    return model, inputs, mask


def plain(model, inputs, mask, temperature):
    """Full logits, nothing chunked: log-probabilities and entropies of the tokens under the mask."""
    logits = model(**inputs).logits.double() / temperature
    logits[..., list(SUPPRESS)] = -1e30
    logp = logits.log_softmax(-1)[:, :-1]
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    pad = chosen.new_zeros(len(mask), 1)
    return torch.cat([pad, chosen], 1) * mask, torch.cat([pad, entropy], 1) * mask


@pytest.mark.parametrize("kind", ["dense", "qwen3_vl", "two branches"])
@pytest.mark.parametrize("chunk_bytes", [2**28, 4 * 99 * 5], ids=["one chunk", "five tokens a chunk"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_and_gradients_equal_those_of_full_logits(kind, chunk_bytes, temperature) -> None:
    model, inputs, mask = case(kind)
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))

    scores = score_tokens(
        model, inputs, mask, temperature=temperature, suppress_token_ids=SUPPRESS, chunk_bytes=chunk_bytes
    )
    (scores.logp_BT * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logp, entropy = plain(model, inputs, mask, temperature)
    (logp * weight).sum().backward()
    torch.testing.assert_close(scores.logp_BT.double(), logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.entropy_BT.double(), entropy, rtol=0, atol=1e-5)
    assert scores.logp_BT[mask == 0].eq(0).all()
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)


def test_right_padding_needs_no_mask() -> None:
    model, inputs, mask = case("dense")

    together = score_tokens(model, inputs, mask, suppress_token_ids=SUPPRESS).logp_BT

    for number, row in enumerate(IMAGE_ROWS):
        alone = collate([row], side="right")
        del alone["attention_mask"]
        length = len(row.ids)
        single = score_tokens(model, alone, mask[number : number + 1, :length], suppress_token_ids=SUPPRESS).logp_BT
        torch.testing.assert_close(together[number, :length], single[0], rtol=0, atol=1e-5)


def test_the_head_and_the_loss_are_as_before_also_after_an_error() -> None:
    model, inputs, mask = case("two branches")
    expected = model(**inputs, labels=inputs["input_ids"])

    score_tokens(model, inputs, mask, with_router=False)
    with pytest.raises(TypeError):
        score_tokens(model, {**inputs, "no_such_argument": object(), "input_ids": inputs["input_ids"]}, mask * None)

    again = model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(again.logits, expected.logits)
    assert torch.equal(again.loss, expected.loss)


def test_the_router_reads_the_prompt_only() -> None:
    model, inputs, _mask = case("two branches")
    prompts = collate(IMAGE_ROWS)
    answers = torch.randint(10, 99, (4, 5), generator=torch.Generator().manual_seed(1))
    logits = []
    for answer in (answers, answers.flip(1)):
        rows = [row.ids + tokens for row, tokens in zip(IMAGE_ROWS, answer.tolist(), strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        labels = ids.clone()
        for number, row in enumerate(IMAGE_ROWS):
            labels[number, : len(row.ids)] = -100
        types = torch.tensor([row.types + [0] * (longest - len(row.types)) for row in IMAGE_ROWS])
        batch = {**inputs, "input_ids": ids, "labels": labels, "mm_token_type_ids": types}
        scores = score_tokens(model, batch, (labels != -100).long(), with_router=True)
        logits.append(scores.router_logits)

    torch.testing.assert_close(logits[0], model.route(**prompts).logits, rtol=0, atol=1e-6)
    assert torch.equal(logits[0], logits[1])
    logits[0].sum().backward()
    assert model.model.router.output.weight.grad is not None


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(TrainingError, match="lm_head"):
        score_tokens(torch.nn.Linear(2, 2), {"input_ids": torch.zeros(1, 2).long()}, torch.ones(1, 2))

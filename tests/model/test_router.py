"""The router reads prompt tokens only, the same alone as in a padded batch, in float32."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_home import MetisHomeRouter, ops
from metis_home.branch import Branch
from metis_home.errors import BranchError, ConfigError
from metis_home.router import decide, router_cross_entropy
from metis_home.router_layout import router_tensors
from tests.model.pico import IMAGE_ROWS, TEXT_ROWS, collate, pico_model

POOLINGS = ["mean", "attention"]


def random_router(pooling, hidden=16, width=8):
    router = MetisHomeRouter(hidden, width, pooling)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def reference(router, x_TD):
    """The definition, token by token in float64, for one prompt without padding."""
    weights = {name: tensor.double() for name, tensor in router.state_dict().items()}
    x_TD = x_TD.double()
    if router.pooling == "attention":
        scores = [(x / (x.square().mean() + 1e-6).sqrt()) @ weights["query"] / len(x) ** 0.5 for x in x_TD]
        share_T = torch.stack(scores).softmax(0)
    else:
        share_T = torch.full((len(x_TD),), 1 / len(x_TD), dtype=torch.float64)
    pooled = sum(share * x for share, x in zip(share_T, x_TD, strict=True))
    normed = pooled / (pooled.square().mean() + 1e-6).sqrt() * weights["norm.weight"]
    hidden = torch.nn.functional.silu(weights["hidden.weight"] @ normed + weights["hidden.bias"])
    return weights["output.weight"] @ hidden + weights["output.bias"]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_logits_equal_the_definition(pooling, tokens):
    router, x_TD = random_router(pooling), torch.randn(tokens, 16)

    torch.testing.assert_close(router(x_TD[None])[0].double(), reference(router, x_TD), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    extra=st.integers(0, 5),
    left=st.booleans(),
    pooling=st.sampled_from(POOLINGS),
    seed=st.integers(0, 99),
)
def test_padding_and_company_do_not_change_a_decision(lengths, extra, left, pooling, seed):
    torch.manual_seed(seed)
    router = random_router(pooling)
    rows = [torch.randn(length, 16) for length in lengths]
    total = max(lengths) + extra
    x_BTD = torch.full((len(rows), total, 16), float("nan"))  # padding may hold anything
    mask_BT = torch.zeros(len(rows), total)
    for index, x_TD in enumerate(rows):
        place = slice(total - len(x_TD), total) if left else slice(0, len(x_TD))
        x_BTD[index, place], mask_BT[index, place] = x_TD, 1

    together = router(x_BTD, mask_BT)

    alone = torch.cat([router(x_TD[None]) for x_TD in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_without_prompt_tokens_is_finite(pooling):
    router = random_router(pooling)
    x_BTD = torch.randn(2, 3, 16)
    mask_BT = torch.tensor([[1, 1, 1], [0, 0, 0]])

    logits = router(x_BTD, mask_BT)

    torch.testing.assert_close(logits[1], router(torch.zeros(1, 1, 16))[0])


def test_fresh_attention_pooling_is_mean_pooling():
    models = [pico_model(router_pooling=pooling) for pooling in POOLINGS]
    models[1].model.router.load_state_dict(
        {**models[0].model.router.state_dict(), "query": models[1].model.router.query.data}
    )
    x_BTD = torch.randn(3, 7, 32)

    torch.testing.assert_close(models[0].model.router(x_BTD), models[1].model.router(x_BTD))
    assert not models[1].model.router.query.any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_module_has_exactly_the_tensors_of_the_layout(pooling):
    router = MetisHomeRouter(16, 8, pooling)

    shapes = {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()}

    assert shapes == {name: fill.shape for name, fill in router_tensors(16, 8, pooling).items()}


def test_a_fresh_model_fills_the_router_by_the_layout():
    model = pico_model(router_pooling="attention", router_hidden_size=4096)
    fresh = type(model)(model.config).model.router

    for name, fill in router_tensors(32, 4096, "attention").items():
        tensor = fresh.state_dict()[name]
        if fill.std is None:
            assert (tensor == fill.constant).all(), name
        else:
            assert tensor.std().item() == pytest.approx(fill.std, rel=0.1), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_stays_in_float32(dtype, tmp_path):
    model = pico_model()
    model.save_pretrained(tmp_path)

    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)

    assert loaded.dtype == dtype
    assert {parameter.dtype for parameter in loaded.model.router.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loaded.route(**collate(TEXT_ROWS)).logits.dtype == torch.float32
    router, x_BTD = random_router("mean"), torch.randn(2, 3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x_BTD), router(x_BTD.clone()))
        under_autocast = router(x_BTD)
    assert torch.equal(under_autocast, router(x_BTD))


def test_a_routers_decision_is_the_same_for_text_and_embeddings_and_runs_no_decoder(model, monkeypatch):
    monkeypatch.setattr(model.model.language_model, "forward", None)  # calling it would fail

    decision = model.route(**collate(IMAGE_ROWS))

    assert decision.branch_ids.dtype == torch.int64
    assert decision.thinking_probability.dtype == torch.float32
    assert decision.logits.shape == (4, 2)
    torch.testing.assert_close(decision.thinking_probability, decision.logits.softmax(-1)[:, Branch.THINKING])


def test_images_change_the_decision(model):
    batch = collate(IMAGE_ROWS)
    other = {**copy.deepcopy(batch), "pixel_values": batch["pixel_values"] * -2}

    assert not torch.equal(model.route(**batch).logits, model.route(**other).logits)


def test_a_tie_thinks():
    assert decide(torch.zeros(1, 2)).branch_ids.tolist() == [1]


def test_route_queries_is_the_door(model):
    x_BTD = torch.randn(2, 5, 32)

    decision = ops.route_queries(x_BTD, None, model.model.router, backend="torch")

    assert torch.equal(decision.logits, model.model.router(x_BTD))


@pytest.mark.parametrize("threshold", [-0.01, 1.01, float("nan"), "0.5", None, True], ids=str)
def test_thresholds_outside_0_1_are_refused(threshold):
    with pytest.raises(BranchError, match="router_threshold must be a number in"):
        decide(torch.zeros(1, 2), threshold)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ConfigError, match="router_pooling must be one of mean, attention; found 'max'"):
        MetisHomeRouter(16, 8, "max")


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, -5.0]])

    loss = router_cross_entropy(logits, torch.tensor([1, 0, -100]))

    by_hand = (torch.log(torch.tensor(2.0)) + torch.log(1 + torch.exp(torch.tensor(-2.0)))) / 2
    torch.testing.assert_close(loss, by_hand)

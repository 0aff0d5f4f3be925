"""The router kernels, interpreted, against the definition and against the module."""

import pytest
import torch

from metis_home import ops
from metis_home.kernels import dispatch, reference_route, route
from metis_home.kernels.reference_route import RouterWeights
from metis_home.kernels.route_backward import pool_backward
from metis_home.router import ROUTER_EPS, MetisHomeRouter, decide

# (B, T, D, H): chunks of 128 tokens forward and 64 backward, blocks of 64 columns
SHAPES = [(3, 37, 32, 16), (2, 150, 97, 24), (1, 1, 64, 8), (4, 129, 130, 5)]
POOLINGS = ("mean", "attention")


def make_case(shape, pooling, dtype):
    batch, tokens, width, hidden = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(batch, tokens, width, dtype=torch.float64).to(dtype)
    mask = torch.rand(batch, tokens) > 0.4
    mask[0] = False  # a row without any prompt token
    x[~mask] = torch.nan  # padding may hold anything
    sizes = ((width,), (hidden, width), (hidden,), (2, hidden), (2,))
    query = torch.randn(width, dtype=wide) if pooling == "attention" else None
    return x, mask, RouterWeights(*(torch.randn(size, dtype=wide) for size in sizes), query)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_decision_is_that_of_the_definition(shape, pooling, dtype) -> None:
    x, mask, weights = make_case(shape, pooling, dtype)

    ids, probability, logits, pooled = route.route_queries(x, mask, weights)

    # both sum in float32, in another order; the logits are of size 10 to 100
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    want_ids, want_probability, want_logits, want_pooled = reference_route.route_queries(x, mask, weights)
    torch.testing.assert_close(logits, want_logits, **tolerance)
    torch.testing.assert_close(probability, want_probability, **tolerance)
    assert torch.equal(ids, want_ids)
    for found, want in zip(pooled, want_pooled, strict=True):
        torch.testing.assert_close(found, want, **tolerance)
    assert torch.count_nonzero(pooled.pooled_BD[0]) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_token_gradients_are_those_of_the_definition(shape, pooling) -> None:
    x, mask, weights = make_case(shape, pooling, torch.float64)
    pooled = reference_route.pool(x, mask, weights.query_D)
    grad = torch.randn_like(pooled.pooled_BD)

    found = pool_backward(grad, x, mask, weights.query_D, pooled)

    want = reference_route.pool_backward(grad, x, mask, weights.query_D, pooled)
    torch.testing.assert_close(found[0], want[0], rtol=1e-10, atol=1e-12)
    assert torch.count_nonzero(found[0][~mask]) == 0
    if pooling == "attention":
        torch.testing.assert_close(found[1], want[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_door_gives_what_the_module_gives(pooling) -> None:
    router = MetisHomeRouter(48, 16, pooling)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 20, 96)[..., :48].requires_grad_()
    mask = torch.rand(3, 20) > 0.3
    wanted = [x, *router.parameters()]

    want = decide(router(x, mask))
    found = ops.route_queries(x, mask, router, backend="triton")

    torch.testing.assert_close(found.logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.thinking_probability, want.thinking_probability)
    assert torch.equal(found.branch_ids, want.branch_ids)
    weight = torch.randn(3, 2)
    ours, theirs = (
        torch.autograd.grad((d.logits * weight).sum() + d.thinking_probability.sum(), wanted) for d in (found, want)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck_of_definition_and_kernels(pooling) -> None:
    x, mask, weights = make_case((2, 3, 5, 4), pooling, torch.float64)
    x = x.nan_to_num(0.5)
    given = [tensor.requires_grad_() for tensor in weights if tensor is not None]

    from metis_home.kernels.route_op import route_queries as op

    for implementation in ("reference", "kernels"):

        def logits(x, *tensors, implementation=implementation):
            query = tensors[5] if len(tensors) > 5 else None
            return op(x, mask, *tensors[:5], query, implementation)[1:3]

        assert torch.autograd.gradcheck(logits, (x.requires_grad_(), *given))


def test_one_epsilon_for_module_and_kernels() -> None:
    assert reference_route.ROUTER_EPS == ROUTER_EPS


def test_a_router_with_hooks_is_called_and_not_read() -> None:
    router = MetisHomeRouter(16, 8, "mean")
    assert dispatch.can_route(torch.zeros(1, 1, 16), router)[0]
    router.hidden.register_forward_hook(lambda *_: None)

    usable, reason = dispatch.can_route(torch.zeros(1, 1, 16), router)

    assert not usable
    assert "hooks" in reason

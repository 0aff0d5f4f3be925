"""The operators: fakes, autograd, compilation, and what is launched or refused."""

import sys

import pytest
import torch
from torch import nn

from metis_home import ops
from metis_home.errors import BackendError
from metis_home.kernels import dispatch, ffn_op, grouped
from metis_home.kernels.ffn_op import branch_ffn as op
from metis_home.kernels.launch_table import SHIPPED
from metis_home.kernels.route_op import route_queries as route_op
from tests.kernels.ffn import HIDDEN, make_experts, plain


def flat_arguments(implementation: str, dtype=torch.float64, hidden: int = 4, features: int = 6, keep: bool = True):
    weights = [
        torch.randn(shape, dtype=dtype, requires_grad=True)
        for shape in ((features, hidden), (features, hidden), (hidden, features)) * 2
    ]
    x = torch.randn(6, hidden, dtype=dtype, requires_grad=True)
    return (x, *weights, torch.tensor([0, 1, 1]), 2, [0, 0, 2, 1, 2, 6], None, keep, "zeros", implementation)


@pytest.mark.parametrize("implementation", ["reference", "slices", "grouped"])
@pytest.mark.parametrize("keep", [True, False])
def test_gradcheck(implementation, keep, small_blocks) -> None:
    arguments = flat_arguments(implementation, keep=keep)

    assert torch.autograd.gradcheck(
        lambda *tensors: op(*tensors, *arguments[7:])[0], arguments[:7], fast_mode=implementation != "reference"
    )


@pytest.mark.parametrize("implementation", ["reference", "grouped"])
def test_opcheck_of_the_ffn(implementation, small_blocks) -> None:
    # test_aot_dispatch_dynamic among them: the fake follows symbolic sizes
    torch.library.opcheck(op, flat_arguments(implementation, torch.float32, 16, 32))


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_opcheck_of_the_router(pooling) -> None:
    sizes = ((8,), (4, 8), (4,), (2, 4), (2,))
    weights = [torch.randn(size, requires_grad=True) for size in sizes]
    query = torch.randn(8, requires_grad=True) if pooling == "attention" else None
    x, mask = torch.randn(2, 5, 8, requires_grad=True), torch.rand(2, 5) > 0.5

    # Not test_aot_dispatch_*: that harness builds gradients for every output and fails on the integer branch ids.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(route_op, (x, mask, *weights, query, "reference"), test_utils=checks)


def test_one_graph_serves_every_length(small_blocks) -> None:
    experts = make_experts(16, 32)
    graphs: list[int] = []

    def count(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    @torch.compile(backend=count, fullgraph=True, dynamic=True)
    def run(x, ids):
        return ops.branch_ffn(x * 1, experts, ids, backend="triton")

    for tokens in (5, 9, 33):
        x, ids = torch.randn(3, tokens, 16), torch.tensor([0, 1, 0])
        torch.testing.assert_close(run(x, ids), plain(x, experts, ids), rtol=1e-5, atol=1e-5)

    assert len(graphs) <= 2


def test_training_through_aot_autograd(small_blocks) -> None:
    experts, ids = make_experts(16, 32), torch.tensor([0, 1])
    x = torch.randn(2, 5, 16, requires_grad=True)
    run = torch.compile(
        lambda x: ops.branch_ffn(x, experts, ids, backend="triton").square().sum(), backend="aot_eager", fullgraph=True
    )
    wanted = [x, *experts.parameters()]

    found = torch.autograd.grad(run(x), wanted)

    want = torch.autograd.grad(plain(x, experts, ids).square().sum(), wanted)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_frozen_experts_launch_nothing(small_blocks, monkeypatch) -> None:
    launched: list[tuple] = []
    monkeypatch.setattr(
        grouped, "grad_weight", lambda *a: launched.append(a[-1]) or real(*a) if any(a[-1]) else (None, None)
    )
    from metis_home.kernels.grad_weight import grad_weight as real

    experts, x = make_experts(16, 32), torch.randn(2, 5, 16, requires_grad=True)
    experts[0].requires_grad_(False)
    experts[1].up_proj.weight.requires_grad_(False)

    dispatch.branch_ffn(x, experts, torch.tensor([0, 1]), implementation="grouped").sum().backward()

    assert launched == [(False, True), (False, True)]  # gate and down of expert 1
    assert all(p.grad is None for p in (*experts[0].parameters(), experts[1].up_proj.weight))
    assert experts[1].gate_proj.weight.grad.abs().sum() > 0


def test_no_gradient_of_x_is_computed_that_nobody_wants(small_blocks, monkeypatch) -> None:
    monkeypatch.setattr(grouped, "grad_x", None)  # calling it would fail
    experts = make_experts(16, 32)

    dispatch.branch_ffn(torch.randn(2, 5, 16), experts, torch.tensor([0, 1]), implementation="grouped").sum().backward()

    assert all(p.grad is not None for p in experts.parameters())


@pytest.mark.parametrize("implementation", ["slices", "grouped"])
def test_an_expert_without_rows_gets_zeros_or_none(implementation, small_blocks) -> None:
    experts, x = make_experts(16, 32), torch.randn(2, 5, 16)
    parameters = list(experts.parameters())

    for empty_gradient in ("zeros", "none"):
        y = dispatch.branch_ffn(
            x, experts, torch.tensor([1, 1]), implementation=implementation, empty_gradient=empty_gradient
        )
        gradients = torch.autograd.grad(y.sum(), parameters, allow_unused=True)
        unused, used = gradients[:3], gradients[3:]
        assert all(g is not None and g.any() for g in used)
        if empty_gradient == "zeros":
            assert all(torch.count_nonzero(g) == 0 for g in unused)
        else:
            assert unused == (None, None, None)


class Lora(nn.Linear):
    """Any other class of linear."""


def test_what_is_not_plain_goes_to_the_modules(small_blocks) -> None:
    x = torch.randn(1, 3, 16)

    def reason(change) -> str:
        experts = make_experts(16, 32).eval()
        change(experts)
        usable, why = dispatch.can_run(x, experts)
        assert not usable
        # the door falls back, and the modules decide
        same = x.to(experts[1].gate_proj.weight.dtype)
        y = ops.branch_ffn(same, experts, 1, backend="triton")
        assert y.shape == x.shape
        return why

    assert dispatch.can_run(x, make_experts(16, 32)) == (True, "")
    assert "hooks" in reason(lambda e: e[0].register_forward_hook(lambda *_: None))
    assert "hooks" in reason(lambda e: e[1].up_proj.register_full_backward_hook(lambda *_: None))
    assert "Lora" in reason(lambda e: setattr(e[1], "down_proj", Lora(32, 16, bias=False)))
    assert "bias" in reason(lambda e: setattr(e[0], "up_proj", nn.Linear(16, 32)))
    assert "SiLU" in reason(lambda e: setattr(e[0], "act_fn", nn.GELU()))
    assert "input is torch.float32" in reason(lambda e: e.to(torch.bfloat16))
    assert "share one dtype" in reason(lambda e: e[1].double())


def test_autocast_uses_the_modules_where_it_would_copy_weights() -> None:
    experts, x = make_experts(16, 32), torch.randn(1, 3, 16)

    with torch.autocast("cpu", torch.bfloat16):
        usable, reason = dispatch.can_run(x, experts)
        assert not usable
        assert "autocast" in reason
        assert ops.branch_ffn(x, experts, torch.tensor([1]), backend="triton").dtype == torch.bfloat16
        halves = make_experts(16, 32, torch.bfloat16)
        assert dispatch.can_run(x, halves)[0]  # the weights are as autocast wants them; x is cast
        assert ops.branch_ffn(x, halves, torch.tensor([1]), backend="triton").dtype == torch.bfloat16


def test_a_fallback_is_logged_once_with_its_reason(caplog) -> None:
    experts, x = make_experts(16, 32), torch.randn(1, 3, 16)
    experts[0].register_forward_hook(lambda *_: None)
    ops._logged.clear()

    for _ in range(3):
        ops.branch_ffn(x, experts, torch.tensor([1]), backend="triton")

    assert [record.getMessage() for record in caplog.records] == [
        "the modules compute the FFN, not the kernels: experts[0] has hooks"
    ]


def test_without_kernels_torch_works_and_triton_raises(monkeypatch) -> None:
    experts, x = make_experts(16, 32), torch.randn(1, 3, 16)
    monkeypatch.setitem(sys.modules, "metis_home.kernels", None)

    assert ops.branch_ffn(x, experts, torch.tensor([1]), backend="auto").shape == x.shape
    with pytest.raises(BackendError, match="cannot be imported"):
        ops.branch_ffn(x, experts, torch.tensor([1]), backend="triton")


def test_decode_refuses_what_it_cannot_do(small_blocks) -> None:
    experts, x = make_experts(), torch.randn(129, 1, HIDDEN)

    with pytest.raises(ValueError, match="at most 128 rows"), torch.no_grad():
        dispatch.branch_ffn(x, experts, 0, implementation="decode")


def test_slices_need_the_runs_and_unknown_ones_take_the_kernels(monkeypatch) -> None:
    monkeypatch.setenv("METIS_HOME_KERNEL_TABLE", str(SHIPPED / "sm_90.json"))

    def chosen(rows: int, *, knows_runs: bool, keep: bool = False) -> str:
        return ffn_op._resolve("auto", "forward", torch.empty(rows, 8), 8, knows_runs, keep)

    assert chosen(5000, knows_runs=True) == "slices"
    assert chosen(5000, knows_runs=False) == "grouped"
    assert chosen(5, knows_runs=False) == "decode"
    assert chosen(5, knows_runs=False, keep=True) == "grouped"

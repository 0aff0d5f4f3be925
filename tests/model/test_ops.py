"""The branch FFN sends each row through its expert; the plan puts each row in exactly one place."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metis_home import Branch, ops
from metis_home.branch_plan import BranchPlan, plan_branches
from metis_home.errors import BackendError, BranchError


def make_experts(width=8):
    torch.manual_seed(3)
    experts = nn.ModuleList([nn.Sequential(nn.Linear(width, 5), nn.SiLU(), nn.Linear(5, width)) for _ in Branch])
    return experts.eval()


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 63])
@pytest.mark.parametrize("branch", list(Branch))
def test_a_forced_branch_is_the_dense_ffn_bit_for_bit(num_tokens, branch):
    experts, x_BTD = make_experts(), torch.randn(2, num_tokens, 8)

    y_BTD = ops.branch_ffn(x_BTD, experts, int(branch), backend="torch")

    torch.testing.assert_close(y_BTD, experts[branch](x_BTD), rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), batch=st.integers(0, 5), tokens=st.integers(0, 6), training=st.booleans())
def test_each_row_goes_through_its_expert(data, batch, tokens, training):
    experts = make_experts().train(training)
    per_token = data.draw(st.booleans())
    shape = (batch, tokens) if per_token else (batch,)
    size = batch * tokens if per_token else batch
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)), dtype=torch.long)
    ids = ids.reshape(shape)
    x_BTD = torch.randn(batch, tokens, 8)

    y_BTD = ops.branch_ffn(x_BTD, experts, ids, backend="torch")

    ids_BT = ids if per_token else ids[:, None].expand(batch, tokens)
    expected = torch.where(ids_BT[..., None] == 1, experts[1](x_BTD), experts[0](x_BTD))
    torch.testing.assert_close(y_BTD, expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(0, 1), min_size=1, max_size=9), tokens=st.integers(1, 5))
def test_the_plan_puts_every_row_in_exactly_one_branch(ids, tokens):
    plan = plan_branches(torch.tensor(ids), len(ids), tokens, torch.device("cpu"))

    if len(set(ids)) == 1:
        assert plan == ids[0]
        return
    assert torch.equal(torch.cat(plan.rows).sort().values, torch.arange(len(ids) * tokens))
    for branch, rows in enumerate(plan.rows):
        assert all(ids[row // tokens] == branch for row in rows.tolist())
        assert rows.tolist() == sorted(rows.tolist())


def test_a_static_plan_computes_both_and_selects():
    experts, x_BTD = make_experts(), torch.randn(3, 4, 8)
    ids = torch.tensor([1, 0, 1])

    static = plan_branches(ids, 3, 4, x_BTD.device, static=True)

    assert static.rows is None
    torch.testing.assert_close(
        ops.branch_ffn(x_BTD, experts, static), ops.branch_ffn(x_BTD, experts, ids), rtol=1e-6, atol=1e-6
    )


def test_gradients_reach_the_rows_and_weights_that_were_used():
    experts = make_experts().double().train()
    x_BTD = torch.randn(2, 3, 8, dtype=torch.double, requires_grad=True)

    for ids in (1, torch.tensor([1, 0]), torch.tensor([[0, 1, 1], [1, 1, 0]])):
        assert torch.autograd.gradcheck(lambda x, ids=ids: ops.branch_ffn(x, experts, ids, backend="torch"), x_BTD)


def test_non_contiguous_input():
    experts, x = make_experts(), torch.randn(4, 8, 3).transpose(1, 2)
    ids = torch.tensor([0, 1, 1, 0])

    torch.testing.assert_close(ops.branch_ffn(x, experts, ids), ops.branch_ffn(x.contiguous(), experts, ids))


def test_permuting_the_batch_permutes_the_answers():
    experts, x = make_experts(), torch.randn(5, 3, 8)
    ids, order = torch.tensor([0, 1, 1, 0, 1]), torch.randperm(5)

    permuted = ops.branch_ffn(x[order], experts, ids[order])

    torch.testing.assert_close(permuted, ops.branch_ffn(x, experts, ids)[order], rtol=1e-6, atol=1e-6)


def test_a_plan_moves_between_devices():
    plan = plan_branches(torch.tensor([0, 1]), 2, 3, torch.device("cpu"))

    moved = plan.to("meta")

    assert isinstance(moved, BranchPlan)
    assert {moved.branch_ids.device.type, *(rows.device.type for rows in moved.rows)} == {"meta"}
    assert plan.to("cpu") is plan


def test_sharded_experts_are_both_called(monkeypatch):
    """Their parameters are gathered by collectives, which all ranks must issue alike."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Linear(8, 8)
            self.calls = []

        def forward(self, x):
            self.calls.append(x.shape[0])
            return self.down_proj(x)

    experts = nn.ModuleList([Expert(), Expert()]).eval()
    ops.branch_ffn(torch.randn(2, 3, 8), experts, 1)
    assert [expert.calls for expert in experts] == [[], [2]]

    for expert in experts:
        expert.down_proj.weight.ds_id = 1  # as DeepSpeed ZeRO-3 marks a partitioned parameter
    ops.branch_ffn(torch.randn(2, 3, 8), experts, 1)
    assert [expert.calls for expert in experts] == [[0], [2, 2]]


class TestBackends:
    def test_whether_kernels_are_usable_comes_with_a_reason(self):
        usable, reason = ops.kernels_usable("cpu")

        assert usable == (os.environ.get("TRITON_INTERPRET") == "1")
        assert reason

    def test_unknown_backends_are_refused(self):
        with pytest.raises(BackendError, match="auto, torch, triton; found 'cuda'"):
            ops.set_backend("cuda")
        with pytest.raises(BackendError, match="found 'cuda'"):
            ops.branch_ffn(torch.randn(1, 1, 8), make_experts(), 0, backend="cuda")

    def test_set_backend_is_read_back(self):
        before = ops.get_backend()
        try:
            ops.set_backend("torch")
            assert ops.get_backend() == "torch"
        finally:
            ops.set_backend(before)


def test_bad_branch_ids():
    with pytest.raises(BranchError, match="found 7"):
        ops.branch_ffn(torch.randn(1, 1, 8), make_experts(), 7)

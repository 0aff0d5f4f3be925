"""The FFN kernels, interpreted, against the float64 reference: forward and backward, all implementations."""

import pytest
import torch

from metis_home.kernels import dispatch
from tests.kernels.ffn import FEATURES, HIDDEN, RAGGED, assert_as_good, make_experts, oracle, oracle_gradients, plain

# (ids, tokens): BLOCK_ROWS is 16, so runs end at, before and after a tile's end
MIXES = {
    "branch 0 empty": ([1, 1, 1], 7),
    "branch 1 empty": ([0, 0], 17),
    "both": ([0, 1, 0], 16),
    "one before a border": ([0, 1], 15),
    "one after a border": ([1, 0], 17),
    "alternating rows": ([0, 1] * 10, 1),
    "one row": ([1], 1),
    "long run": ([0, 0, 1], 37),
}
IMPLEMENTATIONS = ("slices", "grouped", "decode")


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_forward_is_as_good_as_the_modules(mix, form) -> None:
    ids, tokens = torch.tensor(mix[0]), mix[1]
    experts, x = make_experts(dtype=torch.bfloat16), torch.randn(len(ids), tokens, HIDDEN).bfloat16()
    residual = torch.randn_like(x)
    truth, yardstick = oracle(x, experts, ids), plain(x, experts, ids)

    for implementation in IMPLEMENTATIONS:
        with torch.no_grad():
            y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
        assert_as_good(y, truth, yardstick)

        with torch.no_grad():
            y = dispatch.branch_ffn(x, experts, ids, residual_BTD=residual, implementation=implementation)
        assert_as_good(y, oracle(x, experts, ids, residual), yardstick + residual)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_backward_is_as_good_as_autograd(mix, form) -> None:
    ids, tokens = torch.tensor(mix[0]), mix[1]
    experts = make_experts(dtype=torch.bfloat16)
    x = torch.randn(len(ids), tokens, HIDDEN).bfloat16().requires_grad_()
    grad = torch.randn_like(x)
    wanted = [x, *experts.parameters()]
    truths = oracle_gradients(x, experts, ids, grad)
    yardsticks = torch.autograd.grad(plain(x, experts, ids), wanted, grad)

    for implementation in ("slices", "grouped"):
        for recompute in (False, True):
            y = dispatch.branch_ffn(x, experts, ids, implementation=implementation, recompute=recompute)
            gradients = torch.autograd.grad(y, wanted, grad)
            for found, truth, yardstick in zip(gradients, truths, yardsticks, strict=True):
                assert_as_good(found, truth, yardstick)
                if not truth.any():  # the expert without rows
                    assert torch.count_nonzero(found) == 0


@pytest.mark.parametrize("tokens", [1, 17])
def test_sizes_that_fit_no_block(tokens, small_blocks) -> None:
    ids = torch.tensor([1, 0, 1])
    experts, x = make_experts(*RAGGED), torch.randn(3, tokens, RAGGED[0]).requires_grad_()
    grad = torch.randn_like(x)
    truth, truths = oracle(x, experts, ids), oracle_gradients(x, experts, ids, grad)

    for implementation in IMPLEMENTATIONS:
        y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
        torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)  # float32 sums of 97 products
        gradients = torch.autograd.grad(y, [x, *experts.parameters()], grad)
        for found, want in zip(gradients, truths, strict=True):
            torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes(dtype, form) -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 0, 1]])  # packed: an id per token
    experts, x = make_experts(dtype=dtype), torch.randn(1, 7, HIDDEN, dtype=dtype)

    for implementation in IMPLEMENTATIONS:
        y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
        assert_as_good(y.detach(), oracle(x, experts, ids), plain(x, experts, ids).detach())


def test_the_interpreter_rounds_to_nearest_as_a_chip_does(small_blocks) -> None:
    # By itself it cuts bfloat16 towards zero: half of all values would be one step too small.
    from metis_home.kernels.reference import silu_mul as definition
    from metis_home.kernels.silu_mul import silu_mul

    gate, up = torch.randn(4, 999).bfloat16(), torch.randn(4, 999).bfloat16()
    gate[0, 0] = torch.nan

    found = silu_mul(gate, up)

    assert (found == definition(gate, up)).float().mean() > 0.99  # not 1: sigmoid differs in its last bit
    assert found[0, 0].isnan()


def test_an_interpreter_without_the_bfloat16_guard_would_be_noticed(small_blocks, monkeypatch) -> None:
    # tl.dot of bfloat16 in the interpreter multiplies raw bits. The guard widens first; without it, this must fail.
    ids = torch.tensor([0, 1])
    experts, x = make_experts(dtype=torch.bfloat16), torch.randn(2, 9, HIDDEN).bfloat16()
    truth = oracle(x, experts, ids)
    with torch.no_grad():
        good = dispatch.branch_ffn(x, experts, ids, implementation="grouped")
    assert (good.double() - truth).abs().max() < 0.02 * truth.abs().max()

    from metis_home.kernels import interpreter

    monkeypatch.setattr(interpreter, "_UPCAST", type(interpreter._UPCAST)(False))
    with torch.no_grad():
        bad = dispatch.branch_ffn(x, experts, ids, implementation="grouped")
    assert not (bad.double() - truth).abs().max() < truth.abs().max()


@pytest.mark.parametrize("implementation", ["grouped", "decode"])
def test_every_run_gives_the_same_bits(implementation, small_blocks) -> None:
    ids = torch.tensor([0, 1, 0, 1, 1])
    experts, x = make_experts(dtype=torch.bfloat16), torch.randn(5, 5, HIDDEN).bfloat16().requires_grad_()
    grad = torch.randn_like(x)

    def once() -> list[torch.Tensor]:
        y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
        return [y, *torch.autograd.grad(y, [x, *experts.parameters()], grad)]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("implementation", ["grouped", "decode", "slices"])
def test_permuting_sequences_permutes_the_answers(implementation, form) -> None:
    ids, order = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([3, 0, 4, 2, 1])
    # float64: bit-equal on a device (`make gpu-check`); here numpy's matmul may round a row by its place in the block
    experts, x = make_experts(dtype=torch.float64), torch.randn(5, 6, HIDDEN, dtype=torch.float64)

    with torch.no_grad():
        y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
        permuted = dispatch.branch_ffn(x[order], experts, ids[order], implementation=implementation)
        # sorted by branch: two runs, the other way to lay out a batch
        by_branch = ids.argsort(stable=True)
        ordered = dispatch.branch_ffn(x[by_branch], experts, ids[by_branch], implementation=implementation)

    torch.testing.assert_close(permuted, y[order], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ordered, y[by_branch], rtol=1e-13, atol=1e-13)


def test_x_may_be_used_twice_and_gradients_add_up(small_blocks) -> None:
    ids = torch.tensor([0, 1])
    experts, x = make_experts(dtype=torch.float64), torch.randn(2, 5, HIDDEN, dtype=torch.float64).requires_grad_()

    for _ in range(2):
        y = dispatch.branch_ffn(x, experts, ids, implementation="grouped")
        (y * 2 + dispatch.branch_ffn(x * 3, experts, ids, implementation="grouped")).sum().backward()
    found = [p.grad / 2 for p in (x, *experts.parameters())]

    want = torch.autograd.grad(
        (plain(x, experts, ids) * 2 + plain(x * 3, experts, ids)).sum(), [x, *experts.parameters()]
    )
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_rows_at_all(shape, small_blocks) -> None:
    experts, x = make_experts(), torch.randn(*shape, HIDDEN).requires_grad_()
    ids = torch.zeros(shape[0], dtype=torch.long)

    y = dispatch.branch_ffn(x, experts, ids)
    y.sum().backward()

    assert y.shape == x.shape
    assert all(torch.count_nonzero(p.grad) == 0 for p in experts.parameters())


def test_few_rows_of_every_count(small_blocks) -> None:
    experts = make_experts(dtype=torch.float32)
    for batch in (1, 2, 16, 17, 33, 64, 127, 128, 129):
        ids, x = torch.randint(0, 2, (batch,)), torch.randn(batch, 1, HIDDEN)
        with torch.no_grad():
            y = dispatch.branch_ffn(x, experts, ids, implementation="decode" if batch <= 128 else "grouped")
        torch.testing.assert_close(y.double(), oracle(x, experts, ids), rtol=1e-5, atol=1e-5)


def test_half_precision_overflow_is_infinite_and_not_garbage(small_blocks) -> None:
    experts = make_experts(dtype=torch.float16)
    x = torch.full((1, 2, HIDDEN), 3e3, dtype=torch.float16)  # silu(gate) * up passes 65,504

    with torch.no_grad():
        y = dispatch.branch_ffn(x, experts, 1, implementation="grouped")

    assert torch.equal(torch.isfinite(y), torch.isfinite(experts[1](x)))


def test_saved_activations_are_what_the_note_promises(small_blocks) -> None:
    ids = torch.tensor([0, 1])
    experts, x = make_experts(dtype=torch.bfloat16), torch.randn(2, 8, HIDDEN).bfloat16().requires_grad_()
    weights = {p.data_ptr() for p in experts.parameters()}

    def saved_values_per_row(**options) -> int:
        kept: dict[int, int] = {}

        def pack(tensor):
            if tensor.data_ptr() not in weights and tensor.is_floating_point():
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            dispatch.branch_ffn(x, experts, ids, implementation="grouped", **options)
        return sum(kept.values()) // 16

    assert saved_values_per_row() == 2 * FEATURES + HIDDEN
    assert saved_values_per_row(recompute=True) == HIDDEN

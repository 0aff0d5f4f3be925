"""What the kernels may not touch: neighbours of a run, unused weights, memory beyond their tensors; and far offsets."""

import mmap

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from metis_home.kernels import dispatch
from metis_home.kernels.grad_weight import grad_weight
from tests.kernels.ffn import HIDDEN, make_experts, oracle, oracle_gradients

KERNELS = ("grouped", "decode")


@pytest.mark.parametrize("implementation", [*KERNELS, "slices"])
@pytest.mark.parametrize("used", [0, 1])
def test_the_weights_of_an_unused_branch_are_never_read(implementation, used, form) -> None:
    experts, ids = make_experts(), torch.tensor([used, used])
    x = torch.randn(2, 9, HIDDEN).requires_grad_()
    grad = torch.randn_like(x)
    truth, truths = oracle(x, experts, ids), oracle_gradients(x, experts, ids, grad)
    for parameter in experts[1 - used].parameters():
        parameter.data.fill_(torch.nan)

    y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
    gradients = torch.autograd.grad(y, [x, *experts.parameters()], grad)

    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    for found, want in zip(gradients, truths, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-4)  # zeros for the unused expert


@pytest.mark.parametrize("implementation", KERNELS)
def test_no_address_of_an_unused_weight_is_loaded(implementation, form, monkeypatch) -> None:
    # NaN cannot show a load whose result is thrown away, and loads are what decoding is made of.
    experts, ids = make_experts(), torch.tensor([1, 1])
    spans = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in experts[0].parameters()]
    own = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in experts[1].parameters()]
    seen = {"unused": 0, "used": 0}
    load = InterpreterBuilder.create_masked_load

    def watch(self, ptrs, mask, *arguments, **options):
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data.astype(bool)]
        for name, ranges in (("unused", spans), ("used", own)):
            seen[name] += sum(int(((addresses >= low) & (addresses < high)).sum()) for low, high in ranges)
        return load(self, ptrs, mask, *arguments, **options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watch)
    with torch.no_grad():
        dispatch.branch_ffn(torch.randn(2, 9, HIDDEN), experts, ids, implementation=implementation)

    assert seen["unused"] == 0
    assert seen["used"] > 0


@pytest.mark.parametrize("implementation", [*KERNELS, "slices"])
def test_a_poisoned_sequence_stays_alone(implementation, form) -> None:
    # Its rows share tiles, masks and descriptors with the rows beside them; 0 times NaN would spread it.
    experts, ids = make_experts(), torch.tensor([0, 1, 0])
    x = torch.randn(3, 9, HIDDEN)
    x[1] = torch.nan
    x.requires_grad_()
    grad = torch.randn_like(x)
    grad[1] = torch.nan

    y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
    gradients = torch.autograd.grad(y, [x, *experts[0].parameters()], grad)

    clean = [0, 2]
    torch.testing.assert_close(y[clean].double(), oracle(x[clean], experts, ids[clean]), rtol=1e-5, atol=1e-5)
    want = oracle_gradients(x[clean], experts, ids[clean], grad[clean])
    torch.testing.assert_close(gradients[0][clean].double(), want[0], rtol=1e-5, atol=1e-4)
    for found, truth in zip(gradients[1:], want[1:4], strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", KERNELS)
def test_every_output_is_written_and_nothing_around_it(implementation, form, monkeypatch) -> None:
    # Fresh memory holds NaN, and every allocation has a margin that must stay as it is.
    margin, allocations = 64, []
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(shape, dtype, device):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)
        size = int(torch.Size(shape).numel())
        buffer = empty(size + 2 * margin, dtype=dtype, device=device)
        buffer.fill_(torch.nan if buffer.is_floating_point() else -77)
        allocations.append(buffer)
        return buffer[margin : margin + size].view(shape)

    monkeypatch.setattr(
        torch, "empty", lambda *shape, dtype=torch.float32, device="cpu", **_: poisoned(shape, dtype, device)
    )
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *shape, dtype=None, device=None, **_: poisoned(shape, dtype or self.dtype, self.device),
    )
    experts, ids = make_experts(), torch.tensor([0, 1, 1])
    x = torch.randn(3, 7, HIDDEN).requires_grad_()

    y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
    gradients = torch.autograd.grad(y, [x, *experts.parameters()], torch.ones_like(y))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    assert all(torch.isfinite(tensor).all() for tensor in (y, *gradients))
    assert allocations
    for buffer in allocations:
        for border in (buffer[:margin], buffer[-margin:]):
            assert border.isnan().all() if border.is_floating_point() else (border == -77).all()


@pytest.mark.parametrize("implementation", KERNELS)
def test_x_need_not_be_contiguous(implementation, form) -> None:
    experts, ids = make_experts(), torch.tensor([0, 1])
    wide = torch.randn(2, 9, 2 * HIDDEN)
    layouts = {
        "every second row": torch.randn(2, 18, HIDDEN)[:, ::2],
        "left half of each row": wide[..., :HIDDEN],
        "unaligned": wide.flatten()[1 : 1 + 2 * 9 * HIDDEN].view(2, 9, HIDDEN),
        "transposed": torch.randn(9, 2, HIDDEN).transpose(0, 1),
        "columns strided": wide[..., ::2],
        "expanded": torch.randn(1, 1, HIDDEN).expand(2, 9, HIDDEN),
    }
    for name, x in layouts.items():
        with torch.no_grad():
            y = dispatch.branch_ffn(x, experts, ids, implementation=implementation, residual_BTD=x)
        want = oracle(x, experts, ids, x)
        torch.testing.assert_close(
            y.double(), want, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def far_rows(rows: int, stride: int) -> torch.Tensor:
    """(rows, HIDDEN) random values, `stride` elements apart. Only the touched pages of that address space exist."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    reserved = mmap.mmap(-1, ((rows - 1) * stride + HIDDEN) * 4, flags=flags)
    far = torch.frombuffer(reserved, dtype=torch.float32).as_strided((rows, HIDDEN), (stride, 1))
    return far.copy_(torch.randn(rows, HIDDEN))


@pytest.fixture
def _in_place(monkeypatch) -> None:
    # After a launch the interpreter copies every storage back onto itself, which would touch all of its pages.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)


@pytest.mark.usefixtures("_in_place")
@pytest.mark.parametrize("implementation", KERNELS)
def test_offsets_beyond_two_to_the_31(implementation, form) -> None:
    x = far_rows(2, 2**31 + 8)[:, None]
    experts, ids = make_experts(), torch.tensor([0, 1])

    with torch.no_grad():
        y = dispatch.branch_ffn(x, experts, ids, implementation=implementation, residual_BTD=x)

    torch.testing.assert_close(y.double(), oracle(x, experts, ids, x), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_in_place")
def test_weight_gradients_read_beyond_two_to_the_31(form) -> None:
    far, near = far_rows(2, 2**31 + 8), torch.randn(2, 80)

    first, second = grad_weight(near, far, torch.tensor([1, 0]), 1, (True, True))

    torch.testing.assert_close(first, near[1:].T @ far[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, near[:1].T @ far[:1], rtol=1e-5, atol=1e-5)

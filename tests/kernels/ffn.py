"""Small experts and the oracle: the reference in float64, from the rounded inputs."""

import torch
from torch import Tensor, nn

from metis_home.kernels import reference
from metis_home.kernels.reference import ExpertWeights

HIDDEN, FEATURES = 48, 80  # no multiples of the 32 columns of a test block, but of 16 bytes, as TMA needs
RAGGED = 47, 97


class Ffn(nn.Module):
    """A plain SwiGLU with the names of `Qwen2MLP`."""

    def __init__(self, hidden: int, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, features, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden, features, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(features, hidden, bias=False, dtype=dtype)
        self.act_fn = nn.SiLU()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def make_experts(hidden: int = HIDDEN, features: int = FEATURES, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """Two experts."""
    return nn.ModuleList([Ffn(hidden, features, dtype), Ffn(hidden, features, dtype)])


def weights_of(experts: nn.ModuleList, dtype: torch.dtype) -> tuple[ExpertWeights, ExpertWeights]:
    """The experts' weights, detached, in `dtype`."""
    first, second = (ExpertWeights(*(p.detach().to(dtype) for p in expert.parameters())) for expert in experts)
    return first, second


def oracle(x_BTD: Tensor, experts: nn.ModuleList, ids: Tensor, residual: Tensor | None = None) -> Tensor:
    """The forward in float64."""
    batch, tokens, hidden = x_BTD.shape
    rows_per_id = tokens if ids.dim() == 1 else 1
    flat = x_BTD.detach().double().reshape(-1, hidden)
    residual = None if residual is None else residual.double().reshape(-1, hidden)
    y, _, _ = reference.branch_ffn_forward(
        flat, weights_of(experts, torch.float64), ids.reshape(-1), rows_per_id, residual
    )
    return y.view(batch, tokens, hidden)


def oracle_gradients(x_BTD: Tensor, experts: nn.ModuleList, ids: Tensor, grad_BTD: Tensor) -> list[Tensor]:
    """Gradients of x and the six weights in float64, by the hand-written backward."""
    hidden = x_BTD.shape[-1]
    rows_per_id = x_BTD.shape[1] if ids.dim() == 1 else 1
    grad_x, (first, second) = reference.branch_ffn_backward(
        grad_BTD.double().reshape(-1, hidden),
        x_BTD.detach().double().reshape(-1, hidden),
        weights_of(experts, torch.float64),
        ids.reshape(-1),
        rows_per_id,
    )
    return [grad_x.view(x_BTD.shape), *first, *second]


def plain(x_BTD: Tensor, experts: nn.ModuleList, ids: Tensor) -> Tensor:
    """What calling the modules row by row gives, in their dtype: the yardstick for rounding."""
    branch_BT = ids if ids.dim() == 2 else ids[:, None].expand(x_BTD.shape[:2])
    return torch.where((branch_BT == 1)[..., None], experts[1](x_BTD), experts[0](x_BTD))


def assert_as_good(found: Tensor, truth: Tensor, yardstick: Tensor) -> None:
    """The error against the truth is at most 1.5 times that of the yardstick, in rms and at its largest.

    Of the few values of a test the largest error is a matter of luck, by half a step of the last rounding.
    """
    step = torch.finfo(found.dtype).eps * truth.abs().max().clamp(min=1e-30)
    ours, theirs = found.double() - truth, yardstick.double() - truth
    assert torch.isfinite(found).all()
    assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt() + 0.05 * step
    assert ours.abs().max() <= 1.5 * theirs.abs().max() + step / 2

"""The router's tensors: names, shapes and how a fresh one is filled.

Read by the model (which builds the module) and by the converter (which writes a fresh router without torch), so that
both always agree. No imports beyond the standard library.

The router pools the prompt's input embeddings, normalises, and applies a two-layer MLP (layout and sizes are ours; the
paper says "an MLP"):

    h = SiLU(W_hidden . RMSNorm(pool(x)) + b_hidden)        logits = W_output . h + b_output
"""

from dataclasses import dataclass
from typing import Literal

Pooling = Literal["mean", "attention"]
POOLINGS: tuple[str, ...] = ("mean", "attention")
DEFAULT_ROUTER_HIDDEN_SIZE = 256  # ours: 0.9 M parameters at 7B
DEFAULT_POOLING: Pooling = "mean"  # decided by `make study`, see docs/decisions/0006


@dataclass(frozen=True, slots=True)
class TensorInit:
    """A float32 tensor of a fresh router: its shape, and `std` of a normal distribution or a `constant`."""

    shape: tuple[int, ...]
    std: float | None = None
    constant: float | None = None


def router_tensors(hidden_size: int, router_hidden_size: int, pooling: str) -> dict[str, TensorInit]:
    """Return {name inside the router: how to fill it}, float32, in a fixed order.

    `query` starts at zero, so that attention pooling starts as mean pooling.
    """
    tensors = {
        "norm.weight": TensorInit((hidden_size,), constant=1.0),
        "hidden.weight": TensorInit((router_hidden_size, hidden_size), std=hidden_size**-0.5),
        "hidden.bias": TensorInit((router_hidden_size,), constant=0.0),
        "output.weight": TensorInit((2, router_hidden_size), std=router_hidden_size**-0.5),
        "output.bias": TensorInit((2,), constant=0.0),
    }
    if pooling == "attention":
        tensors["query"] = TensorInit((hidden_size,), constant=0.0)
    return tensors

"""The calls whose launches `offline.py` compiles: each wrapper, at the row counts where its table entry changes."""

from collections.abc import Callable, Iterator

import torch

from metis_home.kernels.launch_table import SHIPPED, read_table
from metis_home.kernels.reference import ExpertWeights

Case = tuple[str, Callable[[], object]]


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases(target: str, hidden: int, features: int, router_hidden: int) -> Iterator[Case]:
    """Yield (name, call) on bfloat16 meta tensors of the 7B shapes."""
    entries = read_table(SHIPPED / f"{target}.json").shapes["any"]
    yield from _ffn_cases(entries, hidden, features)
    yield from _router_cases(hidden, router_hidden)


def _ffn_cases(entries: dict, hidden: int, features: int) -> Iterator[Case]:
    from metis_home.kernels.decode import decode_down, decode_gate_up
    from metis_home.kernels.down import down
    from metis_home.kernels.gate_up import gate_up
    from metis_home.kernels.grad_input import grad_a, grad_x
    from metis_home.kernels.grad_weight import grad_weight
    from metis_home.kernels.silu_mul import dswiglu, silu_mul

    experts = tuple(
        ExpertWeights(_empty(features, hidden), _empty(features, hidden), _empty(hidden, features)) for _ in range(2)
    )
    ids = _empty(32, dtype=torch.int64)
    x, wide = _empty(4096, hidden), _empty(4096, features)

    for keep in (False, True):
        name = "gate_up_keep" if keep else "gate_up"
        yield name, lambda keep=keep: gate_up(x, experts, ids, 128, keep=keep)
        for bucket, config in entries.get(f"{name}_pointer", {}).items():
            call = lambda keep=keep, config=config: gate_up(x, experts, ids, 128, keep=keep, config=config)  # noqa: E731
            yield f"{name}_pointer {bucket}", call
    for kernel in ("down", "down_pointer"):
        for bucket, config in entries.get(kernel, {}).items():
            residual = x if config["SPLIT"] == 1 else None  # a split sum adds it in the last pass
            yield (
                f"{kernel} {bucket}",
                lambda config=config, residual=residual: down(wide, experts, ids, 128, residual, config=config),
            )
    yield "grad_a", lambda: grad_a(x, wide, wide, experts, ids, 128)
    yield "grad_x", lambda: grad_x(wide, wide, experts, ids, 128)
    for bucket, config in entries.get("grad_x_pointer", {}).items():
        yield f"grad_x_pointer {bucket}", lambda config=config: grad_x(wide, wide, experts, ids, 128, config=config)
    for bucket, config in entries.get("grad_a_pointer", {}).items():
        yield f"grad_a_pointer {bucket}", lambda config=config: grad_a(x, wide, wide, experts, ids, 128, config=config)
    for bucket, config in entries.get("grad_w_pointer", {}).items():
        yield (
            f"grad_w_pointer {bucket}",
            lambda config=config: grad_weight(wide, x, ids, 128, (True, True), config=config),
        )
    yield "grad_w", lambda: grad_weight(wide, x, ids, 128, (True, True))
    yield "grad_w down", lambda: grad_weight(x, wide, ids, 128, (True, True))
    for rows in (8, 32, 64, 128):
        few, few_wide, few_ids = _empty(rows, hidden), _empty(rows, features), _empty(rows, dtype=torch.int64)
        yield f"decode_gate_up {rows}", lambda few=few, i=few_ids: decode_gate_up(few, experts, i, 1)
        yield f"decode_down {rows}", lambda few_wide=few_wide, i=few_ids: decode_down(few_wide, experts, i, 1)
    # Arguments that equal 1 are compiled in as constants, which not every expression survives.
    one, one_wide, one_id = _empty(1, hidden), _empty(1, features), _empty(1, dtype=torch.int64)
    yield "decode_gate_up 1", lambda: decode_gate_up(one, experts, one_id, 1)
    yield "decode_down 1", lambda: decode_down(one_wide, experts, one_id, 1)
    yield "gate_up 1", lambda: gate_up(one, experts, one_id, 1, keep=True)
    yield "grad_w 1", lambda: grad_weight(one_wide, one, one_id, 1, (True, False))
    yield "silu_mul", lambda: silu_mul(wide, wide)
    yield "dswiglu", lambda: dswiglu(wide, wide, wide)


def _router_cases(hidden: int, router_hidden: int) -> Iterator[Case]:
    from metis_home.kernels.reference_route import Pooled, RouterWeights
    from metis_home.kernels.route import route_queries
    from metis_home.kernels.route_backward import pool_backward

    def wide(*shape: int) -> torch.Tensor:
        return _empty(*shape, dtype=torch.float32)

    x, mask = _empty(32, 128, hidden), _empty(32, 128, dtype=torch.bool)
    shapes = ((hidden,), (router_hidden, hidden), (router_hidden,), (2, router_hidden), (2,))
    pooled = Pooled(wide(32, hidden), wide(32), wide(32))
    for query in (None, wide(hidden)):
        weights = RouterWeights(*(wide(*shape) for shape in shapes), query)
        pooling = "mean" if query is None else "attention"
        yield f"route {pooling}", lambda weights=weights: route_queries(x, mask, weights)
        yield f"route_backward {pooling}", lambda query=query: pool_backward(wide(32, hidden), x, mask, query, pooled)

"""The branch FFN against every peer that can be imported here: `python benchmarks/branch_ffn.py --out DIR`.

First the two ceilings of this card in the same process (device-to-device copy, bf16 matmul on random data), then each
row of the goal table. Providers take turns (round-robin), on random data, with the second-level cache flushed; rows below
200 us replay as CUDA graphs where the provider can be captured. Median with p20 and p80, peer time / ours, and percent
of the ceiling that binds. Peers that need fused weights get copies made outside the timed region and deleted after.
Writes DIR/kernels.json and DIR/kernels.md; lost rows included.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.gpu_check import FEATURES, HIDDEN, device_facts, make_experts  # noqa: E402

Call = Callable[[], object]
Peer = Callable[..., Call]
# (name, batch, tokens, mix, training)
ROWS = [
    *((f"decode B={batch} one branch", batch, 1, "one", False) for batch in (1, 8, 16, 32, 128)),
    *((f"decode B={batch} mixed", batch, 1, "mixed", False) for batch in (2, 16, 64, 128)),
    *((f"forward T={2 * tokens} mixed", 2, tokens, "mixed", False) for tokens in (128, 512, 1024, 2048, 8192, 32768)),
    *((f"forward + backward T={2 * tokens} mixed", 2, tokens, "mixed", True) for tokens in (2048, 8192)),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seconds", type=float, default=300, help="stop starting rows after this long")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmark: no GPU that this torch can use", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    limits = ceilings()
    print(f"ceilings: {limits['copy_tb_s']:.2f} TB/s, {limits['matmul_tflop_s']:.0f} TFLOP/s", file=sys.stderr)
    experts, rows, skipped = make_experts(), [], []
    for name, batch, tokens, mix, training in ROWS:
        if time.monotonic() > deadline:
            skipped.append(name)
            continue
        rows.append(measure_row(name, batch, tokens, mix, training, experts, limits, options.rounds))
        print(markdown_row(rows[-1]), file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    report = {"device": device_facts(), "ceilings": limits, "rows": rows, "out_of_time": skipped}
    (options.out / "kernels.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (options.out / "kernels.md").write_text(markdown(report), encoding="utf-8")
    print(options.out / "kernels.md")
    return 0


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read + written) and bf16 matmul rate, each the best of several medians."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy_ms = min(median(timed([lambda: target.copy_(source)], 20)[0]) for _ in range(2))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul_ms = min(median(timed([lambda: a @ b], 20)[0]) for _ in range(2))
    return {"copy_tb_s": 2 * 2**31 / copy_ms / 1e9, "matmul_tflop_s": 2 * 8192**3 / matmul_ms / 1e9}


def timed(calls: list[Call], rounds: int) -> list[list[float]]:
    """Milliseconds of each call, taking turns, each after a write that pushes everything out of L2."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for call in calls:
        for _ in range(3):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for index, call in enumerate(calls):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times[index].append(start.elapsed_time(end))
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


def captured(call: Call) -> Call:
    """The replay of `call` as a CUDA graph, or `call` itself if it cannot be captured (it waits for the device)."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def measure_row(name, batch, tokens, mix, training, experts, limits, rounds) -> dict:
    x = torch.randn(batch, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    host_ids = torch.ones(batch, dtype=torch.long) if mix == "one" else torch.arange(batch) % 2
    ids = host_ids.cuda()
    experts.requires_grad_(training)
    row: dict = {"name": name, "batch": batch, "tokens": tokens, "mix": mix, "training": training, "providers": {}}
    calls: dict[str, Call] = {}
    want = None
    for provider, make in {**OURS, **PEERS}.items():
        try:
            forward = make(x, experts, ids, host_ids)
            found = forward().detach().reshape(-1, HIDDEN)
            want = found if want is None else want
            error = ((found - want).float().square().mean().sqrt() / want.float().square().mean().sqrt()).item()
            if not error < 2e-2:
                raise ValueError(f"wrong result, relative error {error:.2e}")
            calls[provider] = training_step(forward, x) if training else graphed(forward)
        except Exception as error:  # a peer that is absent or refuses the shape is a line in the report, not a stop
            row["providers"][provider] = {"error": f"{type(error).__name__}: {str(error)[:160]}"}
    for provider, times in zip(calls, timed(list(calls.values()), rounds), strict=True):
        p20, p50, p80 = (statistics.quantiles(times, n=10)[index] for index in (1, 4, 7))
        row["providers"][provider] = {"ms": p50, "p20": p20, "p80": p80}
    rows = batch * tokens
    flop = (18 if training else 6) * rows * HIDDEN * FEATURES
    bytes_moved = 2 * 3 * HIDDEN * FEATURES * len(set(host_ids.tolist())) * (3 if training else 1)
    bound_ms = max(flop / limits["matmul_tflop_s"] / 1e9, bytes_moved / limits["copy_tb_s"] / 1e9)
    best = min((entry["ms"] for key, entry in row["providers"].items() if key in OURS and "ms" in entry), default=None)
    row |= {"bound_ms": bound_ms, "ours_ms": best, "percent_of_ceiling": best and 100 * bound_ms / best}
    return row


def graphed(forward: Call) -> Call:
    with torch.no_grad():
        forward()
        if median(timed([forward], 5)[0]) > 0.2:
            return no_grad(forward)
        return captured(no_grad(forward))


def no_grad(forward: Call) -> Call:
    def call() -> object:
        with torch.no_grad():
            return forward()

    return call


def training_step(forward: Call, x) -> Call:
    grad = torch.randn(x.numel() // HIDDEN, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        y = forward().reshape(-1, HIDDEN)
        y.backward(grad)

    return call


def ours(implementation: str, knows_runs: bool) -> Peer:
    from metis_home.kernels import dispatch

    def make(x, experts, ids, host_ids) -> Call:
        if implementation == "decode" and x.shape[0] * x.shape[1] > 128:
            raise ValueError("more than 128 rows")
        # The runs on the host are found once per forward of a model, not per layer: outside the timed region.
        plan = Plan(ids, dispatch.row_branches(host_ids, *x.shape[:2], x.device).runs) if knows_runs else ids
        return lambda: dispatch.branch_ffn(x, experts, plan, implementation=implementation)

    return make


class Plan:
    """What the model hands to its layers."""

    def __init__(self, branch_ids, runs) -> None:
        self.branch_ids, self.runs = branch_ids, runs


def modules(x, experts, ids, host_ids) -> Call:
    from metis_home.branch_plan import plan_branches
    from metis_home.ops import branch_ffn

    plan = plan_branches(host_ids, *x.shape[:2], x.device)
    return lambda: branch_ffn(x, experts, plan, backend="torch")


def both_and_where(x, experts, ids, host_ids) -> Call:
    is_thinking = (ids == 1)[:, None, None]
    return lambda: torch.where(is_thinking, experts[1](x), experts[0](x))


def fused_copies(experts):
    gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in experts]).detach()
    return gate_up, torch.stack([e.down_proj.weight for e in experts]).detach()


def hf(implementation: str) -> Peer:
    def make(x, experts, ids, host_ids) -> Call:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        rows = x.shape[0] * x.shape[1]
        if implementation == "batched_mm" and rows > 16:
            raise ValueError("copies 0.4 GB of weights per row")
        config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=FEATURES, num_experts=2)
        config._experts_implementation = implementation
        with torch.device("meta"):
            peer = Qwen3MoeExperts(config)
        gate_up, down = fused_copies(experts)
        trains = x.requires_grad
        peer.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=trains)
        peer.down_proj = torch.nn.Parameter(down, requires_grad=trains)
        index = ids.repeat_interleave(x.shape[1])[:, None]
        weight = torch.ones(rows, 1, device=x.device, dtype=x.dtype)
        return lambda: peer(x.reshape(-1, HIDDEN), index, weight)

    return make


def liger(x, experts, ids, host_ids) -> Call:
    from liger_kernel.ops import LigerFusedMoEFunction

    gate_up, down = (tensor.requires_grad_(x.requires_grad) for tensor in fused_copies(experts))
    index = ids.repeat_interleave(x.shape[1])[:, None].int()
    weight = torch.ones(len(index), 1, device=x.device, dtype=x.dtype)
    return lambda: LigerFusedMoEFunction.apply(x.reshape(-1, HIDDEN), gate_up, down, index, weight)


def scattermoe(x, experts, ids, host_ids) -> Call:
    from scattermoe.mlp import GLUMLP

    peer = GLUMLP(HIDDEN, FEATURES, 2, 1).to(x.device, x.dtype).requires_grad_(x.requires_grad)
    with torch.no_grad():  # its first half is up, its second gate
        peer.experts.weight.copy_(torch.stack([torch.cat([e.up_proj.weight, e.gate_proj.weight]) for e in experts]))
        peer.output_experts.weight.copy_(fused_copies(experts)[1])
    index = ids.repeat_interleave(x.shape[1])[:, None]
    weight = torch.ones(len(index), 1, device=x.device, dtype=x.dtype)
    return lambda: peer(x.reshape(-1, HIDDEN), weight, index)


def triton_kernels(x, experts, ids, host_ids) -> Call:
    from triton_kernels.matmul_ogs import matmul_ogs
    from triton_kernels.routing import routing

    if x.requires_grad:
        raise ValueError("forward only")
    gate_up, down = (tensor.transpose(-2, -1).contiguous() for tensor in fused_copies(experts))
    logits = torch.nn.functional.one_hot(ids.repeat_interleave(x.shape[1]), 2).to(x.dtype) * 100
    routed, gather, scatter = routing(logits, 1)

    def call():
        h = matmul_ogs(x.reshape(-1, HIDDEN), gate_up, None, routed, gather_indx=gather)
        gate, up = h.chunk(2, -1)
        return matmul_ogs(torch.nn.functional.silu(gate) * up, down, None, routed, scatter_indx=scatter)

    return call


OURS: dict[str, Peer] = {
    "ours: cuBLAS slices": ours("slices", True),
    "ours: grouped": ours("grouped", False),
    "ours: decode": ours("decode", False),
}
PEERS: dict[str, Peer] = {
    "modules": modules,
    "both + where": both_and_where,
    "HF eager": hf("eager"),
    "HF grouped_mm": hf("grouped_mm"),
    "HF batched_mm": hf("batched_mm"),
    "Liger fused MoE": liger,
    "scattermoe": scattermoe,
    "triton_kernels": triton_kernels,
}


def markdown(report: dict) -> str:
    """The table, with ratios to our best implementation; a ratio under 1 is a row that we lose."""
    facts, limits = report["device"], report["ceilings"]
    lines = [
        f"{facts['name']}, torch {facts['torch']}, triton {facts['triton']}; measured ceilings "
        f"{limits['copy_tb_s']:.2f} TB/s copy, {limits['matmul_tflop_s']:.0f} TFLOP/s bf16 matmul. "
        "Milliseconds (median), and peer time / our best.",
        "",
        "| row | ceiling ms | % of ceiling | " + " | ".join([*OURS, *PEERS]) + " |",
        "|---" * (3 + len(OURS) + len(PEERS)) + "|",
        *(markdown_row(row) for row in report["rows"]),
    ]
    return "\n".join(lines) + "\n"


def markdown_row(row: dict) -> str:
    cells = []
    for provider in (*OURS, *PEERS):
        entry = row["providers"].get(provider, {})
        ratio = f" ({entry['ms'] / row['ours_ms']:.2f}x)" if "ms" in entry and row["ours_ms"] else ""
        cells.append(f"{entry['ms']:.4f}{ratio}" if "ms" in entry else "-")
    percent = f"{row['percent_of_ceiling']:.0f}" if row["percent_of_ceiling"] else "-"
    return f"| {row['name']} | {row['bound_ms']:.4f} | {percent} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())

"""`make gpu-check`: are the kernels right on this GPU, then how fast; one command, at most eight minutes, no network.

    python benchmarks/gpu_check.py --out DIR

Writes DIR/gpu_check.json (each check with its evidence) and, by `benchmarks/branch_ffn.py`, DIR/kernels.json and
DIR/kernels.md. Exit status 1 if a check fails; the benchmark then does not run: speed of wrong results is no result.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # for the benchmark, which imports from this file

HIDDEN, FEATURES = 3584, 18944


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--only", default="", help="run only checks whose name contains this")
    parser.add_argument("--no-benchmark", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no GPU that this torch can use", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    results = [run_check(check) for check in CHECKS if options.only in check.__name__]
    report = {"device": device_facts(), "checks": results}
    (options.out / "gpu_check.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    failed = [result["name"] for result in results if result["status"] == "failed"]
    print(f"{len(results) - len(failed)} of {len(results)} checks passed or skipped", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}; no benchmark of wrong results", file=sys.stderr)
        return 1
    if options.no_benchmark:
        return 0
    command = [sys.executable, str(ROOT / "benchmarks" / "branch_ffn.py"), "--out", str(options.out)]
    return subprocess.run(command, check=False).returncode


def device_facts() -> dict[str, str]:
    """What the numbers were taken on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": f"{properties.total_memory / 2**30:.1f}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def run_check(check: Callable[[], str]) -> dict[str, str]:
    """Run one check; its evidence, or what went wrong."""
    start = time.perf_counter()
    try:
        evidence = check()
        status = "skipped" if evidence.startswith("skipped") else "passed"
    except Exception as error:
        evidence, status = f"{type(error).__name__}: {str(error)[:2000]}", "failed"
    torch.cuda.empty_cache()
    seconds = f"{time.perf_counter() - start:.1f}"
    print(f"{status:8} {check.__name__} ({seconds} s): {evidence[:300]}", file=sys.stderr, flush=True)
    return {"name": check.__name__, "status": status, "evidence": evidence, "seconds": seconds}


def make_experts(hidden: int = HIDDEN, features: int = FEATURES, dtype: torch.dtype = torch.bfloat16):
    """Two random experts on the device; values that keep the outputs near 1."""
    from transformers import Qwen2Config
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2MLP

    config = Qwen2Config(hidden_size=hidden, intermediate_size=features)
    experts = torch.nn.ModuleList([Qwen2MLP(config), Qwen2MLP(config)]).to("cuda", dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return experts


def truth(x, experts, ids):
    """Forward in float64 of a sample of the rows: (row indices, values)."""
    rows = torch.randperm(x.shape[0] * x.shape[1], device=x.device)[:64].sort().values
    branch = ids[rows // x.shape[1]]
    flat = x.reshape(-1, x.shape[-1])[rows].double()
    values = torch.empty_like(flat)
    for index, expert in enumerate(experts):
        gate, up, down = (p.double() for p in expert.parameters())
        mine = branch == index
        values[mine] = (torch.nn.functional.silu(flat[mine] @ gate.T) * (flat[mine] @ up.T)) @ down.T
    return rows, values


def relative_rms(found, want) -> float:
    """rms of the error over rms of the truth; NaN never passes a comparison."""
    return ((found.double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def forward_is_as_good_as_the_modules() -> str:
    from metis_home.kernels import dispatch

    experts, evidence = make_experts(), []
    for batch, tokens in ((1, 1), (16, 1), (127, 1), (2, 128), (3, 129), (8, 500)):
        x = torch.randn(batch, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        ids = torch.arange(batch, device="cuda") % 2
        rows, want = truth(x, experts, ids)
        flat_ids = ids.repeat_interleave(tokens)[rows]
        sample = x.reshape(-1, HIDDEN)[rows]
        with torch.no_grad():
            modules = torch.where((flat_ids == 1)[:, None], experts[1](sample), experts[0](sample))
            for implementation in ("slices", "grouped", "decode"):
                if implementation == "decode" and batch * tokens > 128:
                    continue
                runs_known = ids.cpu() if implementation == "slices" else ids
                y = dispatch.branch_ffn(x, experts, runs_known, implementation=implementation)
                ours, theirs = relative_rms(y.reshape(-1, HIDDEN)[rows], want), relative_rms(modules, want)
                assert ours <= 1.5 * theirs, f"{implementation} {batch}x{tokens}: {ours:.2e}, modules {theirs:.2e}"
                evidence.append(f"{implementation} {batch}x{tokens} {ours:.1e}/{theirs:.1e}")
    return "; ".join(evidence)


def backward_is_as_good_as_autograd() -> str:
    from metis_home.kernels import dispatch

    hidden, features = 1024, 2816
    experts, evidence = make_experts(hidden, features), []
    wide = make_experts(hidden, features, torch.float64)
    wide.load_state_dict(experts.state_dict())
    for ids in ([0, 1, 0], [1, 1, 1]):
        ids_B = torch.tensor(ids, device="cuda")
        x = torch.randn(3, 333, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn_like(x)

        def gradients(model, dtype, x=x, ids=ids, grad=grad):
            inputs = x.detach().to(dtype).requires_grad_()
            y = torch.stack([model[b](inputs[i]) for i, b in enumerate(ids)])
            used = [p for b in sorted(set(ids)) for p in model[b].parameters()]
            return torch.autograd.grad(y, [inputs, *used], grad.to(dtype))

        want, theirs = gradients(wide, torch.float64), gradients(experts, torch.bfloat16)
        for implementation in ("slices", "grouped"):
            for recompute in (False, True):
                runs_known = ids_B.cpu() if implementation == "slices" else ids_B
                y = dispatch.branch_ffn(x, experts, runs_known, implementation=implementation, recompute=recompute)
                found = list(torch.autograd.grad(y, [x, *experts.parameters()], grad))
                if 0 not in ids:
                    assert all(torch.count_nonzero(g) == 0 for g in found[1:4]), "empty branch: dW is not exactly 0"
                    del found[1:4]
                for f, w, t in zip(found, want, theirs, strict=True):
                    assert relative_rms(f, w) <= 1.5 * relative_rms(t, w), f"{implementation}: {relative_rms(f, w):.2e}"
                evidence.append(f"{implementation} {ids} dX {relative_rms(found[0], want[0]):.1e}")
    return "; ".join(evidence)


def unused_weights_are_never_read() -> str:
    from metis_home.kernels import dispatch

    experts = make_experts()
    for parameter in experts[0].parameters():
        parameter.data.fill_(torch.nan)
    for tokens, implementation in ((1, "decode"), (100, "grouped")):
        x = torch.randn(4, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            y = dispatch.branch_ffn(
                x, experts, torch.ones(4, dtype=torch.long, device="cuda"), implementation=implementation
            )
        assert torch.isfinite(y).all(), implementation
    return "branch 0 full of NaN, results finite"


def more_than_two_to_the_31_elements() -> str:
    from metis_home.kernels import dispatch

    free = torch.cuda.mem_get_info()[0] / 2**30
    rows = 2**31 // FEATURES + 300
    if free < 24:
        return f"skipped: {free:.0f} GiB free, 24 needed"
    experts = make_experts()
    x = torch.randn(2, rows // 2, HIDDEN, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([0, 1], device="cuda")
    with torch.no_grad():
        y = dispatch.branch_ffn(x, experts, ids, implementation="grouped")
    last = slice(-64, None)
    want = experts[1](x[1, last])
    error = relative_rms(y[1, last], want.double())
    assert error < 1e-2, error
    return f"{rows} rows x {FEATURES} = {rows * FEATURES / 2**31:.3f} x 2^31 elements, last rows differ by {error:.1e}"


def twenty_runs_give_the_same_bits() -> str:
    from metis_home.kernels import dispatch

    experts = make_experts(1024, 2816)
    for shape, implementation in (((16, 1), "decode"), ((4, 200), "grouped")):
        x = torch.randn(*shape, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ids = torch.arange(shape[0], device="cuda") % 2
        first = None
        for _ in range(20):
            y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
            all_bits = [y, *torch.autograd.grad(y.sum(), [x, *experts.parameters()])]
            first = first or all_bits
            assert all(torch.equal(a, b) for a, b in zip(first, all_bits, strict=True)), implementation
    return "forward and 7 gradients, split sums included"


def permuting_sequences_permutes_bits() -> str:
    from metis_home.kernels import dispatch

    experts = make_experts(1024, 2816)
    order = torch.tensor([3, 0, 4, 2, 1], device="cuda")
    for tokens, implementation in ((1, "decode"), (150, "grouped")):
        x = torch.randn(5, tokens, 1024, device="cuda", dtype=torch.bfloat16)
        ids = torch.tensor([0, 1, 0, 1, 1], device="cuda")
        with torch.no_grad():
            y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
            permuted = dispatch.branch_ffn(x[order], experts, ids[order], implementation=implementation)
        assert torch.equal(permuted, y[order]), implementation
    return "decode and grouped"


def a_captured_graph_replays_with_another_mix() -> str:
    from metis_home.kernels import dispatch

    experts = make_experts(1024, 2816)
    for tokens, implementation in ((1, "decode"), (150, "grouped")):
        x = torch.randn(6, tokens, 1024, device="cuda", dtype=torch.bfloat16)
        ids = torch.tensor([0, 1, 0, 1, 1, 0], device="cuda")
        with torch.no_grad():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                dispatch.branch_ffn(x, experts, ids, implementation=implementation)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = dispatch.branch_ffn(x, experts, ids, implementation=implementation)
            for mix in ([0] * 6, [1] * 6, [1, 1, 0, 0, 1, 0]):
                ids.copy_(torch.tensor(mix))
                y.fill_(torch.nan)
                graph.replay()
                assert torch.equal(y, dispatch.branch_ffn(x, experts, ids, implementation=implementation)), mix
    return "three other mixes, one-sided ones included"


def the_router_decides_as_defined() -> str:
    from metis_home.kernels import dispatch
    from metis_home.router import MetisHomeRouter

    evidence = []
    for pooling in ("mean", "attention"):
        router = MetisHomeRouter(HIDDEN, 256, pooling).cuda()
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        x = torch.randn(5, 700, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        mask = torch.rand(5, 700, device="cuda") > 0.3
        mask[2] = False
        wanted = [x, *router.parameters()]
        want = router(x, mask)
        _, _, logits = dispatch.route_queries(x, mask, router)
        error = (logits - want).abs().max().item()
        assert error < 1e-4, error
        ours, theirs = (torch.autograd.grad(value.sum(), wanted) for value in (logits, want))
        worst = max(relative_rms(a, b.double() + 1e-30) for a, b in zip(ours, theirs, strict=True))
        assert worst < 1e-2, worst
        evidence.append(f"{pooling}: logits {error:.1e}, gradients {worst:.1e}")
    return "; ".join(evidence)


def nothing_waits_for_the_device() -> str:
    from metis_home.kernels import dispatch

    experts = make_experts(1024, 2816)
    x = torch.randn(4, 200, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([0, 1, 1, 0], device="cuda")
    dispatch.branch_ffn(x, experts, ids).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dispatch.branch_ffn(x, experts, ids).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "forward and backward under sync_debug_mode=error"


def compute_sanitizer_finds_nothing() -> str:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return "skipped: compute-sanitizer is not installed"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(Path(__file__))]
    command += [
        "--only",
        "permuting",
        "--no-benchmark",
        "--out",
        os.path.join(os.environ.get("TMPDIR", "/tmp"), "memcheck"),
    ]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
    if "not supported" in result.stdout:
        return f"skipped: {result.stdout.strip().splitlines()[-1]}"
    assert result.returncode == 0, result.stdout[-1500:]
    return next((line for line in result.stdout.splitlines() if "ERROR SUMMARY" in line), "no errors")


CHECKS: list[Callable[[], str]] = [
    forward_is_as_good_as_the_modules,
    backward_is_as_good_as_autograd,
    unused_weights_are_never_read,
    more_than_two_to_the_31_elements,
    twenty_runs_give_the_same_bits,
    permuting_sequences_permutes_bits,
    a_captured_graph_replays_with_another_mix,
    the_router_decides_as_defined,
    nothing_waits_for_the_device,
    compute_sanitizer_finds_nothing,
]


if __name__ == "__main__":
    sys.exit(main())

"""Compile, for chips that are not here, exactly what the wrappers launch: no GPU, no driver.

    python tests/kernels/offline.py sm_90 [--out FILE.json]

Runs every wrapper on meta tensors of the 7B shapes under the shipped table of the target, catches each launch instead
of running it, compiles it for the target and reads registers, stack and instructions from the binary. Run it as its own
process, without TRITON_INTERPRET.

`knobs.nvidia.*` paths come from the triton wheel (ptxas, cuobjdump).
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

SHARED_LIMIT = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
HIDDEN, FEATURES, ROUTER_HIDDEN = 3584, 18944, 256


def compile_launch(kernel: Any, arguments: dict[str, Any], options: dict[str, int], target: str) -> Any:
    """Compile one recorded launch as the runtime would specialise it on the device."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
    names |= {torch.int64: "i64", torch.bool: "i1"}
    constexpr_names = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constexpr_names or value is None or (type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{names[value.dtype]}"
            aligned = True
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu, options=options)


def resources(compiled: Any, target: str) -> dict[str, Any]:
    """Registers, shared memory, stack and the telling instructions of one binary."""
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.vgpr_{word}:\s+(\d+)", text)[1]) for word in ("count", "spill_count"))
        return {"registers": registers, "stack": spills, "shared": shared, "instructions": []}
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([knobs.nvidia.cuobjdump.path, flag, str(cubin)], check=True, capture_output=True, text=True)
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    pattern = r"\b(STL|LDL|HGMMA|HMMA|UTMALDG|UTMASTG|LDGSTS|UTCHMMA|UTCMMA)\b"
    instructions = sorted(set(re.findall(pattern, code.stdout)))
    return {"registers": registers, "stack": stack, "shared": shared, "instructions": instructions}


def record_launches(target: str) -> list[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Call every wrapper on meta tensors; return (what, kernel, arguments, options) of each distinct launch."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[str, Any, dict[str, Any], dict[str, int]]] = []
    seen: set[str] = set()
    case = [""]

    def catch(self, *positional, grid, warmup, **keywords):
        arguments = dict(zip(self.arg_names, positional, strict=False))
        options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
        arguments |= {name: value for name, value in keywords.items() if name in self.arg_names}
        constexprs = {p.name: str(arguments[p.name]) for p in self.params if p.is_constexpr}
        types = [str(getattr(value, "dtype", value == 1)) for value in arguments.values()]
        key = json.dumps([self.__name__, constexprs, options, types], sort_keys=True)
        if key not in seen:
            seen.add(key)
            launches.append((case[0], self, arguments, options))

    original, JITFunction.run = JITFunction.run, catch
    try:
        from offline_cases import cases

        for name, call in cases(target, HIDDEN, FEATURES, ROUTER_HIDDEN):
            case[0] = name
            call()
    finally:
        JITFunction.run = original
    return launches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=SHARED_LIMIT)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", default="", help="compile only launches whose case or kernel contains this")
    options = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tests" / "kernels")]
    os.environ["METIS_HOME_KERNEL_TABLE"] = str(root / "kernels" / "tables" / f"{options.target}.json")
    rows = []
    for name, kernel, arguments, launch in record_launches(options.target):
        if options.only not in name and options.only not in kernel.__name__:
            continue
        start = time.perf_counter()
        row: dict[str, Any] = {"case": name, "kernel": kernel.__name__, "target": options.target}
        constants = {n: v for n, v in arguments.items() if n.isupper() and n not in ("D", "F", "WIDE")} | launch
        row["config"] = " ".join(f"{key}={value}" for key, value in constants.items())
        try:
            row |= resources(compile_launch(kernel, arguments, launch, options.target), options.target)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[-600:]}"
        row["seconds"] = round(time.perf_counter() - start, 2)
        rows.append(row)
        print(*(row.get(key, "") for key in ("target", "case", "kernel", "config", "registers", "shared", "stack",
                "instructions", "error", "seconds")), file=sys.stderr, flush=True)  # fmt: skip
    text = json.dumps(rows, indent=1)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast is a conversion, beside `cp` of as many bytes? Synthetic checkpoints, interleaved rounds, cold cache.

    python benchmarks/convert.py --directory /tmp --rounds 5 --json benchmarks/results/convert.json

Each round runs every method once, in an order that rotates. A method's time includes fsync of all it wrote; the page
cache of the sources is dropped before each (posix_fadvise). The ratio of a round is time / time of `cp` in that round, where
`cp` copies a file of exactly as many bytes as the method writes; the table shows the median over rounds, since the disk
itself varies by a factor of two between rounds.

Peers: `transformers` loads the dense model and saves it; mergekit's reader and writer when that package is installed.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GIB = 2**30
SHAPES = {  # layers, hidden, ffn, vocabulary; vision is small: it only adds bytes
    "small": (4, 1024, 5504, 32000),
    "3b-half": (18, 2048, 11008, 151936),
    "7b-tenth": (3, 3584, 18944, 152064),
    "7b-slice": (3, 3584, 18944, 53248),  # 31 % of the weights shared, as in the 7B model
}


def write_source(directory: Path, shape: str, seed: int, dtype: str) -> int:
    """Write a dense checkpoint of this shape, tied, in shards of 1 GB; the shared part depends on the shape only."""
    import numpy as np

    from metis_home.convert.header import encode_header, tensor_bytes
    from metis_home.convert.schema import read_shape

    layers, hidden, ffn, vocabulary = SHAPES[shape]
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "max_position_embeddings": 4096,
            "model_type": "qwen2_5_vl_text",
            "num_attention_heads": hidden // 128,
            "num_hidden_layers": layers,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"},
            "vocab_size": vocabulary,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 256,
            "intermediate_size": 512,
            "model_type": "qwen2_5_vl_vision",
            "num_heads": 4,
            "out_hidden_size": hidden,
        },
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = read_shape(config, "benchmark").tensors()
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(shapes):
        size += tensor_bytes(dtype, shapes[name])
        if size > 10**9:
            groups.append([])
            size = tensor_bytes(dtype, shapes[name])
        groups[-1].append(name)
    block = np.random.default_rng(0).normal(0, 0.02, 2**22).astype(np.float32)
    block = block if dtype == "F32" else (block.view(np.uint32) >> 16).astype(np.uint16)
    noise, weight_map, total = block.tobytes(), {}, 0
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with open(directory / file, "wb") as out:
            out.write(encode_header(((n, dtype, shapes[n]) for n in names), {"format": "pt"}))
            for name in names:
                weight_map[name] = file
                left = tensor_bytes(dtype, shapes[name])
                own = seed if ".mlp." in name and name.startswith("model.") else 0
                start = 4 * (abs(hash_of(name)) % 4096 + own)
                while left:
                    piece = noise[start : start + left]
                    out.write(piece)
                    left -= len(piece)
                    start = 0
            total += out.tell()
            out.flush()
            os.fsync(out.fileno())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def hash_of(name: str) -> int:
    """A hash that is the same in every process."""
    import zlib

    return zlib.crc32(name.encode())


def drop_cache(*paths: Path) -> None:
    """Let the kernel forget the pages of these files."""
    for root in paths:
        for path in [root] if root.is_file() else root.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


CONVERT = """
import json, resource, sys
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
bare = peak()
from metis_home.convert import upcycle
t, o, n, kw = sys.argv[1], sys.argv[2], sys.argv[3] or None, json.loads(sys.argv[4])
upcycle(t, o, n, max_shard_size="1GB", **kw)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"bare_kib": bare, "peak_kib": peak(), "cpu_s": usage.ru_utime + usage.ru_stime,
                  "torch": "torch" in sys.modules}))
"""

TRANSFORMERS = """
import os, resource, sys, json, warnings
import torch
from transformers import Qwen2_5_VLForConditionalGeneration as M
m = M.from_pretrained(sys.argv[1], dtype="auto")
m.save_pretrained(sys.argv[2], max_shard_size="1GB")
for f in os.listdir(sys.argv[2]):
    fd = os.open(os.path.join(sys.argv[2], f), os.O_RDONLY); os.fsync(fd)
u = resource.getrusage(resource.RUSAGE_SELF)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(json.dumps({"peak_kib": peak, "cpu_s": u.ru_utime + u.ru_stime, "torch": True}))
"""

MERGEKIT = """
import os, resource, sys, json
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tensor_writer import TensorWriter
loaders = [LazyTensorLoader(ShardedTensorIndex.from_disk(d)) for d in sys.argv[1].split(":")]
w = TensorWriter(sys.argv[2], max_shard_size=10**9, safe_serialization=True)
for name in loaders[0].index.tensor_paths:
    if name.startswith("model.layers.") and ".mlp." in name:
        for branch, loader in enumerate(reversed(loaders * (2 // len(loaders)))):
            w.save_tensor(name.replace(".mlp.", f".mlp.experts.{branch}."), loader.get_tensor(name), clone=True)
    else:
        w.save_tensor(name, loaders[0].get_tensor(name))
w.finalize()
for f in os.listdir(sys.argv[2]):
    fd = os.open(os.path.join(sys.argv[2], f), os.O_RDONLY); os.fsync(fd)
u = resource.getrusage(resource.RUSAGE_SELF)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(json.dumps({"peak_kib": peak, "cpu_s": u.ru_utime + u.ru_stime, "torch": True}))
"""


def run(code: str, *arguments: str) -> dict:
    """Run python code in a process of its own; its last line is JSON. Adds wall seconds, start of python included."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"error: a method failed:\n{done.stderr[-2000:]}")
    return {"seconds": seconds, **json.loads(done.stdout.strip().splitlines()[-1])}


def copy(sources: list[Path], out: Path, size: int) -> dict:
    """`cp` of files of 1 GB, until `size` bytes are copied, and fsync."""
    out.mkdir()
    files = sorted(path for source in sources for path in source.glob("*.safetensors"))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    start, left, number = time.perf_counter(), size, 0
    while left > 0:
        path = files[number % len(files)]
        target, number = out / str(number), number + 1
        subprocess.run(["cp", str(path), str(target)], check=True)
        if target.stat().st_size > left:
            os.truncate(target, left)
        left -= target.stat().st_size
    for path in out.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "cpu_s": after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime}


def measure(arguments: argparse.Namespace, root: Path) -> dict:
    """Run all rounds in `root`; returns the report."""
    a, b, out = root / "a", root / "b", root / "out"
    sizes = {"source": write_source(a, arguments.shape, 0, "BF16")}
    write_source(b, arguments.shape, 1, "BF16")
    methods = {
        "one source": lambda: run(CONVERT, str(a), str(out), "", "{}"),
        "two sources": lambda: run(CONVERT, str(a), str(out), str(b), "{}"),
        "cast to fp16": lambda: run(CONVERT, str(a), str(out), str(b), '{"dtype": "fp16"}'),
        "cast to fp32": lambda: run(CONVERT, str(a), str(out), "", '{"dtype": "fp32"}'),
        "transformers load + save (dense)": lambda: run(TRANSFORMERS, str(a), str(out)),
    }
    try:
        import mergekit  # noqa: F401

        methods["mergekit reader + writer"] = lambda: run(MERGEKIT, f"{a}:{b}", str(out))
    except ImportError:
        print("mergekit is not installed: not measured", file=sys.stderr)
    if arguments.only:
        methods = {name: method for name, method in methods.items() if name in arguments.only}
    results: dict[str, list[dict]] = {name: [] for name in methods}
    for number in range(arguments.rounds):
        names = list(methods)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            row: dict = {}
            # which of the two goes first alternates: the first may find the disk busier, or its pages younger
            for part in ("method", "cp") if number % 2 else ("cp", "method"):
                if part == "cp":
                    size = sizes.get(name) or size_of(methods[name], out, (a, b))
                    sizes[name] = size
                    drop_cache(a, b)
                    row["cp"] = copy([a] if name == "one source" else [a, b], out, size)
                else:
                    drop_cache(a, b)
                    row["method"] = methods[name]()
                    sizes[name] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
                shutil.rmtree(out)
                os.sync()
            row["ratio"] = row["method"]["seconds"] / row["cp"]["seconds"]
            results[name].append(row)
            print(
                f"round {number + 1}, {name}: {row['method']['seconds']:.1f} s, cp {row['cp']['seconds']:.1f} s",
                file=sys.stderr,
            )
    return {"sizes": sizes, "rounds": results, "summary": {name: summary(rows) for name, rows in results.items()}}


def size_of(method: object, out: Path, sources: tuple[Path, Path]) -> int:
    """Bytes that a method writes, found by running it once (not measured)."""
    drop_cache(*sources)
    method()  # type: ignore[operator]
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    os.sync()
    return size


def summary(rows: list[dict]) -> dict:
    """Medians over rounds; memory above the bare interpreter in MiB (maximum over rounds)."""
    method = [row["method"] for row in rows]
    return {
        "seconds": statistics.median(m["seconds"] for m in method),
        "cp_seconds": statistics.median(row["cp"]["seconds"] for row in rows),
        "ratio": statistics.median(row["ratio"] for row in rows),
        "ratios": sorted(round(row["ratio"], 3) for row in rows),
        "cpu_seconds": statistics.median(m["cpu_s"] for m in method),
        "memory_mib": max(m["peak_kib"] - m.get("bare_kib", 0) for m in method) / 1024,
        "torch_imported": any(m["torch"] for m in method),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, help="where to write; the default is the system's temporary directory"
    )
    parser.add_argument("--shape", choices=SHAPES, default="3b-half")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", help="measure this method only (may be given again)")
    parser.add_argument("--json", type=Path, help="write the report here")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="metis-home-convert-", dir=arguments.directory))
    try:
        report = measure(arguments, root)
    finally:
        shutil.rmtree(root)
    report |= {
        "shape": arguments.shape,
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
    }
    print(f"{'method':34} {'written':>9} {'time':>8} {'cp':>8} {'ratio':>6} {'CPU':>7} {'memory':>9} torch")
    for name, row in report["summary"].items():
        print(
            f"{name:34} {report['sizes'][name] / 1e9:6.2f} GB {row['seconds']:6.1f} s {row['cp_seconds']:6.1f} s "
            f"{row['ratio']:6.2f} {row['cpu_seconds']:5.1f} s {row['memory_mib']:5.0f} MiB "
            + ("yes" if row["torch_imported"] else "no")
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

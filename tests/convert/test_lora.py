"""Adapters folded while streaming, against PEFT's own merge."""

import json
from pathlib import Path

import numpy as np
import pytest

from metis_home.convert import Manifest, split, upcycle, verify
from metis_home.convert.floats import to_float32
from metis_home.errors import CheckpointError
from tests.convert.pico import FFN, HIDDEN, module_name, numbers, read_all, tensors, write_dense, write_safetensors

UP, QUERY = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"


def write_adapter(
    directory: Path, base: Path, modules: dict[str, tuple[int, int]], rank: int = 2, **config: object
) -> Path:
    """An adapter with random factors for `modules` {hub name: (rows, columns)}."""
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none", "base_model_name_or_path": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(settings | config))
    content = {}
    for name, (rows, columns) in modules.items():
        key = "base_model.model." + module_name(name + ".x").removesuffix(".x")
        content[key + ".lora_A.weight"] = ("F32", (rank, columns), numbers(name + "A", 7, "F32", (rank, columns)))
        content[key + ".lora_B.weight"] = ("F32", (rows, rank), numbers(name + "B", 7, "F32", (rows, rank)))
    write_safetensors(directory / "adapter_model.safetensors", content)
    return directory


@pytest.mark.parametrize(
    ("config", "scale"), [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5), ({"alpha_pattern": {"up_proj": 4}}, 2.0)]
)
def test_the_product_is_added_with_its_scale(config: dict, scale: float, tmp_path: Path) -> None:
    content = tensors()
    base = write_dense(tmp_path / "base", content)
    adapter = write_adapter(tmp_path / "adapter", base, {UP: (FFN, HIDDEN)}, **config)

    upcycle(adapter, tmp_path / "two", base)

    two = read_all(tmp_path / "two")
    down = np.frombuffer(numbers(UP + "A", 7, "F32", (2, HIDDEN)), np.float32).reshape(2, HIDDEN).astype(np.float64)
    up = np.frombuffer(numbers(UP + "B", 7, "F32", (FFN, 2)), np.float32).reshape(FFN, 2).astype(np.float64)
    dense = np.frombuffer(content[UP + ".weight"][2], np.float32).reshape(FFN, HIDDEN)
    found = np.frombuffer(two["model.layers.0.mlp.experts.1.up_proj.weight"][2], np.float32).reshape(FFN, HIDDEN)
    np.testing.assert_allclose(found, dense + scale * up @ down, rtol=2e-6, atol=1e-6)  # float32 against float64
    assert two["model.layers.0.mlp.experts.0.up_proj.weight"] == content[UP + ".weight"]
    records = Manifest.read(tmp_path / "two").branches
    assert [record.exact for record in records.values()] == [False, True]
    assert [record.adapter for record in records.values()] == ["adapter", None]
    verify(tmp_path / "two", adapter, base)
    split(tmp_path / "two", tmp_path / "back")
    assert read_all(tmp_path / "back")[UP + ".weight"][2] == found.tobytes()


def test_peft_merges_to_the_same_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import Qwen2_5_VLForConditionalGeneration

    base = write_dense(tmp_path / "base")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=r".*language_model.*(up_proj|down_proj|gate_proj)",
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"layers.1.mlp.gate_proj": 9},
        init_lora_weights=False,
    )
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")

    upcycle(tmp_path / "adapter", tmp_path / "two", base, base=base)
    split(tmp_path / "two", tmp_path / "ours")

    ours, theirs = read_all(tmp_path / "ours"), read_all(tmp_path / "merged")
    assert ours.keys() == theirs.keys()
    changed = 0
    for name, (dtype, _, data) in theirs.items():
        a, b = to_float32(ours[name][2], dtype), to_float32(data, dtype)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)  # the order of the float32 sums differs
        changed += data != tensors()[name][2]
    assert changed == 6


def test_an_adapter_of_the_shared_part_is_a_mismatch(tmp_path: Path) -> None:
    base = write_dense(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, {QUERY: (HIDDEN, HIDDEN)})

    with pytest.raises(CheckpointError, match=rf"1 of 39 shared tensors differ(.|\n)*{QUERY}\.weight"):
        upcycle(adapter, tmp_path / "two", base)
    upcycle(adapter, tmp_path / "two")  # both branches from the adapter: nothing to disagree about
    verify(tmp_path / "two", adapter)


def test_the_base_may_be_given_and_cast(tmp_path: Path) -> None:
    base = write_dense(tmp_path / "base", dtype="BF16")
    adapter = write_adapter(tmp_path / "adapter", Path("gone"), {UP: (FFN, HIDDEN)})

    upcycle(adapter, tmp_path / "two", base=base, dtype="fp32")

    verify(tmp_path / "two", adapter, base=base)
    with pytest.raises(CheckpointError, match="--base"):
        upcycle(adapter, tmp_path / "other")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not folded"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 3}, "has rank 2"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number"),
        ({"rank_pattern": {"(a+)+b": 2}}, "only plain module names"),
    ],
)
def test_what_cannot_be_folded_is_refused(config: dict, message: str, tmp_path: Path) -> None:
    base = write_dense(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, {UP: (FFN, HIDDEN)}, **config)

    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        upcycle(adapter, tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = write_dense(tmp_path / "base")
    wrong = write_adapter(tmp_path / "wrong", base, {UP: (FFN + 1, HIDDEN)})
    ghost = write_adapter(tmp_path / "ghost", base, {"model.layers.9.mlp.up_proj": (FFN, HIDDEN)})
    half = write_adapter(tmp_path / "half", base, {})
    write_safetensors(
        half / "adapter_model.safetensors", {f"base_model.model.{UP}.lora_A.weight": ("F32", (2, HIDDEN), bytes(64))}
    )

    for adapter, message in ((wrong, "do not fit"), (ghost, "which .* has not"), (half, "lora_A only")):
        with pytest.raises(CheckpointError, match=message):
            upcycle(adapter, tmp_path / "two")

"""Exported weights are what `convert.split` makes of the saved model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from metis_home.branch import Branch
from metis_home.convert import split
from metis_home.errors import EngineError
from metis_home.training.rollouts.weight_export import export_weights, exported_names
from tests.training.rl.pico_rl import dense, processor, two_branch
from tests.training.rollouts.pico_rollouts import qwen3_vl


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("branch", list(Branch))
def test_a_branch_is_exported_as_split_makes_it(branch: Branch, tmp_path: Path) -> None:
    model = two_branch(seed=5)
    model.save_pretrained(tmp_path / "two")
    processor().save_pretrained(tmp_path / "two")
    split(tmp_path / "two", tmp_path / "split", branch)

    exported = export_weights(model, tmp_path / "out", version=7, branch=branch)

    assert exported is not None
    assert exported.folder == tmp_path / "out" / "v000007"
    assert_same(tensors(exported.folder), tensors(tmp_path / "split"))
    assert exported.tensors == len(tensors(exported.folder))
    assert exported.bytes == sum(tensor.nbytes for tensor in tensors(exported.folder).values())


@pytest.mark.parametrize("make", [dense, qwen3_vl], ids=["qwen2.5", "qwen3"])
def test_a_dense_model_is_exported_as_save_pretrained_writes_it(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "saved")

    export_weights(model, tmp_path, version=1, max_shard_bytes=20_000)

    assert_same(tensors(tmp_path / "v000001"), tensors(tmp_path / "saved"))
    assert len(list((tmp_path / "v000001").glob("*.safetensors"))) > 3
    assert not list(tmp_path.glob("*.partial"))


def test_an_exported_version_loads_as_a_model(tmp_path: Path) -> None:
    model = dense(seed=2)
    model.config.save_pretrained(tmp_path / "v000001")
    config = (tmp_path / "v000001" / "config.json").read_bytes()

    export_weights(model, tmp_path, version=1, max_shard_bytes=20_000)
    (tmp_path / "v000001" / "config.json").write_bytes(config)

    read = type(model).from_pretrained(tmp_path / "v000001")
    ids = torch.arange(40, 60)[None]
    assert torch.equal(read(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_weights_can_be_written_in_another_precision(tmp_path: Path) -> None:
    model = dense()

    export_weights(model, tmp_path, version=1, dtype=torch.bfloat16)

    wanted = model.state_dict()["model.language_model.layers.0.mlp.up_proj.weight"].bfloat16()
    found = tensors(tmp_path / "v000001")
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], wanted)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_layers_of_which_a_part_trains_are_exported_whole() -> None:
    model = two_branch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp.experts.1.down_proj" in name)

    thinking = exported_names(model, Branch.THINKING, only_trained=True)
    non_thinking = exported_names(model, Branch.NON_THINKING, only_trained=True)

    everything = exported_names(model, Branch.THINKING)
    assert set(thinking.values()) == {name for name in everything.values() if name.startswith("model.layers.1.")}
    assert non_thinking == {}


def test_a_tower_of_which_a_part_trains_is_exported_whole() -> None:
    model = dense()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual.merger" in name or name == "lm_head.weight")

    names = set(exported_names(model, None, only_trained=True).values())

    tower = {name for name in exported_names(model, None).values() if name.startswith("visual.")}
    assert names == tower | {"lm_head.weight"}


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "all-linear"], ids=str)
def test_adapters_are_merged_into_what_is_exported(targets: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, modules_to_save=["lm_head"])
    adapted = get_peft_model(dense(seed=2), config)
    base = adapted.get_base_model()

    export_weights(base, tmp_path / "out", version=1)
    sent_later = exported_names(base, None, only_trained=True).values()

    found = tensors(tmp_path / "out" / "v000001")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    wanted = tensors(tmp_path / "merged")
    assert set(found) == set(wanted)
    assert {"lm_head.weight", "model.layers.0.self_attn.o_proj.weight"} <= set(sent_later)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], dense(seed=2).state_dict()[UP])


UP = "model.language_model.layers.0.mlp.up_proj.weight"


def test_an_adapter_that_is_no_lora_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(dense(), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))

    with pytest.raises(EngineError, match="Expected LoRA"):
        export_weights(adapted.get_base_model(), tmp_path, version=1)


def test_a_branch_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="Two-branch models need one"):
        export_weights(two_branch(), tmp_path, version=1)
    with pytest.raises(EngineError, match="dense models have none"):
        export_weights(dense(), tmp_path, version=1, branch=Branch.THINKING)


def test_nothing_to_export_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nothing of this model trains"):
        export_weights(dense().requires_grad_(False), tmp_path, version=1, only_trained=True)


def test_weights_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(EngineError, match="cannot be written"):
        export_weights(dense(), tmp_path / "file", version=1)

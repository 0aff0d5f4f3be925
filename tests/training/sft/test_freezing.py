"""Eight sets hold every parameter once, and say by name what trains."""

import pytest
import torch

from metis_home.errors import RecipeError
from metis_home.training.freezing import FREEZE_SETS, freeze_parameters, set_of, trainable_sets
from tests.training.sft.small import config, records, small_model, trainer


def test_every_parameter_is_in_one_set_and_every_set_holds_some() -> None:
    names = [name for name, _ in small_model().named_parameters()]

    owners = {name: set_of(name) for name in names}

    assert set(owners.values()) == set(FREEZE_SETS)
    assert owners["model.visual.blocks.0.attn.qkv.weight"] == "vision"
    assert owners["model.visual.merger.mlp.0.weight"] == "vision"
    assert owners["model.router.norm.weight"] == "router"
    assert owners["model.language_model.norm.weight"] == "norms"
    assert owners["model.language_model.layers.1.mlp.experts.1.up_proj.weight"] == "thinking_branch"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, set(FREEZE_SETS)),
        ({"freeze": ["vision", "router"]}, set(FREEZE_SETS) - {"vision", "router"}),
        ({"freeze": ["all_but:router"]}, {"router"}),
        ({"freeze": ["all_but:router+norms"]}, {"router", "norms"}),
        ({"train_only": ["thinking_branch"]}, {"thinking_branch"}),
    ],
)
def test_sets_are_named_either_way(arguments: dict, expected: set[str]) -> None:
    assert trainable_sets(**arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze": ["visoin"]}, "Did you mean 'vision'"),
        ({"freeze": ["all_but:routers"]}, "Did you mean 'router'"),
        ({"freeze": ["vision"], "train_only": ["router"]}, "say it one way"),
        ({"freeze": list(FREEZE_SETS)}, "nothing is left"),
    ],
)
def test_impossible_sets_are_refused_when_the_config_is_made(tmp_path, arguments: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        config(tmp_path, **arguments)


def test_tied_embeddings_are_frozen_with_their_head_or_not_at_all() -> None:
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight

    with pytest.raises(RecipeError, match="one tensor"):
        freeze_parameters(model, trainable_sets(freeze=["lm_head"]))
    counts = freeze_parameters(model, trainable_sets(freeze=["lm_head", "embeddings"]))

    assert not model.lm_head.weight.requires_grad
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("trained", ["thinking_branch", "attention", "vision", "embeddings"])
def test_only_what_trains_moves_even_with_weight_decay(tmp_path, trained: str) -> None:
    model = small_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    trainer(tmp_path, records(4), model, train_only=[trained], weight_decay=0.1, per_device_train_batch_size=4).train()

    moved = {set_of(name) for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {trained}

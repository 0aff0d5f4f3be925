"""The estimate against what small real runs hold, byte by byte: 10 % at most, on every rank."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from metis_home import MetisHomeConfig, MetisHomeForConditionalGeneration
from metis_home.training.activations import saved_bytes
from metis_home.training.estimate import MemorySettings, estimate_memory
from metis_home.training.freezing import freeze_parameters, trainable_sets
from metis_home.training.recipe import LoraSection
from metis_home.training.sft.losses import token_losses
from tests.model.pico import PATCH_VALUES
from tests.processing.tiny import model_fields
from tests.training.sft.small import processor

# Larger than pico: what is kept once per model (norms, angles, merger) must not drown what is kept per layer.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 6,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
}
VISION = {"hidden_size": 48, "intermediate_size": 96, "depth": 6, "fullatt_block_indexes": [5], "out_hidden_size": 64}


def config(layers: int = SHAPE["num_hidden_layers"]) -> MetisHomeConfig:
    made = model_fields(processor().tokenizer)
    made["text_config"] |= {**SHAPE, "num_hidden_layers": layers}
    made["vision_config"] |= VISION
    return MetisHomeConfig(**made)


def batch(tokens: int, images: int) -> dict[str, torch.Tensor]:
    """Two rows, one for each branch; each begins with `images` images of 16 visual tokens (64 patches)."""
    token = processor().tokenizer.convert_tokens_to_ids
    image = [token("<|vision_start|>"), *[token("<|image_pad|>")] * 16, token("<|vision_end|>")]
    head = image * images
    ids = torch.tensor([head + [65] * (tokens // 2 - len(head))] * 2)
    labels = ids.clone()
    labels[:, : len(head) + 4] = -100
    made = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == token("<|image_pad|>")).long(),
        "labels": labels,
        "router_labels": torch.tensor([0, 1]),
    }
    if images:
        made["pixel_values"] = torch.randn(2 * images * 64, PATCH_VALUES)
        made["image_grid_thw"] = torch.tensor([[1, 8, 8]] * 2 * images)
    return made


def really_saved(model, inputs: dict[str, torch.Tensor]) -> int:
    """What the backward pass of one micro-batch needs beside the weights, without the head."""
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    held = [*model.parameters(), *model.buffers(), *inputs.values()]
    return saved_bytes(lambda: model.model(**inputs, branch_ids=torch.tensor([0, 1])), held)


def two_branch(**shape) -> MetisHomeForConditionalGeneration:
    torch.manual_seed(0)
    return MetisHomeForConditionalGeneration(config(**shape)).train()


def settings(images: int, **fields) -> MemorySettings:
    fields = {"weights": torch.float32, "compute": torch.float32, "tokens": 600, **fields}
    return MemorySettings(visual_tokens=2 * images * 16, **fields)


@pytest.mark.parametrize("images", [0, 4])
def test_activations_are_those_of_a_real_step(images: int) -> None:
    saved = really_saved(two_branch(), batch(600, images))

    estimate = estimate_memory(config(), settings(images, gradient_checkpointing=False))

    assert estimate.activations == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("images", [0, 4])
def test_with_checkpointing_they_are_the_layers_inputs_and_one_layer(images: int) -> None:
    model, inputs = two_branch(), batch(600, images)
    # One decoder layer, which holds more than a vision block here, is what is computed again at a time.
    layer = really_saved(model, inputs) - really_saved(two_branch(layers=SHAPE["num_hidden_layers"] - 1), inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    saved = really_saved(model, inputs) + layer

    estimate = estimate_memory(config(), settings(images, gradient_checkpointing=True))

    assert estimate.activations == pytest.approx(saved, rel=0.1)


def test_the_head_is_the_logits_and_their_gradient() -> None:
    model, tokens = two_branch(), 600
    hidden = torch.randn(2, tokens // 2, SHAPE["hidden_size"], requires_grad=True)
    labels = torch.ones(2, tokens // 2, dtype=torch.long)
    saved = saved_bytes(lambda: token_losses(model.lm_head(hidden), labels, 0), list(model.parameters()))
    gradient = tokens * model.config.text_config.vocab_size * 4

    estimate = estimate_memory(config(), settings(0))

    assert estimate.head == pytest.approx(saved + gradient, rel=0.1)


def step_bytes(model, parameters) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state after a real step of a model."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    sum(parameter.float().sum() for parameter in trained).backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    total = lambda tensors: sum(tensor.nbytes for tensor in tensors)  # noqa: E731
    return total(model.parameters()), total(parameter.grad for parameter in trained), total(moments)


@pytest.mark.parametrize("frozen", [[], ["vision"], ["all_but:router"], ["vision", "thinking_branch", "embeddings"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_freeze_sets_are_counted_to_the_byte(frozen: list[str], dtype: torch.dtype) -> None:
    model = two_branch().to(dtype)
    sets = trainable_sets(frozen)
    freeze_parameters(model, sets)

    estimate = estimate_memory(config(), settings(0, weights=dtype), trainable=sets)

    assert (estimate.weights, estimate.gradients, estimate.optimizer) == step_bytes(model, model.parameters())
    assert estimate.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("branch", ["thinking", "both"])
def test_adapters_are_counted(branch: str) -> None:
    from metis_home.training.sft import branch_lora_config
    from metis_home.training.sft.lora import add_adapter

    adapted = add_adapter(two_branch(), branch_lora_config(branch, r=8, alpha=16, dropout=0.0))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    _, gradients, optimizer = step_bytes(adapted, adapted.parameters())

    estimate = estimate_memory(config(), settings(0), lora=LoraSection(branch=branch, r=8))

    assert estimate.trainable == pytest.approx(trained, rel=0.1)
    assert estimate.gradients == pytest.approx(gradients, rel=0.1)
    assert estimate.optimizer == pytest.approx(optimizer, rel=0.1)


def test_what_is_offloaded_leaves_the_device_for_the_host() -> None:
    common = {"devices": 4, "sharding": "zero3", "weights": torch.bfloat16}
    kept = estimate_memory(config(), settings(0, **common))

    moved = estimate_memory(config(), settings(0, **common, offload_optimizer=True, offload_parameters=True))

    assert (moved.optimizer, moved.weights) == (0, 0)
    assert moved.host == kept.optimizer + kept.weights
    assert moved.device < kept.device


def dense_config() -> Qwen2_5_VLConfig:
    made = model_fields(processor().tokenizer)
    made["text_config"] |= SHAPE
    made["vision_config"] |= VISION
    return Qwen2_5_VLConfig(**made)


def dense() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(dense_config()).train()


@pytest.mark.parametrize("sets", [None, frozenset({"language"})])
def test_dense_models_are_counted_to_the_byte(sets: frozenset[str] | None) -> None:
    model = dense()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(sets is None or ".visual." not in name)

    estimate = estimate_memory(dense_config(), settings(0), trainable=sets)

    assert (estimate.weights, estimate.gradients, estimate.optimizer) == step_bytes(model, model.parameters())
    assert estimate.rollouts == 0


@pytest.mark.parametrize("images", [0, 4])
def test_a_dense_models_activations_are_those_of_a_real_step(images: int) -> None:
    model, inputs = dense(), batch(600, images)
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "router_labels")}
    held = [*model.parameters(), *model.buffers(), *inputs.values()]
    saved = saved_bytes(lambda: model.model(**inputs), held)

    estimate = estimate_memory(dense_config(), settings(images, gradient_checkpointing=False))

    assert estimate.activations == pytest.approx(saved, rel=0.1)


def test_rollouts_hold_the_keys_and_values_of_their_tokens() -> None:
    with torch.no_grad():
        cache = dense().eval()(input_ids=torch.full((3, 40), 65), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    estimate = estimate_memory(dense_config(), settings(0, rollout_tokens=3 * 40))

    assert estimate.rollouts == held


def test_a_head_in_chunks_holds_one_chunk() -> None:
    vocabulary = dense_config().text_config.vocab_size
    few = estimate_memory(dense_config(), settings(0, tokens=100))

    chunked = estimate_memory(dense_config(), settings(0, logit_bytes=100 * 4 * vocabulary))

    assert chunked.head == few.head

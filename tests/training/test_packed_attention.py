"""Packed rows attended segment by segment equal packed rows under a mask, and padded batches stay plain sdpa."""

import pytest
import torch

from metis_home.training.activations import saved_bytes
from metis_home.training.data.collate import PackingCollator, PaddingCollator
from metis_home.training.packed_attention import PACKED, use_packed_attention
from tests.model.pico import pico_model, row
from tests.model.test_packing import EXAMPLES, example


def without_index(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "record_index"}


def loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_segments_apart_equal_segments_under_a_mask(checkpointing: bool) -> None:
    model = pico_model(attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    masked = without_index(PackingCollator(model.config, 0)(EXAMPLES))
    bounded = without_index(PackingCollator(model.config, 0, flash_attention=True)(EXAMPLES))
    loss, gradients = loss_and_gradients(model, masked)

    use_packed_attention(model, bounded)
    packed_loss, packed_gradients = loss_and_gradients(model, bounded)

    assert model.config.text_config._attn_implementation == PACKED
    torch.testing.assert_close(packed_loss, loss, atol=1e-6, rtol=1e-6)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():  # sums over keys in another order
        torch.testing.assert_close(packed_gradients[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_padded_batches_attend_as_before() -> None:
    model = pico_model(attn_implementation="sdpa").eval()
    batch = without_index(PaddingCollator(0)(EXAMPLES))
    before = model(**batch).logits
    use_packed_attention(model, PackingCollator(model.config, 0, flash_attention=True)(EXAMPLES))

    use_packed_attention(model, batch)

    assert model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(model(**batch).logits, before)


def test_eager_and_flash_attention_are_left_alone() -> None:
    model = pico_model(attn_implementation="eager").eval()

    use_packed_attention(model, PackingCollator(model.config, 0, flash_attention=True)(EXAMPLES))

    assert model.config.text_config._attn_implementation == "eager"


def test_memory_grows_with_the_segments_not_with_their_square() -> None:
    model = pico_model(attn_implementation="sdpa").train()

    def kept(segments: int) -> int:
        rows = [example(row(64, seed=number), 1) for number in range(segments)]
        batch = without_index(PackingCollator(model.config, 0, flash_attention=True)(rows))
        use_packed_attention(model, batch)
        return saved_bytes(lambda: model(**batch, use_cache=False), model.parameters())

    assert kept(16) < 4.1 * kept(4)

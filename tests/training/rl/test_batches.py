"""Right-padded batches with shared images: features go to the right rows, with their gradient."""

import pytest
import torch

from metis_home.training.logprobs import score_tokens
from metis_home.training.rl.batches import collate_rollouts, shared_images
from metis_home.training.rollouts.positions import rope_index_of
from metis_home.training.rollouts.types import Rollout
from tests.model.pico import IMAGE_ROWS, dense_twin, pico_model, row
from tests.training.rollouts.pico_rollouts import SUPPRESS, prompt_of, qwen3_vl

MODELS = {"dense": lambda: dense_twin(pico_model(), 1), "qwen3_vl": qwen3_vl, "two branches": pico_model}


def rollouts(*, branch: int | None = None) -> list[Rollout]:
    """Prompts with 1, 0, 2 and 1 images, two answers each, one of them with an image that a tool returned."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, item in enumerate(IMAGE_ROWS):
        prompt = prompt_of(item, number)
        for length in (3, 7):
            ids = torch.randint(10, 99, (length,), generator=generator).tolist()
            made.append(
                Rollout(
                    prompt=prompt, completion_ids=ids, logprobs=[-1.0] * length, loss_mask=[1] * length, branch=branch
                )
            )
    seen = row(4, (1, 2, 2), seed=9)
    made[3] = Rollout(
        prompt=made[3].prompt,
        completion_ids=[20, 21, *seen.ids, 22, 23],
        logprobs=[-1.0] * (len(seen.ids) + 4),
        loss_mask=[1, 1, *[0] * len(seen.ids), 1, 1],
        observation_pixel_values=seen.patches,
        observation_grid_thw=torch.tensor(seen.grids),
        observation_types=[0, 0, *seen.types, 0, 0],
        branch=branch,
    )
    return made


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_scores_every_rollout_as_if_alone_and_sees_each_image_once(kind: str) -> None:
    model = MODELS[kind]()
    rope_index = rope_index_of(model)
    order = [0, 6, 3, 5, 1, 2, 7, 4]
    made = rollouts(branch=1 if kind == "two branches" else None)
    items = [made[number] for number in order]
    seen = []
    model.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))

    def scores(chosen: list[Rollout]) -> torch.Tensor:
        batch = collate_rollouts(chosen, rope_index, torch.device("cpu"))
        with shared_images(model, batch.image_order):
            return score_tokens(model, batch.inputs, batch.mask_BT, suppress_token_ids=SUPPRESS).logp_BT

    together = scores(items)

    images = sum(len(item.patches) for item in IMAGE_ROWS if item.patches is not None)
    assert seen == [images + 4]
    together.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for number, item in enumerate(items):
        alone = scores([item])
        torch.testing.assert_close(together[number, : len(item)], alone[0], rtol=0, atol=3e-5)
        alone.sum().backward()
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5 * scale)
    assert any("visual" in name for name in gradients)
    assert "get_image_features" not in model.model.__dict__


def test_columns_stand_under_their_tokens() -> None:
    items = rollouts()[:2]
    batch = collate_rollouts(items, rope_index_of(MODELS["dense"]()), torch.device("cpu"))

    columns = batch.to_columns([[1.0, 2.0, 3.0], [4.0] * 7])

    start = len(items[0].prompt)
    assert columns[0, start : start + 3].tolist() == [1.0, 2.0, 3.0]
    assert columns[0, start + 3 :].eq(0).all()
    assert batch.mask_BT.sum(1).tolist() == [3.0, 7.0]
    assert (batch.labels == -100).sum(1).tolist() == [start, start]

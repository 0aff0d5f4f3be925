"""What a server is sent is what the policy saw."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from metis_home.errors import EngineError
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import load_records
from metis_home.training.rollouts.pixels import as_data_url, collapse_images, pictures
from metis_home.training.rollouts.types import Prompt, make_prompt
from tests.training.rl.pico_rl import processor

PROCESSOR = processor()


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt_with(*images: Image.Image) -> Prompt:
    blocks = [{"type": "image", "image": image} for image in images]
    row = {"messages": [{"role": "user", "content": [*blocks, {"type": "text", "text": "?"}]}], "answer": "1"}
    [record] = load_records([row])
    return make_prompt(record, Encoder(PROCESSOR, system_prompt=None), index=0)


@pytest.mark.parametrize("sizes", [[(56, 56)], [(100, 61)], [(84, 112), (140, 30)]], ids=str)
def test_pixel_values_survive_the_way_to_a_server_bit_for_bit(sizes: list[tuple[int, int]]) -> None:
    prompt = prompt_with(*(noise(*size, seed) for seed, size in enumerate(sizes)))

    urls = [as_data_url(picture) for picture in pictures(prompt, PROCESSOR.image_processor)]

    received = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    seen = PROCESSOR.image_processor(received, return_tensors="pt")
    assert torch.equal(seen["pixel_values"], prompt.pixel_values)
    assert torch.equal(seen["image_grid_thw"], prompt.image_grid_thw)


def test_a_picture_of_the_right_size_comes_back_as_it_was() -> None:
    image = noise(84, 112, 1)

    [found] = pictures(prompt_with(image), PROCESSOR.image_processor)

    assert np.array_equal(np.asarray(found), np.asarray(image))


def test_pixels_of_another_image_processor_are_refused() -> None:
    prompt = prompt_with(noise(56, 56, 1))
    assert prompt.pixel_values is not None

    with pytest.raises(EngineError, match="8-bit"):
        pictures(replace(prompt, pixel_values=prompt.pixel_values * 1.1), PROCESSOR.image_processor)


def test_images_are_collapsed_to_one_token_each() -> None:
    prompt, image = prompt_with(noise(56, 56, 1), noise(84, 56, 2)), PROCESSOR.image_token_id

    ids = collapse_images(prompt, image, 2)

    assert ids.count(image) == 2
    assert prompt.input_ids.count(image) == 4 + 6
    assert [token for token in ids if token != image] == [token for token in prompt.input_ids if token != image]


@pytest.mark.parametrize("change", ["a token less", "an image less", "an image more"])
def test_image_tokens_that_do_not_fit_their_images_are_refused(change: str) -> None:
    prompt, image = prompt_with(noise(56, 56, 1), noise(84, 56, 2)), PROCESSOR.image_token_id
    assert prompt.image_grid_thw is not None
    if change == "a token less":
        prompt.input_ids.remove(image)
    elif change == "an image less":
        prompt.image_grid_thw = prompt.image_grid_thw[:1]
    else:
        prompt.image_grid_thw = torch.cat([prompt.image_grid_thw, prompt.image_grid_thw[:1]])

    with pytest.raises(EngineError, match="image"):
        collapse_images(prompt, image, 2)

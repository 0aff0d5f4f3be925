"""A vision tower that has seen something: the stand-in for Qwen2.5-VL's pretrained one.

The tower learns to name what stands in each cell of rendered images, one label per visual token. It sees the renderers
of the families with seeds of its own, no question, no answer, and no count; easy-vqa's images not at all.
"""

import logging
import random
import string

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from . import amounts, shapes
from .query import Picture
from .wording import COLORS, SHAPES

logger = logging.getLogger(__name__)
THINGS = [shapes.Thing(color, shape) for color in COLORS for shape in SHAPES]
CLASSES = [
    "",
    *string.digits,
    *"+-",
    *string.ascii_lowercase,
    *(f"bar {height}" for height in range(1, amounts.HIGHEST + 1)),
    *map(str, THINGS),
]


def picture(rng: random.Random) -> Picture:
    """A random image of any of the renderers."""
    kind = rng.choices(("text", "bars", "shapes"), (45, 20, 35))[0]
    if kind == "bars":
        return amounts.chart([rng.randint(1, amounts.HIGHEST) for _ in range(rng.randint(1, 3))], rng)
    if kind == "shapes":
        return shapes.draw([rng.choice(THINGS) for _ in range(rng.randint(1, 4))], rng)
    characters = string.ascii_lowercase if rng.random() < 0.3 else string.digits + "+-"
    return amounts.write(["".join(rng.choices(characters, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 2))], rng)


def pretrain_tower(
    model: Qwen2_5_VLForConditionalGeneration,
    image_processor,
    *,
    pictures: int,
    steps: int,
    batch: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> float:
    """Train the vision tower and its merger in place; return the share of right labels of non-empty cells, held out."""
    rng = random.Random(f"tower/{seed}")
    seen = [picture(rng) for _ in range(pictures + 200)]
    encoded = image_processor(images=[item.image for item in seen], return_tensors="pt")
    patches = encoded["pixel_values"].view(len(seen), -1, encoded["pixel_values"].shape[-1])
    index = {name: number for number, name in enumerate(CLASSES)}
    labels = torch.tensor([[index[cell] for cell in item.cells] for item in seen])
    grid = encoded["image_grid_thw"]

    torch.manual_seed(seed)
    head = nn.Linear(model.config.text_config.hidden_size, len(CLASSES))
    parameters = [*model.model.visual.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(1, steps), pct_start=0.1)
    weight = torch.ones(len(CLASSES))
    weight[0] = 0.1  # most cells are empty
    generator = torch.Generator().manual_seed(seed)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        output = model.model.get_image_features(patches[rows].flatten(0, 1), grid[rows], return_dict=True)
        return head(torch.cat(tuple(output.pooler_output)))

    for step in range(steps):
        rows = torch.randint(pictures, (batch,), generator=generator)
        loss = F.cross_entropy(logits(rows), labels[rows].flatten(), weight=weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            logger.info("vision tower: step %d/%d, loss %.3f", step, steps, loss.item())
    with torch.no_grad():
        held_out = torch.arange(pictures, len(seen))
        truth = labels[held_out].flatten()
        right = (logits(held_out).argmax(-1) == truth)[truth != 0]
    return right.float().mean().item()

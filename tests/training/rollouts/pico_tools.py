"""Tiny models that call tools: some tokens of their vocabulary are whole calls and whole answers.

So a random policy that was told a handful of tokens, by a few steps of training, holds real conversations: it calls,
reads the observation, calls again, answers rightly or wrongly, or runs into limits.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from metis_home import MetisHomeConfig, MetisHomeForConditionalGeneration, MetisHomeProcessor
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import Record, load_records
from metis_home.training.rollouts.hf import HFEngine
from metis_home.training.rollouts.tool_rollouts import ToolRollouts
from metis_home.training.rollouts.types import Prompt, Sampling, make_prompt
from metis_home.training.rollouts.vocabulary import end_token_ids, unsampled_token_ids
from metis_home.training.tools.protocol import ToolContext, ToolResult, describe
from tests.processing.tiny import model_fields, tiny_tokenizer

CALL = '<tool_call>\n{"name": "echo", "arguments": {"text": "%s"}}\n</tool_call>'
CALL_A, CALL_B = CALL % "a", CALL % "b"
RIGHT, WRONG = (f"<think>t</think><answer>{number}</answer>" for number in (4, 5))
WORDS = (CALL_A, CALL_B, RIGHT, WRONG)
END = "<|im_end|>"


@dataclass
class Echo:
    """Says what it was told, with an image where asked for "b"."""

    images: int = 1
    seen: list[str] = field(default_factory=list)
    name = "echo"

    @property
    def description(self) -> dict[str, object]:
        return describe("echo", "Say it again.", {"text": {"type": "string"}})

    def run(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        text = str(arguments["text"])
        self.seen.append(text)
        images = tuple(Image.new("RGB", (56, 56), (90 * i, 80, 90)) for i in range(self.images if text == "b" else 0))
        return ToolResult(text=text * 3, images=images)


def tool_processor() -> MetisHomeProcessor:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    return MetisHomeProcessor(
        Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 84}), tokenizer
    )


def caller(processor: MetisHomeProcessor, *, branches: bool = False):
    """A model that says `WORDS`, "x" and the end token, all about equally often; trained once, a copy each time."""
    return copy.deepcopy(_caller(processor, branches))


@cache
def _caller(processor: MetisHomeProcessor, branches: bool):
    torch.manual_seed(0)
    fields = model_fields(processor.tokenizer)
    if branches:
        model = MetisHomeForConditionalGeneration(MetisHomeConfig(**fields, router_trained=True))
    else:
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields))
    said = torch.tensor(processor.tokenizer.convert_tokens_to_ids([*WORDS, "x", END, END]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(30):
        before = torch.randint(0, 256, (16, 6))
        after = said[torch.randint(0, len(said), (16, 12))]
        labels = torch.cat([torch.full_like(before, -100), after], dim=1)
        branch = {"branch_ids": step % 2} if branches else {}
        model(input_ids=torch.cat([before, after], dim=1), labels=labels, **branch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def rows(count: int = 4) -> list[Record]:
    """Every other question has an image; lengths differ; the answer is always 4."""
    made = []
    for number in range(count):
        row = {"prompt": "2+2" + "?" * (number % 4), "answer": "4", "id": f"q{number}"}
        if number % 2:
            row["image"] = Image.new("RGB", (56, 56), (40 * number % 256, 90, 20))
        made.append(row)
    return load_records(made)


def prompts(processor: MetisHomeProcessor, count: int = 4) -> list[Prompt]:
    """Without a word about tools, which is 600 of this tokenizer's tokens: this policy calls them anyway."""
    encoder = Encoder(processor, system_prompt="S")
    return [make_prompt(record, encoder, index=index) for index, record in enumerate(rows(count))]


def sampling(processor: MetisHomeProcessor, model, max_new_tokens: int = 400, **fields) -> Sampling:
    return Sampling(
        max_new_tokens=max_new_tokens,
        eos_token_ids=end_token_ids(processor.tokenizer),
        suppress_token_ids=unsampled_token_ids(model.config, processor.tokenizer),
        **fields,
    )


def engine(model, processor: MetisHomeProcessor, tools, *, seed: int = 3, **options) -> ToolRollouts:
    return ToolRollouts(HFEngine(model, processor.tokenizer, seed=seed), processor, tools, **options)

"""A toy task with a tool: colors of codes, told in some questions, to be looked up in the others.

    told      "472" is red. what color is "472"?
    lookup    what color is "472"?                  -> <tool_call>... {"code": "472"} ...</tool_call> -> red

Held-out codes appear in no training row, so nobody can know their colors without the question or the tool. The policy
that reinforcement learning begins with was taught to call the tool nearly always.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from metis_home import MetisHomeProcessor
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import Record, load_records
from metis_home.training.rollouts.hf import HFEngine
from metis_home.training.rollouts.tool_rollouts import ToolRollouts
from metis_home.training.rollouts.types import Rollout, Sampling, make_prompt
from metis_home.training.rollouts.vocabulary import end_token_ids, unsampled_token_ids
from metis_home.training.tools.environment import ConversationLimits, ToolConversation
from metis_home.training.tools.protocol import Tool, ToolContext, ToolResult, describe, failure

from .model import IMAGE_SETTINGS, TAGS, make_tokenizer

COLORS = (
    *("red", "green", "blue", "yellow", "teal", "brown", "black", "gray"),
    *("pink", "orange", "purple", "white", "gold", "silver", "beige", "violet"),
)
KINDS = ("told", "lookup")
CALL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CALL = '<think>look</think><tool_call>\n{"name": "lookup", "arguments": {"code": "%s"}}\n</tool_call>'
ANSWER = "<think>seen</think><answer>%s</answer><|im_end|>"
LIMITS = ConversationLimits(turns=3, response_tokens=96, observation_tokens=48)
_PROCESSOR_NAMES = ("image_processor_type", "processor_class")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """Which questions there are. All numbers are ours."""

    train: int = 2400
    test: int = 400
    lookup_share: float = 0.3
    """Of the questions that need the tool."""
    held_out_codes: int = 300
    """Of 1,000; the test has no others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSettings:
    """How the policy is taught before reinforcement learning."""

    steps: int = 150
    rows_per_batch: int = 32
    learning_rate: float = 3e-3
    needless_calls: float = 0.9
    """Share of the told questions in which the taught trajectory calls the tool all the same."""


class Lookup:
    """A tool in process: the color of a code. Also the shortest example of how to write one."""

    name = "lookup"
    description = describe("lookup", "The color of a code.", {"code": {"type": "string"}})

    def __init__(self, colors: Mapping[str, str]) -> None:
        self.colors = dict(colors)

    def run(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        """See `Tool`."""
        code = str(arguments["code"])
        color = self.colors.get(code)
        return failure("failed", "unknown") if color is None else ToolResult(text=f'"{code}" is {color}.')


def colors_of_codes(seed: int = 0) -> dict[str, str]:
    """Every code of three digits has a color, drawn once."""
    rng = random.Random(f"colors/{seed}")
    return {f"{number:03}": rng.choice(COLORS) for number in range(1000)}


def rows(settings: TaskSettings, part: str) -> list[Record]:
    """Questions of "train" or "test"; `source` says of which kind they are."""
    colors = colors_of_codes()
    codes = random.Random("codes").sample(sorted(colors), len(colors))
    rng = random.Random(f"rows/{part}")
    mine = codes[: settings.held_out_codes] if part == "test" else codes[settings.held_out_codes :]
    made = []
    for number in range(settings.test if part == "test" else settings.train):
        code = rng.choice(mine)
        kind = "lookup" if rng.random() < settings.lookup_share else "told"
        told = f'"{code}" is {colors[code]}. ' if kind == "told" else ""
        made.append(
            {
                "prompt": f'{told}what color is "{code}"?',
                "answer": colors[code],
                "kind": "text",
                "source": kind,
                "code": code,
                "id": f"{part}-{number}",
            }
        )
    return load_records(made)


def make_processor() -> MetisHomeProcessor:
    """A tokenizer that knows the task's words, digits one by one and the tags."""
    texts = [f'"{code}" is {color}. what color is "{code}"?' for code, color in colors_of_codes().items()]
    texts += [CALL % code for code in ("012", "345", "678", "999")] * 4
    texts += ["look seen user\n assistant\n system\n Error: unknown"] * 4
    tokenizer = make_tokenizer(texts)
    added = [tag for tag in (*CALL_TAGS, *TAGS) if tag not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in added])
    plain = {name: value for name, value in IMAGE_SETTINGS.items() if name not in _PROCESSOR_NAMES}
    return MetisHomeProcessor(Qwen2VLImageProcessorPil(**plain), tokenizer)


def make_policy(processor: MetisHomeProcessor, *, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL of about a third of a million parameters, float32."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    ends = {"eos_token_id": token_id("<|im_end|>"), "pad_token_id": token_id("<|endoftext|>"), "bos_token_id": None}
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 10000.0},
        **ends,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": IMAGE_SETTINGS["patch_size"],
        "spatial_merge_size": 1,
        "temporal_patch_size": 1,
        "window_size": 64,
        "fullatt_block_indexes": [0],
        "out_hidden_size": 96,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{f"{kind}_token_id": token_id(f"<|{kind}_pad|>") for kind in ("image", "video")},
        **{f"vision_{side}_token_id": token_id(f"<|vision_{side}|>") for side in ("start", "end")},
    )
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config)


def trajectories(
    processor: MetisHomeProcessor, records: Sequence[Record], settings: StartSettings, *, seed: int
) -> list[tuple[list[int], list[int]]]:
    """What the policy is taught: (token ids, labels) of whole conversations, observations and prompts not supervised."""
    rng = random.Random(f"taught/{seed}")
    encoder = Encoder(processor, system_prompt=None)
    tool = Lookup(colors_of_codes())
    taught = []
    for record in records:
        conversation = ToolConversation(processor=processor, tools=[tool], limits=LIMITS)
        if record.source == "lookup" or rng.random() < settings.needless_calls:
            conversation.advance(processor.tokenizer.encode(CALL % record.columns["code"]))
        conversation.advance(processor.tokenizer.encode(ANSWER % record.answer))
        prompt = encoder.prompt(record).input_ids
        ids, mask = conversation.input_ids, conversation.loss_mask
        labels = [token if counts else -100 for token, counts in zip(ids, mask, strict=True)]
        taught.append((prompt + ids, [-100] * len(prompt) + labels))
    return taught


def teach(
    model: Qwen2_5_VLForConditionalGeneration,
    taught: Sequence[tuple[list[int], list[int]]],
    settings: StartSettings,
    *,
    seed: int,
) -> list[float]:
    """Supervised training on `trajectories`; returns the losses, nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, (settings.steps - step) / max(1.0, 0.5 * settings.steps), 1.0)
    )
    rng = random.Random(f"teach/{seed}")
    model.train()
    losses = []
    for _ in range(settings.steps):
        chosen = rng.sample(taught, min(settings.rows_per_batch, len(taught)))
        longest = max(len(ids) for ids, _ in chosen)
        input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chosen])
        labels = torch.tensor([own + [-100] * (longest - len(own)) for _, own in chosen])
        loss = model(input_ids=input_ids, labels=labels).loss  # padding on the right: no token sees it
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def evaluate_policy(
    model: Qwen2_5_VLForConditionalGeneration, processor: MetisHomeProcessor, records: Sequence[Record]
) -> dict[str, float]:
    """Greedy conversations about held-out questions: accuracy and tool turns, all together and by kind."""
    encoder = Encoder(processor, system_prompt=None)
    prompts = [make_prompt(record, encoder, index=index) for index, record in enumerate(records)]
    sampling = Sampling(
        max_new_tokens=LIMITS.response_tokens,
        temperature=0.0,
        eos_token_ids=end_token_ids(processor.tokenizer),
        suppress_token_ids=unsampled_token_ids(model.config, processor.tokenizer),
    )
    tools: list[Tool] = [Lookup(colors_of_codes())]
    engine = ToolRollouts(HFEngine(model, processor.tokenizer), processor, tools, limits=LIMITS, workers=1)
    groups = engine.generate(prompts, 1, sampling)
    return scores([rollout for group in groups for rollout in group])


def scores(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Accuracy by the package's own reward, tool turns a question, and tool turns a right answer."""
    from metis_home.training.rewards import accuracy_reward

    right = accuracy_reward(
        [rollout.prompt.messages for rollout in rollouts],
        [rollout.messages for rollout in rollouts],
        solution=[rollout.prompt.columns["solution"] for rollout in rollouts],
        kind=[rollout.prompt.columns["kind"] for rollout in rollouts],
    )
    rows = [
        (str(rollout.prompt.columns["source"]), float(correct or 0.0), rollout.tool_calls)
        for rollout, correct in zip(rollouts, right, strict=True)
    ]
    found = {}
    for kind in ("all", *KINDS):
        own = [(correct, calls) for source, correct, calls in rows if kind in ("all", source)]
        found[f"accuracy_{kind}"] = sum(correct for correct, _ in own) / max(1, len(own))
        found[f"calls_{kind}"] = sum(calls for _, calls in own) / max(1, len(own))
    calls, correct = sum(row[2] for row in rows), sum(row[1] for row in rows)
    return found | {"calls_per_right_answer": calls / max(1.0, correct), "questions": float(len(rows))}

"""Ask a two-branch model one thing: the template's prefix and the branch always agree, and the answer comes in parts.

A processor cannot pass a branch on to `generate`, and a prompt that opens `<think>` for the non-thinking branch is a
prompt that branch never saw. `answer` sets both from one argument.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from .branch import Branch
from .errors import BranchError, ProcessorError
from .media import Message, collect_vision
from .prompts import MAX_NEW_TOKENS
from .responses import ParsedResponse

if TYPE_CHECKING:
    from transformers import BatchFeature

    from .modeling import MetisHomeForConditionalGeneration
    from .processing import MetisHomeProcessor
    from .router import RouterDecision

Thinking = bool | Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer, taken apart."""

    branch: Branch
    thinking_probability: float | None
    """P(thinking) in [0, 1] according to the router; None where the branch was forced."""
    reasoning_content: str
    content: str
    text: str
    """What the model generated, tags included, special tokens removed; the template's prefix is not part of it."""
    prompt_tokens: int
    completion_tokens: int
    finished: bool
    """The model ended the answer itself; False where a limit (such as max_new_tokens) cut it."""


def answer(
    model: "MetisHomeForConditionalGeneration",
    processor: "MetisHomeProcessor",
    messages: list[Message],
    thinking: Thinking = "auto",
    router_threshold: float | None = None,
    **generate_kwargs: object,
) -> Answer:
    """Answer one conversation.

    Args:
        messages: `[{"role": "user", "content": text or blocks}, ...]`, ending with what is to be answered.
        thinking: True or False forces a branch and writes its format's beginning into the prompt; "auto" lets the
            router choose, and the chosen branch begins its format itself.
        router_threshold: in [0, 1]; think where P(thinking) is at least this. Default: the model's, else 0.5.
        **generate_kwargs: for `model.generate`; at most 8192 new tokens unless they set a limit.
    Raises:
        BranchError: `thinking` is none of the three, or the threshold is out of range.
        ProcessorError: the messages or their media cannot be used, or several answers are asked for.
    """
    if not (isinstance(thinking, bool) or thinking == "auto"):
        raise BranchError(f'thinking is {thinking!r}. Expected True, False or "auto".')
    if generate_kwargs.get("num_return_sequences", 1) != 1:
        raise ProcessorError(
            f"num_return_sequences is {generate_kwargs['num_return_sequences']}: `answer` returns one answer. "
            "Call model.generate for several."
        )
    if not {"max_new_tokens", "max_length", "generation_config"} & generate_kwargs.keys():
        generate_kwargs["max_new_tokens"] = MAX_NEW_TOKENS
    prompt, inputs = prepare(processor, messages, None if thinking == "auto" else thinking)
    inputs = inputs.to(model.device)

    output = model.generate(
        **inputs,
        thinking=thinking,
        router_threshold=router_threshold,
        **{**generate_kwargs, "return_dict_in_generate": True},  # type: ignore[arg-type]
    )

    prompt_tokens = inputs["input_ids"].shape[1]
    new_tokens = output.sequences[0, prompt_tokens:].tolist()
    text = processor.tokenizer.decode(new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    parts = cast(ParsedResponse, processor.parse_response(text, prefix=prompt))
    probability = output.thinking_probability
    return Answer(
        branch=Branch(int(output.branch_ids[0])),
        thinking_probability=None if probability is None else float(probability[0]),
        **parts,
        text=text,
        prompt_tokens=prompt_tokens,
        completion_tokens=len(new_tokens),
        finished=bool(new_tokens) and new_tokens[-1] in _end_ids(model, generate_kwargs),
    )


def route(
    model: "MetisHomeForConditionalGeneration",
    processor: "MetisHomeProcessor",
    messages: list[Message],
    router_threshold: float | None = None,
) -> "RouterDecision":
    """Ask the router about one conversation, exactly as `answer` with "auto" would, without answering.

    Raises:
        BranchError: the threshold is out of range. ProcessorError: the messages or their media cannot be used.
    """
    import torch

    _, inputs = prepare(processor, messages, None)
    with torch.no_grad():
        return model.route(**inputs.to(model.device), router_threshold=router_threshold)


def prepare(
    processor: "MetisHomeProcessor", messages: list[Message], enable_thinking: bool | None
) -> tuple[str, "BatchFeature"]:
    """Return the prompt as text and as model inputs (input_ids (1, T), pixel_values, ...), on the CPU.

    Raises:
        ProcessorError: the messages or their media cannot be used.
    """
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=enable_thinking)
    media = collect_vision(messages, allow_remote=processor.allow_remote_media)
    inputs = processor(
        text=[prompt], images=media.images, videos=media.videos, return_tensors="pt", **media.video_options
    )
    return prompt, inputs


def _end_ids(model: "MetisHomeForConditionalGeneration", generate_kwargs: dict[str, object]) -> set[int]:
    for source in (generate_kwargs.get("generation_config"), model.generation_config):
        end = generate_kwargs.get("eos_token_id", getattr(source, "eos_token_id", None))
        if end is not None:
            return {end} if isinstance(end, int) else {int(token) for token in end}  # type: ignore[attr-defined]
    return set()

"""`metis-home generate` and `metis-home route`."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metis_home.errors import CheckpointError, ProcessorError
from metis_home.prompts import MAX_NEW_TOKENS

from .models import system_prompt_for

if TYPE_CHECKING:
    from metis_home.media import Message
    from metis_home.modeling import MetisHomeForConditionalGeneration
    from metis_home.processing import MetisHomeProcessor

GENERATE_HELP = """Answer one prompt: the answer on stdout; its reasoning, branch and token counts on stderr.

Example: metis-home generate home-7b "What does the sign say?" --image street.jpg
"""
ROUTE_HELP = """Say which branch would answer, without answering.

A line of FILE.jsonl is {"prompt": "...", "images": ["a.png"]} or {"messages": [...]}; paths are relative to the file.

Example: metis-home route home-7b --data questions.jsonl
"""


class ThinkingChoice(StrEnum):
    """Who chooses the branch."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class DtypeChoice(StrEnum):
    """Floating-point type of the loaded weights; `auto` is the checkpoint's own."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


TORCH_NAMES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A two-branch directory, or a hub id.", show_default=False)]
Images = Annotated[
    list[Path] | None, typer.Option("--image", metavar="FILE", help="Image to show; may be given several times.")
]
System = Annotated[
    str | None,
    typer.Option(
        help="System prompt; '' for the chat template's own. Default: the one of the model's training "
        "(recipe.json beside it), else Metis-RISE's.",
        show_default=False,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Think where P(thinking) is at least this. Default: the model's, else 0.5."),
]
Dtype = Annotated[DtypeChoice, typer.Option(help="Type of the loaded weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: spread over the GPUs there are, else cpu.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command("generate", help=GENERATE_HELP)(generate)
    app.command("route", help=ROUTE_HELP)(route)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question; - reads stdin.", show_default=False)],
    image: Images = None,
    thinking: Annotated[ThinkingChoice, typer.Option(help="auto: the router chooses.")] = ThinkingChoice.AUTO,
    threshold: Threshold = None,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = MAX_NEW_TOKENS,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, help="0: the likeliest token always; above: sample. Default: the model's generation config."
        ),
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this much probability mass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the raw answer as it is written, tags and all.")
    ] = False,
    dtype: Dtype = DtypeChoice.AUTO,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer one prompt."""
    if stream and as_json:
        raise typer.BadParameter("--stream prints text as it comes; it cannot be combined with --json.")
    system = system_prompt_for(model, system)
    messages = _messages(sys.stdin.read() if prompt == "-" else prompt, image or [], system)
    loaded, processor = _load(model, dtype, device)

    from transformers import TextStreamer, set_seed

    from metis_home.chat import answer

    options: dict[str, object] = {"max_new_tokens": max_new_tokens}
    if temperature is not None:
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if top_p is not None:
        options["top_p"] = top_p
    if seed is not None:
        set_seed(seed)
    if stream:
        options["streamer"] = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    forced = {"auto": "auto", "on": True, "off": False}[thinking]
    result = answer(loaded, processor, messages, thinking=forced, router_threshold=threshold, **options)  # type: ignore[arg-type]

    if as_json:
        print(json.dumps({**dataclasses.asdict(result), "branch": result.branch.label}, ensure_ascii=False))
        return
    if not stream:
        if result.reasoning_content:
            _say(result.reasoning_content + "\n")
        if result.content:
            print(result.content)
    chosen = "forced" if result.thinking_probability is None else f"P(thinking) = {result.thinking_probability:.3f}"
    _say(f"[{result.branch.label}, {chosen}; {result.prompt_tokens} + {result.completion_tokens} tokens]")
    if not result.finished:
        _say(f"the answer was cut after {result.completion_tokens} tokens; --max-new-tokens allows more")


def route(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The question; - reads stdin.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", exists=True, dir_okay=False, help="Route every line.")
    ] = None,
    image: Images = None,
    threshold: Threshold = None,
    system: System = None,
    dtype: Dtype = DtypeChoice.AUTO,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which branch would answer."""
    if (prompt is None) == (data is None):
        raise typer.BadParameter("Pass a PROMPT or --data FILE.jsonl, one of the two.")
    if data is not None and image:
        raise typer.BadParameter("--image belongs to a PROMPT; the lines of --data name their own images.")
    system = system_prompt_for(model, system)
    if prompt is not None:
        conversations = iter([_messages(sys.stdin.read() if prompt == "-" else prompt, image or [], system)])
    else:
        conversations = _read_conversations(data, system)  # type: ignore[arg-type]
    loaded, processor = _load(model, dtype, device)

    from metis_home.branch import Branch
    from metis_home.chat import route as route_conversation

    if not loaded.config.router_trained:
        _say("warning: this model's router has not been trained; its choices mean nothing yet")
    total = thinking = 0
    for messages in conversations:
        decision = route_conversation(loaded, processor, messages, threshold)
        branch, probability = Branch(int(decision.branch_ids[0])), float(decision.thinking_probability[0])
        if as_json:
            print(json.dumps({"branch": branch.label, "thinking_probability": probability}), flush=True)
        else:
            print(f"{branch.label:<12}  {probability:.4f}  {_first_words(messages)}", flush=True)
        total += 1
        thinking += branch is Branch.THINKING
    if data is not None:
        _say(f"{thinking} of {total} think")


def _load(
    model: str, dtype: DtypeChoice, device: str
) -> "tuple[MetisHomeForConditionalGeneration, MetisHomeProcessor]":
    """Load model and processor, ready to answer.

    Raises:
        CheckpointError: there is no such directory, it is not a two-branch model, or the device is not there.
    """
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise CheckpointError(f"{model}: no such directory. Expected a model that `metis-home convert` wrote.")
    path = str(Path(model).expanduser()) if model.startswith("~") else model

    import torch
    from transformers import AutoConfig

    from metis_home.config_fields import MODEL_TYPE
    from metis_home.modeling import MetisHomeForConditionalGeneration
    from metis_home.processing import MetisHomeProcessor

    try:
        found = AutoConfig.from_pretrained(path).model_type
    except ValueError as error:  # an id that is neither a directory nor a repository name, an unknown model type
        raise CheckpointError(f"{model}: not a model that can be loaded: {error}") from error
    if found != MODEL_TYPE:
        raise CheckpointError(
            f"{model}: is a {found} model, expected {MODEL_TYPE}. "
            f"A dense Qwen2.5-VL is made into one with `metis-home convert {model} OUT`."
        )
    placement = device if device != "auto" or torch.cuda.is_available() else "cpu"
    try:
        torch.device("cpu" if placement == "auto" else placement)
        loaded = MetisHomeForConditionalGeneration.from_pretrained(path, dtype=TORCH_NAMES[dtype], device_map=placement)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{model}: cannot be loaded on device {device!r}: {error}") from error
    return loaded.eval(), MetisHomeProcessor.from_pretrained(path)


def _messages(prompt: str, images: list[Path], system: str) -> "list[Message]":
    question: list[dict[str, object]] = [{"type": "image", "image": str(image)} for image in images]
    return _with_system([{"role": "user", "content": [*question, {"type": "text", "text": prompt}]}], system)


def _with_system(messages: "list[Message]", system: str) -> "list[Message]":
    """Put the system prompt first, unless the conversation has one or '' asks for the template's own."""
    if not system or (messages and messages[0].get("role") == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _read_conversations(path: Path, system: str) -> "Iterator[list[Message]]":
    """Yield the conversation of each line.

    Raises:
        ProcessorError: a line is not JSON, or has neither a prompt nor messages.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ProcessorError(f"{path}:{number}: not JSON: {error}") from error
            entry = entry if isinstance(entry, dict) else {}
            images = entry.get("images", [])
            if isinstance(entry.get("prompt"), str) and isinstance(images, list):
                messages = _messages(entry["prompt"], images, system)
            elif isinstance(entry.get("messages"), list) and entry["messages"]:
                messages = _with_system(entry["messages"], system)
            else:
                raise ProcessorError(
                    f'{path}:{number}: expected {{"prompt": "...", "images": [...]}} or {{"messages": [...]}}, '
                    f"found {line.strip()[:80]!r}"
                )
            yield [_beside(path.parent, message) for message in messages]


def _beside(folder: Path, message: "Message") -> "Message":
    """The message with relative image paths made relative to `folder`."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    blocks = []
    for block in content:
        for key in ("image", "path"):
            source = block.get(key) if isinstance(block, dict) else None
            if isinstance(source, str) and "://" not in source and not source.startswith("data:"):
                block = {**block, key: str(folder / source)}
        blocks.append(block)
    return {**message, "content": blocks}


def _first_words(messages: "list[Message]") -> str:
    """The beginning of the last message, on one line."""
    content = messages[-1].get("content")
    if isinstance(content, list):
        content = " ".join(str(block["text"]) for block in content if isinstance(block, dict) and "text" in block)
    line = " ".join(str(content).split())
    return line if len(line) <= 60 else line[:57] + "..."


def _say(text: str) -> None:
    print(text, file=sys.stderr)

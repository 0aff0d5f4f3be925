"""Every rollout as a row: image, text, parsed answer, rewards, advantage-worthy group or not, branch. One file per rank."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from metis_home.branch import Branch
from metis_home.media import Message
from metis_home.responses import parse_response

from ..rollouts.types import Rollout
from .rl_buffer import Group


class CompletionsTable:
    """Appends rows to `completions/rank<n>.jsonl` below the output directory.

    Images are referred to by their path; those that have none are written beside the table, once each.
    """

    def __init__(self, output_dir: str | os.PathLike[str], rank: int) -> None:
        self.folder = Path(output_dir) / "completions"
        self.path = self.folder / f"rank{rank}.jsonl"
        self._references: dict[int, list[str]] = {}

    def write(self, groups: Sequence[Group], step: int) -> None:
        """Append all rollouts of a filling that optimizer step number `step` uses first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._references = {}
        with self.path.open("a", encoding="utf-8") as file:
            for group in groups:
                for place, rollout in enumerate(group.rollouts):
                    file.write(json.dumps(self._row(group, place, rollout, step), ensure_ascii=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop rows of later steps, and a last line whose writing was cut: a resumed run writes them again."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)

    def _row(self, group: Group, place: int, rollout: Rollout, step: int) -> dict[str, object]:
        turns = [_text(message) for message in rollout.messages] or [rollout.text]
        said = [_text(message) for message in rollout.messages if message["role"] == "assistant"] or turns
        parsed = parse_response(said[-1])
        return {
            "step": step,
            "prompt_id": rollout.prompt.id,
            "prompt": _question(rollout),
            "images": self._images(rollout),
            "completion": "\n".join(turns),
            "answer": parsed["content"],
            "gold": rollout.prompt.columns.get("solution"),
            "reward": group.scores.total[place],
            "rewards": {name: values[place] for name, values in group.scores.components.items()},
            "informative": group.is_informative,
            "branch": None if rollout.branch is None else Branch(rollout.branch).label,
            "tokens": rollout.policy_tokens,
            "finished": rollout.finished,
            "tool_calls": rollout.tool_calls,
            **{name: _plain(values[place]) for name, values in group.scores.extra.items()},
        }

    def _images(self, rollout: Rollout) -> list[str]:
        key = id(rollout.prompt)
        if key not in self._references:
            self._references[key] = [self._reference(image) for image in rollout.prompt.images]
        return self._references[key]

    def _reference(self, image: object) -> str:
        if isinstance(image, str | os.PathLike) and not str(image).startswith("data:"):
            return str(image)
        data = image if isinstance(image, bytes) else _png(image)
        path = self.folder / "images" / f"{hashlib.sha256(data).hexdigest()[:16]}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return str(path.relative_to(self.folder))


def _png(image: object) -> bytes:
    from metis_home.media import load_image

    opened = image if isinstance(image, Image.Image) else load_image(image)  # type: ignore[arg-type]
    stream = io.BytesIO()
    opened.save(stream, format="PNG")
    return stream.getvalue()


def _question(rollout: Rollout) -> str:
    """The text of the last user turn."""
    turns = [message for message in rollout.prompt.messages if message["role"] == "user"]
    return _text(turns[-1]) if turns else ""


def _text(message: Message) -> str:
    """The text of a message; images of tools have their place in it."""
    content = message["content"]
    if isinstance(content, str):
        return content
    assert isinstance(content, list)
    return "".join("[image]" if block.get("type") == "image" else str(block.get("text", "")) for block in content)


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None) else str(value)

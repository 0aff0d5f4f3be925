"""The Python tool: every call is a fresh process in the sandbox; files of a trajectory stay between its calls."""

import io
import logging
import time
from collections.abc import Mapping
from pathlib import PurePosixPath

from PIL import Image

from ...errors import ProcessorError
from ...media import load_image
from .limits import SandboxLimits
from .protocol import ErrorKind, ToolContext, ToolResult, describe, failure
from .sandbox import FolderFullError, Sandbox, SandboxResult

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_FONT_LIST = """
import matplotlib.font_manager, pathlib, shutil
for path in pathlib.Path("/tmp").glob("fontlist*"):
    shutil.copy(path, ".")
"""
_ENDED: dict[str, tuple[ErrorKind, str]] = {
    "failed": ("failed", "the program ended with exit status {exit_code}"),
    "killed": ("failed", "the program was killed by signal {signal}"),
    "time": ("time", "the program was stopped: it may run for {wall:g} s and compute for {cpu:g} s"),
    "memory": ("limit", "the program was stopped: it may use {memory} MiB of memory in all"),
    "output": ("limit", "the program was stopped: it may print {output} bytes"),
}


class PythonTool:
    """Run Python code that the model writes.

    Args:
        sandbox: default: a `Sandbox` with default limits, which refuses to exist where it cannot be safe.
        unsafe_local: see `Sandbox`; used only without `sandbox`.
    Raises:
        SandboxError: no sandbox can be made.
    """

    name = "python"

    def __init__(
        self, sandbox: Sandbox | None = None, *, limits: SandboxLimits | None = None, unsafe_local: bool = False
    ) -> None:
        self.sandbox = sandbox or Sandbox(limits, unsafe_local=unsafe_local)
        self._fonts: dict[str, bytes] | None = None

    @property
    def description(self) -> dict[str, object]:
        """The schema for the chat template."""
        return describe(
            self.name,
            "Run a Python program and see what it prints. The value of a last expression is printed too. numpy, PIL "
            "and matplotlib can be imported. Files stay in the working directory between calls, variables do not. "
            "Images of the question are there as image_1.png, image_2.png, ... Images that are saved and figures "
            "that are left open are shown.",
            {"code": {"type": "string", "description": "The program."}},
        )

    def run(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        """Run `arguments["code"]` in the trajectory's folder.

        Raises:
            SandboxError: the sandbox itself failed, which is no fault of the program.
        """
        start = time.monotonic()
        code = str(arguments["code"])
        if not context.files:
            context.files.update(_question_images(context))
        place = {**context.files, **(self._font_list() if "matplotlib" in code or "pyplot" in code else {})}

        try:
            result = self.sandbox.run(code, place)
        except FolderFullError as error:
            return failure("limit", str(error), time.monotonic() - start)

        known = {**context.files, **result.changed}
        context.files = {name: known[name] for name in result.kept if name in known}
        images, remarks = self._images(result, context)
        text = _text(result, self.sandbox.limits, remarks)
        seconds = time.monotonic() - start
        if result.ended == "finished":
            return ToolResult(text=text or "(no output)", images=images, seconds=seconds)
        return ToolResult(text=text, images=images, ok=False, error=_ENDED[result.ended][0], seconds=seconds)

    def _images(self, result: SandboxResult, context: ToolContext) -> tuple[tuple[Image.Image, ...], list[str]]:
        """Images among the changed files, those that can be opened and no others; and remarks about the rest."""
        images: list[Image.Image] = []
        remarks: list[str] = []
        for name, content in sorted(result.changed.items()):
            if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if len(images) >= context.limits.images:
                remarks.append(f"{name}: not shown, {context.limits.images} images are")
                continue
            try:
                images.append(open_image(content, context.limits.decoded_pixels))
            except ProcessorError as error:
                remarks.append(f"{name}: {error}")
        return tuple(images), remarks

    def _font_list(self) -> dict[str, bytes]:
        """matplotlib's list of fonts, which takes seconds to make: made once, and given to every program."""
        if self._fonts is None:
            made = self.sandbox.run(_FONT_LIST).changed
            self._fonts = {f"../tmp/{name}": content for name, content in made.items() if name.startswith("fontlist")}
            logger.debug("matplotlib's font list: %s", ", ".join(self._fonts) or "none, matplotlib cannot be imported")
        return self._fonts


def open_image(content: bytes, max_pixels: int) -> Image.Image:
    """Open an image that a program wrote; its size is read before a pixel is decoded.

    Raises:
        ProcessorError: it is no image, broken, or claims more than `max_pixels`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP", "GIF")) as header:
            width, height = header.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ProcessorError(f"has far too many pixels; at most {max_pixels} are opened.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ProcessorError(f"not a readable image ({type(error).__name__}).") from error
    if width * height > max_pixels:
        raise ProcessorError(f"has {width} x {height} pixels; at most {max_pixels} are opened.")
    try:
        return load_image(content)
    except ProcessorError as error:
        raise ProcessorError("not a readable image: it is cut, broken, or of an odd shape.") from error


def _question_images(context: ToolContext) -> dict[str, bytes]:
    files = {}
    for number, image in enumerate(context.images, start=1):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files[f"image_{number}.png"] = buffer.getvalue()
    return files


def _text(result: SandboxResult, limits: SandboxLimits, remarks: list[str]) -> str:
    """What the model reads: standard output, then errors, then how it ended if not well."""
    parts = [result.stdout.rstrip(), result.stderr.rstrip()]
    if result.ended in ("killed", "time", "memory", "output"):
        note = _ENDED[result.ended][1].format(
            signal=result.signal,
            wall=limits.wall_seconds,
            cpu=limits.cpu_seconds,
            memory=limits.total_bytes >> 20,
            output=limits.output_bytes,
            exit_code=result.exit_code,
        )
        parts.append(f"[{note}]")
    elif result.ended == "failed" and not any(parts):
        parts.append(f"[the program ended with exit status {result.exit_code}]")
    if result.left_behind:
        parts.append(f"[{result.left_behind} processes were still running and were stopped]")
    parts += [f"[{remark}]" for remark in remarks]
    parts += [f"[not kept: {line}]" for line in result.left_out]
    return "\n".join(part for part in parts if part)

"""Tools that cannot stop a training run, whatever they do."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace

from .protocol import Tool, ToolContext, ToolResult, failure

logger = logging.getLogger(__name__)


class SafeTool:
    """A tool whose failures are results: it raises nothing, and takes no longer than a trajectory may.

    A call that does not come back in time is left behind in a thread of its own, with its own copy of the trajectory's
    files: nothing that it does later is seen.
    """

    def __init__(self, tool: Tool, seconds: float) -> None:
        self._tool, self._seconds = tool, seconds

    @property
    def name(self) -> str:
        """See `Tool`."""
        return self._tool.name

    @property
    def description(self) -> Mapping[str, object]:
        """See `Tool`."""
        return self._tool.description

    def run(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        """See `Tool`; never raises."""
        own = replace(context, files=dict(context.files), made_calls=set(context.made_calls))
        found: list[ToolResult] = []
        left = max(0.0, self._seconds - context.seconds)
        thread = threading.Thread(target=self._run, args=(arguments, own, found), daemon=True, name=f"tool {self.name}")
        thread.start()
        thread.join(left)
        if not found:
            if thread.is_alive():
                logger.warning("the tool %s did not come back within %.1f s and is left behind", self.name, left)
                return failure("time", f"the tool {self.name} did not come back in time ({left:.1f} s)", left)
            return failure("failed", f"the tool {self.name} is out of order")
        context.files = own.files
        return found[0]

    def _run(self, arguments: Mapping[str, object], context: ToolContext, found: list[ToolResult]) -> None:
        try:
            result = self._tool.run(arguments, context)
            if not isinstance(result, ToolResult) or not isinstance(result.text, str):
                raise TypeError(f"a tool returns a ToolResult with a text; this one returned {result!r:.200}")
            for image in result.images:
                image.load()  # images that are opened lazily fail here, not in the trainer
            found.append(result)
        except Exception:
            logger.warning("the tool %s failed; its observation says so", self.name, exc_info=True)

"""Which checkpoint of an output directory a run can go on from."""

import json
import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)
STATE_FILE = "trainer_state.json"


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest complete `checkpoint-N` of a directory, or None.

    A process that is killed while it saves leaves a checkpoint that cannot be loaded. The Trainer's state is the last
    file of one, so a checkpoint whose state cannot be read is passed over, with a warning.
    """
    found = [
        (int(match[1]), path) for path in Path(folder).glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is not complete (its writing was interrupted); passing it over", path)
            continue
        return str(path)
    return None


_NAME = re.compile(r"checkpoint-(\d+)")

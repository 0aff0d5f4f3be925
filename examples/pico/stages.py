"""Stages of a study: each is done once for its settings, and leaves its result as JSON."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path

logger = logging.getLogger(__name__)
Json = dict[str, object]


class Study:
    """A folder of stages. A stage runs again when its settings, or those of a stage it builds on, change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digest: dict[str, str] = {}

    def stage(
        self,
        name: str,
        make: Callable[[Path], Mapping[str, object]],
        *,
        settings: object = None,
        after: tuple[str, ...] = (),
    ) -> Json:
        """Run `make(directory)` unless it ran before with the same settings; return its result.

        Args:
            make: fills the empty directory it is given and returns numbers for JSON; `seconds` is added to them.
            settings: a frozen dataclass, or anything that JSON holds.
            after: names of the stages whose directories `make` reads.
        """
        plain = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
        text = json.dumps([name, plain, [self._digest[earlier] for earlier in after]], sort_keys=True)
        digest = self._digest[name] = hashlib.sha256(text.encode()).hexdigest()
        record = self.folder / f"{name}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.with_suffix(".lock").open("w") as lock:  # another process may be at the same stage: wait for it
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._once(name, record, digest, plain, make)

    def _once(
        self, name: str, record: Path, digest: str, plain: object, make: Callable[[Path], Mapping[str, object]]
    ) -> Json:
        if record.is_file():
            done = json.loads(record.read_text())
            if done["digest"] == digest:
                logger.info("%s: done before", name)
                return done["result"]
            record.unlink()
        directory = self.directory(name)
        shutil.rmtree(directory, ignore_errors=True)
        logger.info("%s: begins", name)
        started, cpu = time.perf_counter(), time.process_time()
        result = {**make(directory), "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        unfinished = record.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps({"digest": digest, "settings": plain, "result": result}, indent=1))
        unfinished.replace(record)
        logger.info("%s: %.0f s", name, result["seconds"])
        return result

    def directory(self, name: str) -> Path:
        """Where the files of a stage are."""
        return self.folder / name

    def cpu_seconds(self, is_wanted: Callable[[str], bool]) -> float:
        """Processor time of the stages of these names that are done, whichever run did them; none of their children's."""
        records = [record for record in self.folder.glob("*.json") if is_wanted(record.stem)]
        results = [json.loads(record.read_text())["result"] for record in records]
        return sum(float(result.get("cpu_seconds", 0.0)) for result in results)

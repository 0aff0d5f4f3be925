"""A long job over rows as units of work that are either written whole or not at all.

Each rank appends the results of one unit after the other to a file of its own; a file that was cut in the middle of a
unit loses that unit, no more. When all ranks are done, whoever comes last joins the files, by rename.
"""

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from metis_home.errors import OutputError

from ..evaluation.completions import write_json

_SETTINGS, _UNIT = "settings", "unit"


@dataclass(slots=True)
class ShardFile:
    """The results of one rank, `PATH.R-of-W.part`: one JSON line of settings, then one line per unit.

    What is complete stands in `PATH`, and its settings beside it, in `PATH.settings.json`.
    """

    out: Path
    rank: int
    world_size: int
    settings: Mapping[str, object]
    units: dict[int, list[dict[str, object]]] = field(default_factory=dict)
    """Finished units: {number: rows}."""

    @property
    def path(self) -> Path:
        """The file of this rank."""
        return self.out.with_name(f"{self.out.name}.{self.rank}-of-{self.world_size}.part")

    @property
    def settings_path(self) -> Path:
        """The settings of the complete output."""
        return self.out.with_name(f"{self.out.name}.settings.json")

    def is_complete(self) -> bool:
        """Whether an earlier run with the same settings, on however many ranks, has finished all.

        Raises:
            OutputError: `out` was made with other settings, or nothing says with which.
        """
        if not self.out.exists():
            return False
        try:
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise OutputError(
                f"{self.out} already exists, and {self.settings_path.name} beside it, which would say how it was made, "
                "cannot be read. Use another --out, or --overwrite."
            ) from None
        self._compare(before, f"{self.out} was made")
        self.path.unlink(missing_ok=True)  # the run was killed after the files were joined
        return True

    def open(self) -> None:
        """Read what an earlier run finished; a last line that was cut is dropped.

        Raises:
            OutputError: the file was begun with other settings.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._append({_SETTINGS: self.settings})
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        before = lines[0][_SETTINGS] if lines else None
        if before is None:
            self.path.unlink()
            self.open()
            return
        self._compare(before, f"{self.path} was begun")
        if whole != text:
            os.truncate(self.path, len(whole.encode("utf-8")))
        self.units = {line[_UNIT]: line["rows"] for line in lines[1:]}

    def add(self, unit: int, rows: Sequence[dict[str, object]]) -> None:
        """Write one finished unit; it is on the disk when this returns."""
        self._append({_UNIT: unit, "rows": list(rows)})
        self.units[unit] = list(rows)

    def finish(self, num_units: int) -> bool:
        """Say that all units of this rank are there, and join all ranks' files if it was the last one.

        Args:
            num_units: of all ranks together; unit u is rank u % world_size's.
        Returns:
            Whether `out` is complete now.
        """
        parts = [ShardFile(self.out, rank, self.world_size, self.settings) for rank in range(self.world_size)]
        units: dict[int, list[dict[str, object]]] = {}
        for part in parts:
            if not part.path.exists():
                return self.out.exists()
            part.open()
            units.update(part.units)
        if len(units) < num_units:
            return False
        write_json(self.settings_path, self.settings)
        join_rows(self.out, (row for unit in sorted(units) for row in units[unit]))
        for part in parts:
            part.path.unlink(missing_ok=True)
        return True

    def _compare(self, before: Mapping[str, object], what: str) -> None:
        now = json.loads(json.dumps(self.settings))
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if changed:
            shown = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed)
            raise OutputError(f"{what} with other settings ({shown}). Use them again, another --out, or --overwrite.")

    def _append(self, line: Mapping[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def remove_output(out: Path) -> None:
    """Forget what is there: the complete output with its settings, and every rank's part."""
    parts = out.parent.glob(f"{glob.escape(out.name)}.*-of-*.part")
    for old in [out, ShardFile(out, 0, 1, {}).settings_path, *parts]:
        old.unlink(missing_ok=True)


def join_rows(out: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as JSONL by rename."""
    from ..data.records import write_rows

    write_rows(out, rows)

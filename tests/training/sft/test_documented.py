"""docs/training.md says what the code has."""

import dataclasses
from pathlib import Path

from transformers import TrainingArguments

from metis_home.training.freezing import FREEZE_SETS
from metis_home.training.sft import MetisSFTConfig

TEXT = Path("docs/training.md").read_text(encoding="utf-8")


def test_every_setting_of_ours_is_in_the_table_and_explained_in_the_code() -> None:
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = [field for field in dataclasses.fields(MetisSFTConfig) if field.name not in theirs]

    assert len(ours) >= 12
    for field in ours:
        assert f"| `{field.name}` |" in TEXT, field.name
        assert field.metadata["help"], field.name


def test_every_set_is_in_the_table() -> None:
    for name in FREEZE_SETS:
        assert f"`{name}`" in TEXT, name

"""What the documents say exists: links, files, names, make targets; and what the tree must not hold."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.house.processes import REPOSITORY

DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")], key=lambda path: path.relative_to(REPOSITORY)
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
NAMED = re.compile(r"`([\w.-]+/[\w./-]+\.(?:py|json|yaml))(?:::(\w+))?`")
MAX_LINES = 500
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home|tmp)/[a-z_]+")
FOLDERS_READ = (
    "metis_home",
    "kernels",
    "convert",
    "training",
    "tests",
    "benchmarks",
    "examples",
    "docs",
    "environment",
)


def sources(*suffixes: str) -> list[Path]:
    """Files of the tree with these suffixes, each once (the links of metis_home/ are not followed)."""
    folders = [REPOSITORY / name for name in FOLDERS_READ]
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in suffixes]
    return [*found, *(path for path in sorted(REPOSITORY.glob("*")) if path.is_file() and path.suffix in suffixes)]


def missing_links(text: str, folder: Path) -> list[str]:
    return [link for link in LINK.findall(text) if "://" not in link and not (folder / link).exists()]


def missing_names(text: str, root: Path) -> list[str]:
    missing = []
    for path, name in NAMED.findall(text):
        file = root / path
        if not file.is_file() or (name and not re.search(rf"\b{name}\b", file.read_text())):
            missing.append(f"{path}::{name}" if name else path)
    return missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document: Path) -> None:
    assert missing_links(document.read_text(), document.parent) == []


@pytest.mark.parametrize("document", [REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "docs" / "paper_map.md"])
def test_named_files_and_names_exist(document: Path) -> None:
    assert missing_names(document.read_text(), REPOSITORY) == []


def test_a_broken_link_and_a_lost_name_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "there.py").write_text("def here(): ...\n")
    text = "[a](a/there.py) [b](gone.md#x) [c](https://example.org) `a/there.py::here` `a/there.py::gone` `a/gone.py`"

    assert missing_links(text, tmp_path) == ["gone.md"]
    assert missing_names(text, tmp_path) == ["a/there.py::gone", "a/gone.py"]


def test_every_make_target_that_a_document_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))

    assert {"demo", "test"} <= named <= targets


def test_every_make_target_is_explained() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))

    assert {line.split()[1] for line in listed.splitlines()} == targets


def test_the_results_section_takes_its_numbers_from_committed_files() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    section = readme.partition("## Results")[2].partition("\n## ")[0]

    assert "benchmarks/results/" in section
    assert missing_links(section, REPOSITORY) == []


def test_no_file_is_too_long_and_none_is_a_drawer() -> None:
    python = sources(".py")

    assert len(python) > 50
    assert [str(path) for path in python if len(path.read_text().splitlines()) > MAX_LINES] == []
    assert [str(path) for path in python if path.stem in {"utils", "misc", "helpers", "common"}] == []


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    texts = sources(".py", ".md", ".sh", ".toml", ".txt", ".yaml", ".json", ".cff")
    found = [str(path.relative_to(REPOSITORY)) for path in texts if MACHINE_PATH.search(path.read_text())]

    assert found == []


def test_the_licence_and_the_version_are_the_same_everywhere() -> None:
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    citation = (REPOSITORY / "CITATION.cff").read_text()
    (version,) = re.findall(r'^version = "([^"]+)"', pyproject, re.MULTILINE)

    assert f"version: {version}\n" in citation
    assert 'license = "Apache-2.0"' in pyproject
    assert "license: Apache-2.0" in citation
    assert "Apache License\n                           Version 2.0" in (REPOSITORY / "LICENSE").read_text()

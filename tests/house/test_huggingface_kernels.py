"""Hugging Face's `kernels` package is never shadowed by our folder of that name, whatever way Python is started.

transformers imports `kernels` when it is installed; a regular package of that name in the working directory would break
it. Ours has no `__init__.py`, so it is at most a namespace portion, and a regular package later on the path wins.
"""

from pathlib import Path

import pytest

from tests.house.processes import REPOSITORY, run_python

PRINT_WHO = "import kernels; print(kernels.WHO)"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages with a minimal stand-in for Hugging Face's."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WHO = 'Hugging Face'\n")
    return package.parent


def test_python_c(site: Path) -> None:
    assert run_python("-c", PRINT_WHO, cwd=REPOSITORY, path=(site,)).strip() == "Hugging Face"


def test_python_m(site: Path) -> None:
    printed = run_python("-m", "timeit", "-n1", "-r1", PRINT_WHO, cwd=REPOSITORY, path=(site,))

    assert printed.startswith("Hugging Face")


def test_a_script_with_the_repository_first_on_the_path(site: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRINT_WHO)

    assert run_python(script, cwd=tmp_path, path=(REPOSITORY, site)).strip() == "Hugging Face"


@pytest.mark.parametrize("way", [("-m", "pytest"), ("-c", "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))")])
def test_pytest_from_the_repository(way: tuple[str, ...], site: Path, tmp_path: Path) -> None:
    probe = tmp_path / "test_probe.py"
    probe.write_text("def test_who():\n    import kernels\n\n    assert kernels.WHO == 'Hugging Face'\n")
    options = ("-q", "-p", "no:cacheprovider", "-c", REPOSITORY / "pyproject.toml", "--rootdir", REPOSITORY)

    assert "1 passed" in run_python(*way, *options, probe, cwd=REPOSITORY, path=(site,))


def test_these_tests_would_see_a_shadow(site: Path, tmp_path: Path) -> None:
    shadow = tmp_path / "checkout" / "kernels"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("WHO = 'the checkout'\n")

    assert run_python("-c", PRINT_WHO, cwd=shadow.parent, path=(site,)).strip() == "the checkout"


def test_transformers_takes_our_folder_for_no_kernels_package() -> None:
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from importlib.metadata import packages_distributions\n"
        "from transformers.utils import is_kernels_available\n"
        "from transformers import Qwen2_5_VLForConditionalGeneration\n"
        "print(is_kernels_available() and 'kernels' not in packages_distributions())"
    )

    assert run_python("-c", program, cwd=REPOSITORY).strip() == "False"


def test_no_script_carries_the_name() -> None:
    """`python benchmarks/x.py` puts that folder first on the path; a `kernels.py` in it would be the package."""
    assert [path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("*/kernels.py")] == []

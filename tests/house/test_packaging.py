"""A wheel, an sdist, an editable install and a bare checkout all import, with every module and data file in place.

The folders kernels/, training/ and convert/ reach the package through links; what is built must hold real files instead.
Environments are fresh but for the installed dependencies, which they read from the environment that runs the tests.
"""

import os
import shutil
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.house.processes import REPOSITORY, run_python

pytestmark = pytest.mark.packaging

NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", ".cache", "out", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)
DATA = {".json", ".yaml", ".jinja", ".typed"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as it is checked out: links are links. Builds leave their traces here, not in the working tree."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    shutil.copytree(REPOSITORY, copy, symlinks=True, ignore=NOT_COPIED)
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path) -> dict[str, Path]:
    """An sdist, the wheel built from it, and the wheel built from the checkout."""
    from_sdist, direct = checkout.parent / "from-sdist", checkout.parent / "direct"
    options = ("-m", "build", "--no-isolation", "--outdir")
    run_python(*options, from_sdist, checkout, cwd=checkout.parent)
    run_python(*options, direct, "--wheel", checkout, cwd=checkout.parent)
    return {
        "sdist": next(from_sdist.glob("*.tar.gz")),
        "wheel": next(from_sdist.glob("*.whl")),
        "wheel from the checkout": next(direct.glob("*.whl")),
    }


def package_files(suffixes: set[str]) -> set[str]:
    """Files of the package with these suffixes, by the path that they have in a wheel."""
    found = set()
    for folder, folders, names in os.walk(REPOSITORY / "metis_home", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        paths = (Path(folder, name) for name in names)
        found |= {path.relative_to(REPOSITORY).as_posix() for path in paths if path.suffix in suffixes}
    return found


def modules() -> list[str]:
    """Every module of the package by its import name."""
    names = (path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in package_files({".py"}))
    return sorted(name for name in names if not name.endswith("__main__"))


def environment(folder: Path) -> Path:
    """Make an environment that sees the installed dependencies, but not an editable install of ours; its Python."""
    run_python("-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    purelib = run_python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", python=python, cwd=folder)
    # A plain line is appended to sys.path; the .pth files over there (editable installs) are not read.
    Path(purelib.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: str | Path) -> None:
    """Install without dependencies and without an index, with this environment's pip."""
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall", "-q")
    run_python("-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)


def imported_from(python: Path | str, cwd: Path, *path: Path) -> set[str]:
    """Import every module in one process; return the folders that `metis_home` came from."""
    program = (
        "import importlib, sys\n"
        "failed = {}\n"
        f"for name in {modules()}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        if getattr(error, 'name', '') != 'triton':  # not made for every platform\n"
        "            failed[name] = repr(error)\n"
        "assert not failed, failed\n"
        "import metis_home\n"
        "print(*metis_home.__path__)\n"
    )
    return set(run_python("-c", program, python=python, cwd=cwd, path=path).split())


def test_a_wheel_holds_every_module_and_data_file_as_real_files(built: dict[str, Path]) -> None:
    for kind in ("wheel", "wheel from the checkout"):
        with zipfile.ZipFile(built[kind]) as wheel:
            infos = wheel.infolist()
        held = {info.filename for info in infos if info.filename.startswith("metis_home/")}
        links = [info.filename for info in infos if (info.external_attr >> 16) & 0o170000 == 0o120000]

        assert package_files({".py", *DATA}) - held == set(), kind
        assert held - package_files({".py", ".md", *DATA}) == set(), kind
        assert not links, kind


def test_both_ways_to_a_wheel_give_the_same_files(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as one, zipfile.ZipFile(built["wheel from the checkout"]) as other:
        assert {i.filename: i.CRC for i in one.infolist() if "dist-info" not in i.filename} == {
            i.filename: i.CRC for i in other.infolist() if "dist-info" not in i.filename
        }


def test_an_sdist_holds_real_files_and_what_a_distributor_needs(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        members = sdist.getmembers()
    names = {member.name.partition("/")[2] for member in members}

    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert package_files({".py", *DATA}) - names == set()


def test_the_installed_wheel_imports_and_its_command_runs(built: dict[str, Path], tmp_path: Path) -> None:
    python = environment(tmp_path / "fresh")

    install(python, built["wheel"])

    (origin,) = imported_from(python, tmp_path)
    assert Path(origin).is_relative_to(tmp_path / "fresh")
    printed = run_python(python.parent / "metis-home", "--help", python=python, cwd=tmp_path)
    assert "convert" in printed
    assert run_python(python.parent / "metis-home", "--version", python=python, cwd=tmp_path).startswith(
        "metis_home 0."
    )


def test_an_editable_install_imports(checkout: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "fresh")

    install(python, "-e", checkout)

    assert str(checkout / "metis_home") in imported_from(python, tmp_path)


def test_a_bare_checkout_imports(checkout: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "fresh")

    assert imported_from(python, tmp_path, checkout) == {str(checkout / "metis_home")}

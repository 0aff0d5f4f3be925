"""`metis-home doctor` tells what is installed, what works, and what to install."""

import importlib.metadata
import json
import sys

import pytest

from metis_home.cli import doctor
from metis_home.cli.doctor import Package, advise, examine_backends, examine_packages


@pytest.fixture
def declared(monkeypatch):
    """Pretend that this package declares other dependencies."""

    def declare(*requirements: str) -> None:
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(requirements))

    return declare


def statuses() -> dict[str, str]:
    return {package.name: package.status for package in examine_packages()[0]}


# As in pyproject.toml; a bare checkout on the path, which has no metadata, is examined all the same.
DECLARED = ("torch>=2.11", "transformers<6,>=5.16", "typer>=0.16", "safetensors", 'torchvision; extra == "vision"')


def test_what_this_environment_needs_is_found(declared, capsys) -> None:
    declared(*DECLARED)

    doctor.doctor(as_json=True)

    report = json.loads(capsys.readouterr().out)
    needed = {package["name"]: package for package in report["packages"] if package["extra"] is None}
    assert needed.keys() == {"torch", "transformers", "safetensors", "typer"}
    assert all(package["status"] == "ok" for package in needed.values())
    assert report["backends"][0]["name"] == "torch"
    assert report["backends"][0]["usable"]


def test_the_report_for_people_names_the_same(declared, capsys) -> None:
    declared(*DECLARED)

    doctor.doctor()

    out = capsys.readouterr().out
    assert "needed to convert and answer" in out
    assert "backends" in out


def test_missing_old_and_broken_packages_are_told_apart(declared, monkeypatch, tmp_path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-1.0.dist-info").mkdir()
    (tmp_path / "torchvision-1.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    declared("typer>=99", "no-such-thing>=1", "rich", 'torchvision; extra == "vision"')

    assert statuses() == {
        "typer": "wrong version",
        "no-such-thing": "missing",
        "rich": "ok",
        "torchvision": "broken",
    }
    broken = examine_packages()[0][-1]
    assert "torchvision::nms" in broken.detail


def test_advice_puts_what_answering_needs_first_and_names_extras_once(declared) -> None:
    declared("no-such-thing>=1", 'gone-a; extra == "train"', 'gone-b>=2; extra == "train"', 'gone-c; extra == "other"')

    packages, _ = examine_packages()

    assert [line.split("   #")[0] for line in advise(packages)] == [
        "pip install 'no-such-thing>=1'",
        "pip install 'metis_home[train]'",
        "pip install 'metis_home[other]'",
    ]


def test_a_torchvision_for_another_torch_is_to_be_removed() -> None:
    broken = Package(name="torchvision", extra="vision", wanted="", version="1", status="broken", detail="nms")

    assert advise([broken])[0].startswith("pip uninstall torchvision")


def test_a_missing_necessity_is_status_1(declared) -> None:
    import typer

    declared("no-such-thing>=1")

    with pytest.raises(typer.Exit) as stop:
        doctor.doctor(as_json=True)
    assert stop.value.exit_code == 1


def test_a_bare_checkout_says_that_its_needs_are_unknown(monkeypatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    monkeypatch.setattr(importlib.metadata, "version", absent)

    packages, notes = examine_packages()

    assert packages == []
    assert "not installed" in notes[0]
    assert "not installed" in doctor.own_version()


def test_triton_is_usable_only_with_a_gpu() -> None:
    import torch

    backends = {backend.name: backend for backend in examine_backends()}

    assert backends["triton"].usable <= torch.cuda.is_available()
    assert backends["triton"].reason

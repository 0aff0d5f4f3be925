"""After a crash at any point there is the old state or one that --resume completes, to the same bits."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from metis_home.convert import Manifest, split, upcycle, verify
from metis_home.convert.disk import Disk
from metis_home.errors import CheckpointError, OutputError
from tests.convert.faults import (
    CountingDisk,
    FullDisk,
    KillingDisk,
    NoExchangeDisk,
    PowerLossDisk,
    in_killed_child,
)
from tests.convert.pico import snapshot, write_dense

SHARD = 12_000  # bytes: about eight shards
# Every third point by default; METIS_HOME_CRASH_STRIDE=1 tries every one (a minute).
STRIDE = int(os.environ.get("METIS_HOME_CRASH_STRIDE", "3"))


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is /dev/shm: hundreds of conversions, each with dozens of fsyncs."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(dir=shm))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sources")
    return write_dense(root / "t", ffn_seed=1), write_dense(root / "n", ffn_seed=2, layout="module")


@pytest.fixture(scope="module")
def finished(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("finished") / "out"
    upcycle(sources[0], out, sources[1], max_shard_size=SHARD)
    return snapshot(out)


def convert(sources: tuple[Path, Path], out: Path, disk: Disk, **how: object) -> None:
    upcycle(sources[0], out, sources[1], max_shard_size=SHARD, disk=disk, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("torn", [False, True], ids=["between operations", "within a write"])
def test_killed_at_every_operation_resumes_to_the_same_bits(
    torn: bool, sources: tuple[Path, Path], finished: dict[str, bytes], tmp_path: Path
) -> None:
    out, point = tmp_path / "out", 0
    while True:
        killed = in_killed_child(lambda: convert(sources, out, KillingDisk(point, torn)))  # noqa: B023

        if not killed:
            break
        assert not out.exists() or (out / "metis_home_manifest.json").exists()
        convert(sources, out, Disk(), resume=True)
        assert snapshot(out) == finished, point
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        subprocess.run(["rm", "-r", str(out)], check=True)
        point += STRIDE
    assert point > 60


@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_while_replacing_leaves_the_old_or_the_new(
    can_exchange: bool, sources: tuple[Path, Path], finished: dict[str, bytes], tmp_path: Path
) -> None:
    class Killing(KillingDisk):
        exchange = KillingDisk.exchange if can_exchange else NoExchangeDisk.exchange

    counting = CountingDisk() if can_exchange else NoExchangeDisk()
    upcycle(sources[0], tmp_path / "out")
    convert(sources, tmp_path / "out", counting, overwrite=True)
    subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)
    out = tmp_path / "out"
    for point in range(len(counting.operations) - 14, len(counting.operations)):
        upcycle(sources[0], out, seed=3)
        old = snapshot(out)

        assert in_killed_child(lambda: convert(sources, out, Killing(point, False), overwrite=True))  # noqa: B023

        if can_exchange or out.exists():
            now = {name: data for name, data in snapshot(out).items() if name != ".metis_home_journal"}
            assert now in (old, finished), point
        else:
            assert snapshot(tmp_path / ".out.metis_home_replaced") == old
        convert(sources, out, Disk(), overwrite=True, resume=True)
        assert snapshot(out) == finished
        assert [p.name for p in tmp_path.iterdir()] == ["out"], point
        subprocess.run(["rm", "-r", str(out)], check=True)


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replacing"])
def test_power_lost_at_every_operation(
    replaces: bool, can_exchange: bool, sources: tuple[Path, Path], finished: dict[str, bytes], tmp_path: Path
) -> None:
    if not replaces and not can_exchange:
        pytest.skip("nothing is exchanged")
    root, states = tmp_path / "root", tmp_path / "states"
    root.mkdir()
    states.mkdir()
    if replaces:
        upcycle(sources[0], root / "out", seed=3)
    old = snapshot(root / "out")

    convert(sources, root / "out", PowerLossDisk(root, states, can_exchange), overwrite=replaces)

    assert len(list(states.iterdir())) > 100
    for state in sorted(states.iterdir())[::STRIDE]:
        out = state / "out"
        if out.exists():  # what looks finished is finished: the old one or the new one, whole
            now = {name: data for name, data in snapshot(out).items() if name != ".metis_home_journal"}
            assert now in (old, finished), state.name
        convert(sources, out, Disk(), resume=True, overwrite=True)
        assert snapshot(out) == finished, state.name


@pytest.mark.parametrize("reserves", [True, False])
def test_a_full_disk_fails_cleanly_and_resumes(
    reserves: bool, sources: tuple[Path, Path], finished: dict[str, bytes], tmp_path: Path
) -> None:
    total, failures = sum(len(data) for data in finished.values()), 0
    for room in range(0, total, total // 40):
        out = tmp_path / "out"
        failure = None
        try:
            convert(sources, out, FullDisk(room, reserves))
        except OutputError as error:
            failure = str(error)
        if failure is not None:
            assert "Free some space" in failure
            assert not out.exists()
            partial = tmp_path / "out.partial"
            assert ("--resume" in failure) == partial.exists()
            if reserves:
                assert not partial.exists()  # nothing had been copied, so nothing is kept
            convert(sources, out, Disk(), resume=True)
            failures += 1
        assert snapshot(out) == finished
        subprocess.run(["rm", "-r", str(out)], check=True)
    assert failures > 20


def test_resume_trusts_no_shard_whose_digest_differs(
    sources: tuple[Path, Path], finished: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert in_killed_child(lambda: convert(sources, out, KillingDisk(55, False)))
    shard = next(iter(sorted((tmp_path / "out.partial").glob("*.safetensors"))))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 255
    shard.write_bytes(bytes(data))

    convert(sources, out, Disk(), resume=True)

    assert snapshot(out) == finished


def test_resume_copies_finished_shards_no_second_time(sources: tuple[Path, Path], tmp_path: Path) -> None:
    out, all_, rest = tmp_path / "out", CountingDisk(), CountingDisk()
    convert(sources, tmp_path / "whole", all_)
    assert in_killed_child(lambda: convert(sources, out, KillingDisk(70, False)))

    convert(sources, out, rest, resume=True)

    assert 0 < rest.operations.count("copy") < all_.operations.count("copy") * 0.8


def test_resume_with_other_options_is_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert in_killed_child(lambda: convert(sources, out, KillingDisk(60, False)))

    with pytest.raises(OutputError, match="other options"):
        upcycle(sources[0], out, sources[1], max_shard_size=SHARD, seed=5, resume=True)
    with pytest.raises(OutputError, match="--resume"):
        convert(sources, out, Disk())
    assert (tmp_path / "out.partial").exists()


def test_resume_leaves_a_complete_output_as_it_is_and_says_when_it_is_of_other_sources(tmp_path: Path) -> None:
    source, out = write_dense(tmp_path / "source", ffn_seed=1), tmp_path / "out"
    upcycle(source, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    upcycle(source, out, resume=True)

    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(OutputError, match="is complete, but it was made from other sources or with other options"):
        upcycle(source, out, seed=5, resume=True)
    upcycle(source, out, seed=5, resume=True, overwrite=True)
    assert Manifest.read(out).options["seed"] == 5


def test_a_split_resumes_too(sources: tuple[Path, Path], tmp_path: Path) -> None:
    convert(sources, tmp_path / "two", Disk())
    split(tmp_path / "two", tmp_path / "whole", max_shard_size=SHARD)
    counting = CountingDisk()
    split(tmp_path / "two", tmp_path / "counted", disk=counting)
    for point in range(0, len(counting.operations), STRIDE):
        out = tmp_path / "out"
        assert in_killed_child(lambda: split(tmp_path / "two", out, disk=KillingDisk(point, False)))  # noqa: B023
        if not out.exists():
            split(tmp_path / "two", out, resume=True)
        shown = {n: d for n, d in snapshot(out).items() if n != ".metis_home_journal"}
        assert shown == snapshot(tmp_path / "whole")
        subprocess.run(["rm", "-r", str(out)], check=True)


def test_two_conversions_do_not_share_a_target(sources: tuple[Path, Path], tmp_path: Path) -> None:
    class Intruding(Disk):
        tried = False

        def before(self, operation: str, path: str, size: int = 0) -> None:
            if operation == "copy" and not self.tried:
                self.tried = True
                with pytest.raises(OutputError, match="another process"):
                    convert(sources, tmp_path / "out", Disk(), resume=True)

    disk = Intruding()
    convert(sources, tmp_path / "out", disk)

    assert disk.tried
    verify(tmp_path / "out", *sources)


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "d")

    class Touching(Disk):
        def before(self, operation: str, path: str, size: int = 0) -> None:
            if operation == "copy":
                os.utime(dense / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        upcycle(dense, tmp_path / "out", disk=Touching())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_the_slower_ways_to_copy_give_the_same_bits(
    sources: tuple[Path, Path], finished: dict[str, bytes], tmp_path: Path
) -> None:
    for number in (1, 2):
        disk = Disk()
        disk._copy_methods = disk._copy_methods[number:]
        convert(sources, tmp_path / str(number), disk)
        assert snapshot(tmp_path / str(number)) == finished


def test_a_refused_way_to_copy_falls_back(
    sources: tuple[Path, Path], finished: dict[str, bytes], tmp_path: Path
) -> None:
    def refuse(*arguments: int) -> int:
        raise OSError(18, "Invalid cross-device link")

    disk = Disk()
    disk._copy_methods = [refuse, refuse, disk._copy_buffered]

    convert(sources, tmp_path / "out", disk)

    assert snapshot(tmp_path / "out") == finished


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(number: int, status: int, sources: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import time, sys; from metis_home.convert.disk import Disk; from metis_home.cli import main\n"
        "def before(self, operation, path, size=0):\n"
        "    if operation == 'copy': print('copying', flush=True); time.sleep(0.05)\n"
        "Disk.before = before\n"
        f"main(['convert', {str(sources[0])!r}, {str(tmp_path / 'out')!r}, '--max-shard-size', '12000'])"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that; a user at a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for _ in range(12):  # the first shards are finished
        process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)

    assert process.returncode == status
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    upcycle(sources[0], tmp_path / "out", max_shard_size=12000, resume=True)
    assert Manifest.read(tmp_path / "out").shards

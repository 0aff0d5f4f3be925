"""Run transformers' own model tests on stock Qwen2.5-VL and on our classes: what stock passes, ours must pass.

    python tests/conformance/run.py [--workers N] [-k EXPRESSION]

Prints the comparison, writes benchmarks/results/conformance-transformers-<version>.json, and ends with status 1 if a
test that the stock model passes does not pass on ours. `make conformance` runs it on the newest and the oldest
supported version of transformers.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = Path(__file__).with_name("cases.py")
STOCK, OURS = "StockCase", "MetisHomeCase"
Outcomes = dict[str, dict[str, str]]  # case -> test -> passed | failed | skipped


def main() -> int:
    """Run, compare, write, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "-k", dest="expression", default="", help="only tests that match, as in pytest (writes no JSON)"
    )
    options = parser.parse_args()

    # This file is run by its path, so its folder is the import root.
    from upstream import fetch

    home = fetch(version("transformers"), REPOSITORY / ".cache" / "conformance")
    started = time.monotonic()
    outcomes = run(home, options.workers, options.expression)
    report = compare(outcomes) | {"seconds": round(time.monotonic() - started)}
    print(table(report))
    if not options.expression:
        write(report)
    return 1 if report["passed_by_stock_only"] else 0


def run(home: Path, workers: int, expression: str) -> Outcomes:
    """Run both cases with pytest and return what came out."""
    results = home / "results.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--rootdir", str(home), "-n", str(workers), f"--junitxml={results}"]
    command += ["-W", "ignore", *(["-k", expression] if expression else []), str(CASES)]
    paths = [str(home), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, cwd=home, check=False)
    if not results.exists():
        raise SystemExit("error: pytest wrote no results; see its output above")
    return read_outcomes(results.read_text())


def read_outcomes(junit_xml: str) -> Outcomes:
    """Read a JUnit report. A test with a failed subtest appears more than once: the worst outcome counts."""
    worst = {"skipped": 0, "passed": 1, "failed": 2}
    outcomes: Outcomes = {STOCK: {}, OURS: {}}
    for element in ElementTree.fromstring(junit_xml).iter("testcase"):
        case = element.get("classname", "").rsplit(".", 1)[-1]
        kinds = {child.tag for child in element}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        if case not in outcomes:  # the file itself could not be imported
            raise SystemExit(f"error: {element.get('name')} {outcome}; see pytest's output above")
        tests, name = outcomes[case], element.get("name", "")
        if name not in tests or worst[outcome] > worst[tests[name]]:
            tests[name] = outcome
    return outcomes


def compare(outcomes: Outcomes) -> dict:
    """Return counts and the tests on which the two differ."""
    stock, ours = outcomes[STOCK], outcomes[OURS]
    passed = {case: {name for name, outcome in outcomes[case].items() if outcome == "passed"} for case in outcomes}
    return {
        "stock": dict(Counter(stock.values())),
        "metis_home": dict(Counter(ours.values())),
        "passed_by_stock_only": {name: ours.get(name, "missing") for name in sorted(passed[STOCK] - passed[OURS])},
        "passed_by_metis_home_only": sorted(passed[OURS] - passed[STOCK]),
        "failed_by_metis_home": {n: f"stock: {stock.get(n)}" for n, how in sorted(ours.items()) if how == "failed"},
        "versions": {name: version(name) for name in ("transformers", "torch", "huggingface_hub", "metis_home")}
        | {"python": platform.python_version()},
    }


def table(report: dict) -> str:
    """The comparison, for people."""
    lines = [f"transformers {report['versions']['transformers']}: its own model tests", ""]
    lines += [f"{'':14}{'passed':>8}{'failed':>8}{'skipped':>9}"]
    for case in ("stock", "metis_home"):
        counts = report[case]
        lines += [
            f"{case:14}"
            + "".join(f"{counts.get(o, 0):>{w}}" for o, w in (("passed", 8), ("failed", 8), ("skipped", 9)))
        ]
    lost = report["passed_by_stock_only"]
    lines += [
        "",
        f"passed by stock, not by metis_home: {len(lost)}",
        *(f"  {name}: {how}" for name, how in lost.items()),
    ]
    failed = report["failed_by_metis_home"]
    lines += [f"failed by metis_home: {len(failed)}", *(f"  {name} ({stock})" for name, stock in failed.items())]
    won = report["passed_by_metis_home_only"]
    lines += [f"passed by metis_home, not by stock: {len(won)}", *(f"  {name}" for name in won)]
    return "\n".join(lines)


def write(report: dict) -> None:
    """Write the report beside the other measured results."""
    folder = REPOSITORY / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"conformance-transformers-{report['versions']['transformers']}.json"
    path.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    print(f"wrote {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    sys.exit(main())

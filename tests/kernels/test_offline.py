"""Every shipped configuration compiles for its chip, fits its shared memory and does not spill. No GPU needed.

Each target is compiled by `offline.py` in a process of its own: there the kernels are not interpreted.
"""

import json
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kernels.offline import SHARED_LIMIT

HERE = pathlib.Path(__file__).parent
MATRIX = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
GEMMS = ("_gate_up", "_down", "_grad_")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> dict[str, list[dict]]:
    """{target: one row per launch}."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}

    def compile_target(target: str) -> list[dict]:
        out = folder / f"{target}.json"
        command = [sys.executable, str(HERE / "offline.py"), target, "--out", str(out)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(out.read_text())

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SHARED_LIMIT, pool.map(compile_target, SHARED_LIMIT), strict=True))


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_shipped_configuration_compiles_and_fits(compiled, target) -> None:
    rows = compiled[target]

    assert {"_tile_plan_kernel", "_silu_mul_kernel", "_dswiglu_kernel", "_decode_down_kernel"} <= {
        row["kernel"] for row in rows
    }
    problems = []
    for row in rows:
        what = f"{row['case']}: {row['kernel']} {row['config']}"
        if "error" in row:
            problems.append(f"{what}: {row['error']}")
            continue
        if row["shared"] > SHARED_LIMIT[target]:
            problems.append(f"{what}: {row['shared']} B of shared memory, {SHARED_LIMIT[target]} exist")
        if row["stack"] or {"STL", "LDL"} & set(row["instructions"]):
            problems.append(f"{what}: spills ({row['stack']} B)")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("target", MATRIX)
def test_the_grouped_products_use_the_chips_matrix_and_copy_engines(compiled, target) -> None:
    products = [row for row in compiled[target] if row["kernel"].startswith(GEMMS)]

    assert len(products) >= 10
    for row in products:
        assert MATRIX[target] in row["instructions"], row
        copies = "UTMALDG" if row["kernel"].endswith("_tma_kernel") else "LDGSTS"  # the latter: pipelined loads
        assert copies in row["instructions"], row

"""Without a GPU: the Triton kernels compile for sm_80 and sm_90 at the models' shapes, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch, root, tmp_path, capsys):
    # In a process of its own: in this one Triton may be interpreting.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tools.triton_resources", f"--arch={arch}", f"--json={tmp_path / 'rows'}"]
    report = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    with capsys.disabled():
        print(f"\n{report.stdout}")
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"forward_kernel", "backward_kernel"}
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert 0 < row["registers"] <= 255
        assert row["exponentials"] >= 16  # of N = 16 states, a thread's share of 512 a warp: the loop is in there

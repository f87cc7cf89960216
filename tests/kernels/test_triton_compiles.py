"""Without a GPU: the Triton kernels compile for sm_80, sm_90 and sm_100 at the models' shapes, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Four warps of a multiprocessor's quarter have 65,536 / 4 / 32 registers: with more than 168 only two would fit.
REGISTERS = 168
# A step of the backward, of which 12 rebuild: rows to all lanes, 32; sums over 4 and 8 lanes, 13; the rest is prologue.
SHUFFLES = 64


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize(
    "arch, shapes",
    [(80, ["ViM-S decay"]), (90, ["ViM-S", "ViM-S, both directions", "PlainMamba-L3 decay"]), (100, ["ViM-S decay"])],
)
def test_compiles_without_spills(arch, shapes, root, tmp_path, capsys):
    # In a process of its own: in this one Triton may be interpreting.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tools.triton_resources", f"--arch={arch}", f"--json={tmp_path / 'rows'}"]
    command += ["--shapes", *shapes]
    report = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    with capsys.disabled():
        print(f"\n{report.stdout}")
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"forward_kernel", "backward_kernel"}
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        forward = row["kernel"] == "forward_kernel"
        assert 0 < row["registers"] <= (REGISTERS if forward else 255), row
        # A thread computes 32 (16) of the states of a step: the loop is in there.
        assert row["exponentials"] >= (32 if forward else 16), row
        assert row["barriers"] == row["shared"] == 0, row
        if forward:  # a thread owns whole channels and all their states
            assert row["shuffles"] == 0, row
        else:
            assert row["layouts"] == 1, row  # so each thread reads from `scratch` what it wrote itself
            assert 50 < row["shuffles"] <= SHUFFLES, row  # Triton makes them of `tl.gather`

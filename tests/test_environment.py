"""Where and with what a run or a measurement was made."""

import json

import jax

from top_jax.environment import environment, nvidia_smi


def test_environment():
    found = json.loads(json.dumps(environment()))
    assert found["device"] == jax.devices()[0].device_kind and found["packages"]["jax"] == jax.__version__
    assert found["date"].startswith("20") and found["driver"] == found["nvidia_smi"].get("driver_version")


def test_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-smi" in nvidia_smi()["problem"]
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.159.03, 1980, 345, 700.00'\n")
    program.chmod(0o755)
    assert nvidia_smi()["driver_version"] == "580.159.03" and nvidia_smi()["clocks.max.sm"] == "1980"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert nvidia_smi()["problem"].startswith("CalledProcessError: ")

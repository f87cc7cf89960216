"""Tables, files and where a report was made."""

import json

import jax
import pytest

from top_jax.benchmark.report import table, write_whole
from top_jax.environment import environment
from top_jax.errors import InputError


def test_environment():
    found = json.loads(json.dumps(environment()))
    assert found["device"] == jax.devices()[0].device_kind and found["packages"]["jax"] == jax.__version__
    assert found["date"].startswith("20") and found["driver"] == found["nvidia_smi"].get("driver_version")


def test_table():
    rows = [
        {"name": "a", "ms": 1.23456, "range": [1.0, 12345.6], "ok": True, "rounds": 3},
        {"name": "longer", "error": "no launch"},
        {"name": "c", "absent": "too large"},
    ]
    assert table(rows).splitlines() == [
        "name    ms     range       ok",
        "a       1.235  1 .. 12346  yes",
        "longer  -      -           -    error: no launch",
        "c       -      -           -    absent: too large",
    ]
    assert table([]) == ""


def test_write_whole(tmp_path):
    file = tmp_path / "a.json"
    write_whole(file, {"a": 1})
    write_whole(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 2} and list(tmp_path.iterdir()) == [file]
    with pytest.raises(InputError, match=r"a.json/b.json cannot be written \(Not a directory\); .* --out"):
        write_whole(file / "b.json", {})

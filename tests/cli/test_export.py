"""export: a file that JAX alone runs, its report, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

TINY = f"--config={Path(__file__).parents[1] / 'tiny_run.py'}"
# What docs/guides/export.md tells a user to write, in a process that cannot import any of our code.
READER = """
import sys
for name in ("top_jax", "flax", "einops", "ml_collections"):
    sys.modules[name] = None
import jax, numpy as np

with open(sys.argv[1], "rb") as file:
    classify = jax.export.deserialize(file.read()).call
np.save(sys.argv[3], classify(np.load(sys.argv[2])))
"""


@pytest.mark.slow
def test_from_a_run_to_another_process(command, finished_run, launcher, tmp_path):
    """Pixels in, the logits of the run's model out, at another batch size than the check's, without top_jax."""
    from top_jax.data import normalize
    from top_jax.training import load_checkpoint

    out = tmp_path / "tiny.stablehlo"
    result = command("export", TINY, f"--checkpoint={finished_run}", "--normalize", "--images=data", str(out))
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "tiny.stablehlo.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"{out.name}.json"}
    assert report["bytes"] == out.stat().st_size and report["model"] == "vim_tiny"
    assert report["input"]["shape"] == ["b", 8, 8, 3] and report["input"]["dtype"] == "uint8"
    assert report["config"]["implementation"] == "xla" and report["pruning"]["keep_ratio"] == 0.5
    assert (report["platforms"], report["not_checked"]) == (["cpu", "cuda"], ["cuda"])
    assert [one["batch_size"] for one in report["parity"]] == [1, 3]
    assert all(one["max_rel"] <= 1e-5 for one in report["parity"])
    for line in ("uint8 [b, 8, 8, 3], pixels", "cpu, batch 3: largest difference", "not checked cuda"):
        assert line in result.out

    pixels = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    files = [str(tmp_path / name) for name in (out.name, "pixels.npy", "logits.npy")]
    subprocess.run([sys.executable, "-c", READER, *files], env=launcher.environment, check=True)
    images = normalize(pixels, report["input"]["mean"], report["input"]["std"])
    expected = jax.jit(lambda model, images: model(images))(load_checkpoint(finished_run), images)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_differs_is_not_written(command, finished_run, tmp_path, monkeypatch):
    """Not even beside one that was there before; an old one stays what it was."""
    from top_jax.convert import stablehlo

    out = tmp_path / "a.stablehlo"
    out.write_bytes(b"old")
    wrong = [stablehlo.Parity("cpu", 1, float("nan"), float("nan"))]
    monkeypatch.setattr(stablehlo, "largest_difference", lambda *_, **__: wrong)
    flags = ("--overwrite", "--batch=1", "--platforms=cpu", f"--stablehlo={tmp_path}/a.mlir")
    result = command("export", TINY, f"--checkpoint={finished_run}", str(out), *flags)
    assert result.status == 1 and result.err.count("\n") == 1
    assert "is not written: on cpu" in result.err and "nan" in result.err
    assert out.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["a.stablehlo"]


def test_help(command):
    result = command("export", "--help")
    assert result.status == 0
    assert all(flag in result.out for flag in ("--checkpoint", "--batch", "--platforms", "--stablehlo", "--tolerance"))


def test_refuses(refused, tmp_path):
    """Before anything is loaded: there is no such checkpoint."""
    out, taken = f"{tmp_path}/a.stablehlo", tmp_path / "taken"
    taken.touch()
    flags = (TINY, "--checkpoint=nowhere")
    assert "got 0 arguments" in refused("export", *flags)
    for batch in ("0", "-1", "many"):
        assert f"--batch={batch}" in refused("export", *flags, out, f"--batch={batch}")
    assert f"{taken} exists" in refused("export", *flags, str(taken))
    assert f"{tmp_path}/no/a" in refused("export", *flags, f"{tmp_path}/no/a")
    assert f"{tmp_path} is a directory" in refused("export", *flags, str(tmp_path))
    assert "'.bin'" in refused("export", *flags, out, "--stablehlo=a.bin")
    assert "needed: one platform and a number" in refused("export", *flags, out, f"--stablehlo={out}.mlir")
    assert f"{out}, {out}" in refused("export", *flags, out, f"--json={out}")
    assert "--images=cats" in refused("export", *flags, out, "--images=cats")
    assert "nowhere does not exist" in refused("export", *flags, out)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]

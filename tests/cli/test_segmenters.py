"""Every command on a segmenter: one run of six steps is trained, resumed, evaluated, drawn, converted and exported."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.tiny_segmenter import get_config
from top_jax.config import RunConfig
from top_jax.models.weights import weights_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.weights import load_checkpoint

CONFIG = "tests/tiny_segmenter.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "a"


def test_commands_for_classifiers(refused, tmp_path):
    """A segmenter's run is refused before images are looked for, by its config alone."""
    RunDirectory(tmp_path).write_json("config.json", RunConfig.from_config_dict(get_config()).to_dict())
    for name, place in (("predict", "nowhere.jpg"), ("features", "nowhere")):
        output = [f"--output={tmp_path}/f.npz"] if name == "features" else []
        assert "is a segmenter" in refused(name, f"--checkpoint={tmp_path}", place, *output)


@pytest.mark.slow
def test_every_command(command, finished, tmp_path):
    assert command("train.py", f"--config={CONFIG}", f"--workdir={finished}").status == 0
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 < summary["ema_miou"] <= summary["best_miou"] < 1 and summary["images"] == 360
    for key in ("gmacs", "backbone_gmacs"):
        assert summary[key]["published"] < summary[f"dense_{key}"]["published"]
    assert summary["backbone_gmacs"]["published"] < summary["gmacs"]["published"]

    resumed = tmp_path / "resumed"
    shutil.copytree(finished, resumed)
    shutil.rmtree(resumed / "checkpoints" / "latest" / "6")
    (resumed / "summary.json").unlink()
    result = command("train.py", f"--config={CONFIG}", f"--workdir={resumed}")
    assert result.status == 0 and "going on after step 4" in result.out
    want, found = (weights_of(load_checkpoint(run, "latest")) for run in (finished, resumed))
    jax.tree.map(np.testing.assert_array_equal, found, want)

    run = f"--checkpoint={finished}"
    result = command("evaluate", run)
    assert result.status == 0 and "worst classes" in result.out
    report = json.loads((finished / "evaluation.json").read_text())
    assert report["miou"] == pytest.approx(summary["best_miou"], abs=1e-6)
    assert [one["name"] for one in report["classes"]] == ["background", *"0123456789"]
    ious = [one["iou"] for one in report["classes"] if one["iou"] is not None]
    assert report["miou"] == pytest.approx(np.mean(ious))

    out, zero = tmp_path / "ablation", tmp_path / "zero.json"
    assert command("evaluate", run, "--config.model.fill=zero", f"--json={zero}").status == 0
    result = command("ablate", run, f"--out={out}", "--tables=fill", "--fills=zero", "--finetune_steps=2")
    assert result.status == 0 and "miou_vs_gflops.png" in result.out
    _, untrained, *tuned = json.loads((out / "results.json").read_text())["rows"]
    assert untrained["miou"] == pytest.approx(json.loads(zero.read_text())["miou"], abs=1e-9) != report["miou"]
    assert [row["fill"] for row in (untrained, tuned[1])] == ["zero"] * 2 and tuned[1]["miou"] != untrained["miou"]
    settings = json.loads((out / tuned[1]["finetuned"]["run"] / "config.json").read_text())
    assert settings["model"]["fill"] == "zero" and settings["total_steps"] == 2

    result = command("visualize", run, "--examples=1", f"--out={tmp_path / 'pictures'}")
    assert result.status == 0
    arrays = np.load(tmp_path / "pictures" / "image_0.npz")
    assert arrays["prediction"].shape == arrays["label"].shape == (64, 64)
    assert arrays["kept/1"].shape == (48, 48) and 0.3 < arrays["kept/1"].mean() < 0.7

    file, back = tmp_path / "seg.safetensors", tmp_path / "back"
    result = command("convert", str(finished), str(file))
    assert result.status == 0
    flags = re.search(r"RUN (--model=.*)", result.out)[1].replace("'", "").split(" --")
    result = command("convert", str(file), str(back), flags[0], *(f"--{flag}" for flag in flags[1:]))
    assert result.status == 0, result
    same, want = (flatten_dict(weights_of(load_checkpoint(run))) for run in (back, finished))
    for path, array in want.items():
        if array.ndim:  # a file rounds the averaged count of batches
            np.testing.assert_array_equal(same[path], array, err_msg=str(path))

    result = command("export", run, str(tmp_path / "seg.stablehlo"), "--batch=1", "--platforms=cpu")
    assert result.status == 0 and (tmp_path / "seg.stablehlo").stat().st_size > 1000

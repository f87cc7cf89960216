"""visualize: the files it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY = f"--config={Path(__file__).parents[1] / 'tiny_run.py'}"


@pytest.fixture
def photo(tmp_path):
    rows, columns = np.mgrid[:30, :40]
    Image.fromarray(np.stack([rows * 8, columns * 6, rows + columns], -1).astype(np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_photos_and_their_tokens(command, finished_run, photo, tmp_path):
    """Two files of one name get different names; only what is asked for is computed."""
    out = tmp_path / "made" / "here"
    flags = (TINY, f"--checkpoint={finished_run}", f"--out={out}", "--draw=tokens,scores")
    result = command("visualize", *flags, str(photo), str(photo))
    assert result.status == 0, result
    index = json.loads((out / "index.json").read_text())
    assert [image["png"] for image in index["images"]] == ["1_photo.png", "2_photo.png"]
    assert index["variants"] == {"hold": index["pruning"]} and index["attention_of_blocks"] == []
    first = index["images"][0]
    assert first["prediction"] in "0123456789" and first["label"] is None and first["tokens"] == {"1": 2}
    assert first["class_token"] and f"{out}/1_photo.png: predicted class {first['prediction']}" in result.out
    with np.load(out / "1_photo.npz") as arrays:
        assert arrays["kept"].sum() == 2 and arrays["photo"].shape == (512, 512, 3)
        assert np.isfinite(arrays["scores"]).all() and not any(name.startswith("path") for name in arrays.files)


@pytest.mark.slow
def test_examples_with_everything(command, finished_run, tmp_path):
    flags = (TINY, f"--checkpoint={finished_run}", f"--out={tmp_path}", "--examples=2", "--blocks=2")
    assert command("visualize", *flags).status == 0
    index = json.loads((tmp_path / "index.json").read_text())
    assert [image["png"] for image in index["images"]] == ["image_0.png", "image_180.png"]
    assert list(index["variants"]) == ["dense", "none, score order", "hold", "decay"]
    assert index["attention_of_blocks"] == [2] and index["images"][0]["label"] in "0123456789"
    with np.load(tmp_path / "image_180.npz") as arrays:
        assert arrays["path/dense"].shape == (2, 5) and arrays["path/hold"].shape == (2, 3)
        assert arrays["attention/dense/2"].shape == (5, 5) and arrays["attention/decay/2"].shape == (3, 3)


def test_visualize_refuses(refused, finished_run, photo, tmp_path):
    flags = (TINY, f"--checkpoint={finished_run}", f"--out={tmp_path}/out")
    needed = "--examples=N"
    assert needed in refused("visualize", *flags)
    assert needed in refused("visualize", *flags, str(photo), "--examples=1")
    assert "--examples=361" in refused("visualize", *flags, "--examples=361")
    assert "nowhere.jpg" in refused("visualize", *flags, "nowhere.jpg")
    message = refused("visualize", *flags, str(finished_run / "config.json"))
    assert f"{finished_run}/config.json" in message
    assert "--draw=tokens,hats" in refused("visualize", *flags, "x", "--draw=tokens,hats")
    assert "--blocks=3" in refused("visualize", *flags, str(photo), "--blocks=3")
    assert "--out is missing" in refused("visualize", *flags[:2], str(photo))
    assert f"--out={photo}" in refused("visualize", *flags[:2], f"--out={photo}", str(photo), "--draw=tokens")
    assert not (tmp_path / "out").exists()

"""predict and features: on a run and on a file, with what cannot be read."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image
from small_models import filled

import top_jax
from top_jax.build import build_abstract_model
from top_jax.config import DataConfig, ModelConfig, PruningConfig, RunConfig
from top_jax.errors import InputError
from top_jax.models.weights import weights_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.weights import save_weights

NAMES = ("blue", "green", "red")
SIZES = {"img_size": (16,), "patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 4}
CONFIG = RunConfig(
    model=ModelConfig(num_classes=3, **SIZES),
    pruning=PruningConfig(after_blocks=(1,), keep_ratio=(0.5,)),
    data=DataConfig(mean=(0.4, 0.4, 0.4), std=(0.3, 0.3, 0.3), eval_crop=1.0),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, an official file of the same weights, and images of three classes in folders."""
    root = tmp_path_factory.mktemp("predict")
    model = filled(build_abstract_model(CONFIG.model), scale=0.3)
    run = RunDirectory(root / "run")
    run.claim(CONFIG, {"class_names": list(NAMES)})
    save_weights(run, weights_of(model))
    top_jax.save_torch_checkpoint(model, root / "vim.safetensors", class_names=NAMES)
    rng = np.random.default_rng(0)
    for channel, name in ((2, "blue"), (1, "green"), (0, "red")):
        for i in range(4):
            pixels = rng.integers(0, 120, (20, 24, 3)).astype(np.uint8)
            pixels[..., channel] += 120
            file = root / "photos" / name / "day" / f"{i}.{'tif' if i == 3 else 'png'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    (root / "photos" / "red" / "broken.jpg").write_bytes(b"no image")
    (root / "photos" / "red" / "notes.txt").write_text("no image")
    return root


def expected(place, file):
    """The three lines that the documentation gives."""
    model = top_jax.load_checkpoint(place / "run")
    data = CONFIG.data
    image = top_jax.preprocess(file, model.config.img_size, eval_crop=data.eval_crop, mean=data.mean, std=data.std)
    logits = np.asarray(model(image[None]), np.float64)[0]
    return np.exp(logits) / np.exp(logits).sum()


def test_a_run(command, place, tmp_path):
    files = [place / "photos" / "red" / "broken.jpg", place / "photos" / "blue" / "day" / "0.png"]
    out = tmp_path / "result.json"
    result = command("predict", f"--checkpoint={place / 'run'}", f"--json={out}", "--top_k=2", *map(str, files))
    assert result.status == 0 and result.out.count("\n") == 1
    content = json.loads(out.read_text())
    assert [entry["image"] for entry in content["unreadable"]] == [str(files[0])]
    [entry] = content["images"]
    probabilities = expected(place, files[1])
    best = np.argsort(-probabilities)[:2]
    assert [(found["class"], found["index"]) for found in entry["predictions"]] == [(NAMES[i], i) for i in best]
    np.testing.assert_allclose([found["probability"] for found in entry["predictions"]], probabilities[best], rtol=1e-4)
    shown = ", ".join(f"{NAMES[i]} {probabilities[i]:.1%}" for i in best)
    assert result.out == f"{files[1]}: {shown}\n"


def test_folders_patterns_and_a_file_with_weights(command, place):
    """A file has its own class names; an image that is named twice is classified once."""
    model = (
        "--model=vim_tiny",
        "--override=num_classes=3",
        *(f"--override={key}={value}" for key, value in SIZES.items()),
    )
    pattern = str(place / "photos" / "*" / "day" / "[01].png")
    flags = (f"--checkpoint={place / 'vim.safetensors'}", "--json=-", "--batch_size=4")
    result = command("predict", *flags, *model, str(place / "photos" / "blue"), pattern)
    content = json.loads(result.out)
    assert len(content["images"]) == 4 + 4 and not content["unreadable"]
    assert all({found["class"] for found in entry["predictions"]} == set(NAMES) for entry in content["images"])
    assert [round(sum(found["probability"] for found in entry["predictions"]), 5) for entry in content["images"]] == [
        1.0
    ] * 8


def test_features_and_the_probe(command, place, tmp_path, root, monkeypatch):
    """The documentation's probe separates three colours."""
    out = tmp_path / "features.npz"
    result = command("features", str(place / "photos"), f"--checkpoint={place / 'run'}", f"--output={out}")
    assert result.status == 0 and "12 images, 16 features each, 3 classes, 1 unreadable" in result.out
    with np.load(out) as arrays:
        data = dict(arrays)
    assert data["class_names"].tolist() == list(NAMES) and data["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data["files"][0] == "blue/day/0.png" and data["features"].dtype == np.float32
    model = top_jax.load_checkpoint(place / "run")
    image = top_jax.preprocess(
        place / "photos" / "blue" / "day" / "0.png", 16, eval_crop=1.0, mean=(0.4,) * 3, std=(0.3,) * 3
    )
    np.testing.assert_allclose(data["features"][0], model.pool(model.features(image[None]))[0], atol=1e-4)
    page = (root / "docs" / "guides" / "own_images.md").read_text()
    program = next(
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "LogisticRegression" in block
    )
    monkeypatch.chdir(tmp_path)
    printed = []
    exec(program, {"print": printed.append})
    assert printed[0] > 0.6


def test_refusals(refused, place, tmp_path):
    run, photo = f"--checkpoint={place / 'run'}", str(place / "photos" / "blue" / "day" / "0.png")
    assert "no image" in refused("predict", run)
    assert "nowhere.jpg" in refused("predict", run, "nowhere.jpg")
    assert "(1 tried)" in refused("predict", run, str(place / "photos" / "red" / "broken.jpg"))
    assert "--output=f.json" in refused("features", run, str(place / "photos"), "--output=f.json")
    assert "one folder" in refused("features", run, photo, f"--output={tmp_path}/f.npz")


def test_from_python(place, caplog):
    found = top_jax.predict(place / "run", [place / "photos" / "red"], top_k=1, batch_size=2)
    assert len(found) == 4 and all(len(result.classes) == 1 and result.classes[0] in NAMES for result in found)
    assert "broken.jpg" in caplog.text
    with pytest.raises(InputError, match="images"):
        top_jax.predict(place / "run", [])
    with pytest.raises(InputError, match="knows its model"):
        top_jax.predict(place / "run", place / "photos", model="vim_tiny")


def test_names_where_none_are_kept(place, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.claim(dataclasses.replace(CONFIG))
    save_weights(run, weights_of(filled(build_abstract_model(CONFIG.model), scale=0.3)))
    [result] = top_jax.predict(run.path, place / "photos" / "blue" / "day" / "0.png")
    assert set(result.classes) == {"class 0", "class 1", "class 2"}

"""Class names of weights, and data facts of a run: kept, compared, and put into the data's order."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from small_models import filled

import top_jax
from top_jax.build import build_abstract_model
from top_jax.config import ModelConfig, RunConfig
from top_jax.convert.checkpoint_files import read_class_names
from top_jax.errors import InputError
from top_jax.models.weights import weights_of
from top_jax.training.class_names import class_order, imagenet_synsets, in_order_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.saved_weights import find_weights, initial_weights
from top_jax.training.weights import save_weights

MODEL = ModelConfig(num_classes=3, img_size=(8,), patch_size=4, embed_dim=16, depth=1, d_state=4)
NAMES = ("blue", "green", "red")
MOVED = ("red", "blue", "green")


@pytest.fixture(scope="module")
def model():
    return filled(build_abstract_model(MODEL), scale=0.3)


@pytest.fixture(scope="module", params=["run", "file.safetensors", pytest.param("file.pth", marks=pytest.mark.torch)])
def checkpoint(request, model, tmp_path_factory):
    """The same weights and names in each form."""
    path = tmp_path_factory.mktemp("kept") / request.param
    if path.suffix:
        top_jax.save_torch_checkpoint(model, path, class_names=NAMES)
    else:
        run = RunDirectory(path)
        run.claim(RunConfig(model=MODEL), {"class_names": list(NAMES)})
        save_weights(run, weights_of(model))
    return path


def test_names_are_kept_and_mapped(checkpoint, model, caplog):
    saved, weights = find_weights(checkpoint), weights_of(model)
    assert saved.class_names(3) == NAMES and saved.class_names(4) is None
    as_they_are, same = saved.for_model(MODEL), saved.for_model(MODEL, class_names=NAMES)
    jax.tree.map(np.testing.assert_array_equal, as_they_are, weights)
    jax.tree.map(np.testing.assert_array_equal, same, weights)
    assert not caplog.text
    moved = saved.for_model(MODEL, class_names=MOVED)
    for name, array in moved["head"].items():
        np.testing.assert_array_equal(array, np.asarray(weights["head"][name])[..., [2, 0, 1]])
    del moved["head"]
    jax.tree.map(np.testing.assert_array_equal, moved, {name: weights[name] for name in moved})
    assert "class 0 is 'blue' there and 'red' here" in caplog.text


def test_other_classes_are_refused(checkpoint):
    for names in (("a_red", "blue", "green"), ("blue", "green", "Red")):
        with pytest.raises(InputError, match=r"only there: 'red'; only here: '(a_red|Red)'"):
            find_weights(checkpoint).for_model(MODEL, class_names=names)
    run = RunConfig(model=MODEL, init_from=str(checkpoint))
    with pytest.raises(InputError, match="class 2 is 'red' there and 'white' here"):
        initial_weights(run, ("blue", "green", "white"))


def test_repeated_names(model, tmp_path):
    """They are kept; which of two logits a name means cannot be known, so another order is refused."""
    kept = ("crane", "maillot", "crane")
    file = tmp_path / "twice.safetensors"
    top_jax.save_torch_checkpoint(model, file, class_names=kept)
    assert find_weights(file).class_names(3) == kept
    assert class_order(kept, kept=kept, origin=file) is None
    with pytest.raises(InputError, match="class 1 is 'maillot' there and 'crane' here"):
        class_order(("crane", "crane", "maillot"), kept=kept, origin=file)


@pytest.mark.parametrize(
    ("kept", "names", "warned"),
    [
        (None, NAMES, False),
        (("0", "1", "2"), NAMES, True),
        (imagenet_synsets()[:3], NAMES, True),
        (("0", "1", "2"), ("0", "1", "2"), False),
    ],
)
def test_what_cannot_be_compared(kept, names, warned, caplog):
    """Numbers, WordNet ids and words say nothing about each other: a warning, once."""
    assert in_order_of(names, {}, kept=kept, origin="runs/a") == {}
    assert len(caplog.records) == warned


def test_official_weights_have_imagenets_classes(tmp_path):
    synsets = imagenet_synsets()
    assert len(synsets) == len(set(synsets)) == 1000 and list(synsets) == sorted(synsets)
    assert (synsets[0], synsets[281], synsets[-1]) == ("n01440764", "n02123045", "n15075141")
    file = tmp_path / "official.safetensors"
    imagenet = filled(build_abstract_model(dataclasses.replace(MODEL, num_classes=1000)), scale=0.3)
    top_jax.save_torch_checkpoint(imagenet, file)
    assert read_class_names(file) is None
    saved = find_weights(file)
    assert saved.class_names(1000) == synsets and saved.class_names(3) is None
    with pytest.raises(InputError, match="only there: 'n01440764'; only here: 'n00000001'"):
        in_order_of(("n00000001", *synsets[1:]), {}, kept=saved.class_names(1000), origin=file)


def test_wrong_number_of_names(model, tmp_path):
    with pytest.raises(InputError, match="2 class_names for a model of 3"):
        top_jax.save_torch_checkpoint(model, tmp_path / "a.safetensors", class_names=NAMES[:2])


def facts(train=12, evaluation=9, names=NAMES):
    splits = {"train": {"name": "a/train", "images": train}, "eval": {"name": "a/val", "images": evaluation}}
    return {**splits, "class_names": list(names)}


@pytest.fixture
def started(tmp_path):
    """A run with a checkpoint, and the facts of its data."""
    run = RunDirectory(tmp_path / "run")
    run.claim(RunConfig(model=MODEL), facts())
    (run.checkpoints / "latest" / "3").mkdir(parents=True)
    return run


def test_changed_data_is_another_run(started):
    config = RunConfig(model=MODEL)
    started.check_same_run(config, facts())
    for changed, message in (
        (facts(train=13), "12 images to train on then, 13 now"),
        (facts(evaluation=8), "9 images to evaluate then, 8 now"),
        (facts(names=(*NAMES, "white")), "3 classes then, 4 now; class 3 is absent there and 'white' here"),
        (facts(names=MOVED), "class 0 is 'blue' there and 'red' here"),
    ):
        with pytest.raises(InputError, match=message):
            started.check_same_run(config, changed)
        with pytest.raises(InputError, match=message):
            started.claim(config, changed)
    assert started.read_json("data.json") == facts()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"train": 3}', '{"class_names": [1]}', "[" * 100_000])
def test_damaged_data_facts(started, content, caplog):
    """They are written again at the next start; what cannot be compared is not."""
    (started.path / "data.json").write_text(content)
    assert started.class_names() is None
    if '"class_names"' in content:
        assert "the order of the classes cannot be checked" in caplog.text
    else:
        started.claim(RunConfig(model=MODEL), facts())
        assert started.class_names() == NAMES


def test_old_runs_have_none(started):
    (started.path / "data.json").unlink()
    started.claim(RunConfig(model=MODEL), facts(train=99))
    assert json.loads((started.path / "data.json").read_text())["train"]["images"] == 99

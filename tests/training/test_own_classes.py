"""A new classifier, another resolution, a frozen backbone and rates by depth: fine-tuning on one's own classes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import top_jax
from top_jax.build import build_model
from top_jax.config import ModelConfig, RunConfig
from top_jax.convert.position_embedding import resize_position_embedding
from top_jax.errors import InputError
from top_jax.models.weights import weights_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.weights import checkpoint_weights, initial_weights, save_weights

MODEL = ModelConfig(num_classes=5, img_size=(8,), patch_size=4, embed_dim=16, depth=1, d_state=4)
THREE = dataclasses.replace(MODEL, num_classes=3)


@pytest.fixture(scope="module")
def model():
    return build_model(MODEL, rngs=nnx.Rngs(9))


@pytest.fixture(scope="module", params=["run", "file.safetensors"])
def checkpoint(request, model, tmp_path_factory):
    """The same weights as a run and as a file, with the names of their classes."""
    path = tmp_path_factory.mktemp("five") / request.param
    if path.suffix:
        top_jax.save_torch_checkpoint(model, path, class_names=tuple("abcde"))
    else:
        run = RunDirectory(path)
        run.claim(RunConfig(model=MODEL), {"class_names": list("abcde")})
        save_weights(run, weights_of(model))
    return path


def equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_new_head(checkpoint, model):
    """All but the classifier is the checkpoint's; the classifier follows the run's seed and has no mapping."""
    start = lambda seed, **c: initial_weights(RunConfig(seed=seed, init_from=str(checkpoint), **c), ("x", "y", "z"))  # noqa: E731
    first, again, other = (start(seed, model=THREE, init_head="new") for seed in (0, 0, 1))
    equal(first, again)
    assert first["head"]["kernel"].shape == (16, 3) and not np.any(first["head"]["bias"])
    assert np.any(np.asarray(first["head"]["kernel"]) != np.asarray(other["head"]["kernel"]))
    assert 0.01 < np.std(first["head"]["kernel"]) < 0.03  # trunc_normal's 0.02
    kept = weights_of(model)
    equal({**first, "head": 0}, {**kept, "head": 0})
    same_count = checkpoint_weights(checkpoint, MODEL, class_names=tuple("vwxyz"), head="new")
    assert np.any(np.asarray(same_count["head"]["kernel"]) != np.asarray(kept["head"]["kernel"]))


def test_without_it_other_classes_are_refused(checkpoint):
    with pytest.raises(InputError, match="(?s)5 classes.* 3.*init_head=new"):
        initial_weights(RunConfig(model=THREE, init_from=str(checkpoint)))
    with pytest.raises(InputError, match="init_head='other'.*load or new"):
        RunConfig(init_head="other")
    with pytest.raises(InputError, match="head='fresh'.*load, new"):
        checkpoint_weights(checkpoint, THREE, head="fresh")


@pytest.mark.parametrize("size", [(16,), (8, 12)])
def test_another_resolution(checkpoint, model, size, caplog):
    weights = checkpoint_weights(checkpoint, dataclasses.replace(MODEL, img_size=size))
    grid = (size[0] // 4, size[-1] // 4)
    kept = weights_of(model)
    resized = resize_position_embedding(np.asarray(kept["pos_embed"]), (2, 2), grid, class_token="middle")
    equal(weights, {**kept, "pos_embed": resized})
    assert "2 x 2" in caplog.text and f"{grid[0]} x {grid[1]}" in caplog.text


def test_a_file_of_another_model_says_so(checkpoint):
    """A new classifier excuses nothing else."""
    with pytest.raises(InputError, match="blocks|layers"):
        checkpoint_weights(checkpoint, dataclasses.replace(THREE, depth=2), head="new")

"""The teacher of a run: loaded before anything is written, kept by the run, and the same at every start."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from small_models import filled

from top_jax.build import build_abstract_model
from top_jax.config import DistillationConfig, ModelConfig, PruningConfig, RunConfig
from top_jax.errors import InputError
from top_jax.models.weights import weights_of
from top_jax.training.prepare import make_plan
from top_jax.training.run_directory import RunDirectory
from top_jax.training.saved_weights import teacher_weights
from top_jax.training.weights import keep_teacher, save_weights

MODEL = ModelConfig(
    name="plain_mamba_l1", num_classes=3, img_size=(8,), patch_size=4, embed_dim=16, depth=2, d_state=4, drop_path=0.2
)


@pytest.fixture(scope="module")
def weights():
    """The dense model's weights, changed so that no seed gives them."""
    weights = weights_of(filled(build_abstract_model(MODEL), scale=0.3))
    weights["head"]["bias"] = weights["head"]["bias"] + 2
    weights["patch_embed"]["stem"]["norm"]["mean"] = weights["patch_embed"]["stem"]["norm"]["mean"] + 3
    return weights


@pytest.fixture
def source(tmp_path, weights):
    """The run directory of the dense model."""
    run = RunDirectory(tmp_path / "dense")
    run.claim(RunConfig(model=dataclasses.replace(MODEL, drop_path=None)))
    save_weights(run, weights)
    return run.path


def config_of(source, **model):
    return RunConfig(
        model=dataclasses.replace(MODEL, **model),
        pruning=PruningConfig(after_blocks=(1,), keep_ratio=(0.5,)),
        distillation=DistillationConfig(teacher=str(source)),
    )


def assert_bit_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_a_run_keeps_its_teacher(tmp_path, source, weights):
    config, run = config_of(source), RunDirectory(tmp_path / "run")
    loaded = teacher_weights(run, config)
    assert loaded is not None and not run.path.exists()
    run.claim(config)
    keep_teacher(run, loaded)
    kept = teacher_weights(run, config)
    assert_bit_equal(kept, weights)
    teacher = nnx.merge(make_plan(config, 100).teacher, kept)
    assert teacher.schedule == () and teacher.config.embed_dim == 16

    shutil.rmtree(source)  # a later start needs no source, and would not look at another one
    again = RunDirectory(run.path)
    assert_bit_equal(teacher_weights(again, config), weights)
    again.claim(config)
    with pytest.raises(InputError, match=r"distillation\.teacher"):
        again.claim(config_of(tmp_path / "other"))


def test_a_start_that_was_killed_before_it_kept_it(tmp_path, source, weights):
    """Orbax names a checkpoint when it is whole: half of one is none."""
    config, run = config_of(source), RunDirectory(tmp_path / "run")
    (run.checkpoints / "teacher" / "0.orbax-checkpoint-tmp-1").mkdir(parents=True)
    loaded = teacher_weights(run, config)
    run.claim(config)
    keep_teacher(run, loaded)
    assert_bit_equal(teacher_weights(run, config), weights)


def test_no_teacher(tmp_path):
    assert teacher_weights(RunDirectory(tmp_path / "run"), RunConfig(model=MODEL)) is None


def test_what_is_refused_before_anything_is_written(tmp_path, source):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(InputError, match="distillation.teacher.*nowhere"):
        teacher_weights(run, config_of(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="3 classes.* 4"):
        teacher_weights(run, config_of(source, num_classes=4))
    with pytest.raises(InputError, match="another model"):
        teacher_weights(run, config_of(source, embed_dim=32))
    assert not run.path.exists()

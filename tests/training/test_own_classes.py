"""A new classifier, another resolution, a frozen backbone and rates by depth: fine-tuning on one's own classes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small_models import filled

import top_jax
from top_jax.build import build_abstract_model
from top_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig
from top_jax.convert.position_embedding import resize_position_embedding
from top_jax.errors import InputError
from top_jax.models.weights import split_weights, statistics_of, weights_of
from top_jax.training.optimizer import depth_scales, make_optimizer
from top_jax.training.prepare import prepare
from top_jax.training.run_directory import RunDirectory
from top_jax.training.saved_weights import find_weights, initial_weights
from top_jax.training.steps import create_state, make_train_step
from top_jax.training.weights import save_weights

MODEL = ModelConfig(num_classes=5, img_size=(8,), patch_size=4, embed_dim=16, depth=1, d_state=4)
THREE = dataclasses.replace(MODEL, num_classes=3)


@pytest.fixture(scope="module")
def model():
    return filled(build_abstract_model(MODEL), scale=0.3)


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
    same_count = find_weights(checkpoint).for_model(MODEL, class_names=tuple("vwxyz"), head="new")
    assert np.any(np.asarray(same_count["head"]["kernel"]) != np.asarray(kept["head"]["kernel"]))


def test_without_it_other_classes_are_refused(checkpoint):
    with pytest.raises(InputError, match="(?s)5 classes.* 3.*init_head=new"):
        initial_weights(RunConfig(model=THREE, init_from=str(checkpoint)))
    with pytest.raises(InputError, match="init_head='other'.*load or new"):
        RunConfig(init_head="other")
    with pytest.raises(InputError, match="head='fresh'.*load, new"):
        find_weights(checkpoint).for_model(THREE, head="fresh")


@pytest.mark.parametrize("size", [(16,), (8, 12)])
def test_another_resolution(checkpoint, model, size, caplog):
    weights = find_weights(checkpoint).for_model(dataclasses.replace(MODEL, img_size=size))
    grid = (size[0] // 4, size[-1] // 4)
    kept = weights_of(model)
    resized = resize_position_embedding(np.asarray(kept["pos_embed"]), (2, 2), grid, class_token="middle")
    equal(weights, {**kept, "pos_embed": resized})
    assert "2 x 2" in caplog.text and f"{grid[0]} x {grid[1]}" in caplog.text


def test_a_file_of_another_model_says_so(checkpoint):
    """A new classifier excuses nothing else."""
    with pytest.raises(InputError, match="blocks|depth=2"):
        find_weights(checkpoint).for_model(dataclasses.replace(THREE, depth=2), head="new")


def test_rates_by_depth():
    """BEiT's: head and final norm 1, last block the factor, stem the factor to the power of depth + 1."""
    params = nnx.to_pure_dict(nnx.state(top_jax.models.abstract_model("vim_tiny", img_size=32, depth=2), nnx.Param))
    leaves = jax.tree_util.tree_leaves_with_path(depth_scales(params, 0.5))
    found = {jax.tree_util.keystr(path[: 1 + (path[0].key == "blocks")]): scale for path, scale in leaves}
    assert found == {
        **dict.fromkeys(("['patch_embed']", "['pos_embed']", "['cls_token']"), 0.125),
        **{"['blocks'][0]": 0.25, "['blocks'][1]": 0.5, "['norm']": 1.0, "['head']": 1.0},
    }
    optimizers = [make_optimizer(OptimizerConfig(layer_decay=rate), lambda step: 0.1) for rate in (None, 1.0, 0.5)]
    small = {name: {"kernel": np.ones((2, 2), np.float32)} for name in ("head", "patch_embed")}
    small = {**small, "blocks": {0: {"kernel": np.ones((2, 2), np.float32)}}}
    plain, same, scaled = (optimizer.update(small, optimizer.init(small), small)[0] for optimizer in optimizers)
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    for name, factor in (("head", 1.0), ("patch_embed", 0.25)):
        np.testing.assert_allclose(scaled[name]["kernel"], factor * plain[name]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(scaled["blocks"][0]["kernel"], 0.5 * plain["blocks"][0]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("settings", [{"layer_decay": 0.0}, {"layer_decay": 1.1}])
def test_impossible_rates(settings):
    with pytest.raises(InputError, match="layer_decay"):
        OptimizerConfig(**settings)


def test_a_frozen_backbone():
    """Only the head changes, and only it has optimizer state, in a model with drop-path and BatchNorm."""
    config = RunConfig(
        model=dataclasses.replace(MODEL, name="plain_mamba_l1", layers_with_dwconv=(0,), drop_path=0.5),
        optimizer=OptimizerConfig(freeze_backbone=True, layer_decay=0.5, weight_decay=0.5, clip_norm=1.0),
        data=DataConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    )
    model = filled(build_abstract_model(config.model), scale=0.3)
    params, stats = split_weights(weights_of(model), like=statistics_of(model))
    optimizer = make_optimizer(config.optimizer, lambda step: 0.1)
    state = create_state(params, stats, optimizer, seed=0, with_ema=False)
    of_head = sum(leaf.size for leaf in jax.tree.leaves(params["head"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * of_head + 2  # two moments, two counts
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 255, (4, 8, 8, 3)).astype(np.uint8),
        "label": np.arange(4, dtype=np.int32),
        "mask": np.ones(4, np.float32),
        "index": np.arange(4, dtype=np.int32),
    }
    new, metrics = jax.jit(make_train_step(nnx.graphdef(model), optimizer, config))(state, batch)
    equal({**new.params, "head": 0}, {**params, "head": 0})
    equal(new.stats, stats)
    assert np.all(np.asarray(new.params["head"]["kernel"]) != np.asarray(params["head"]["kernel"]))
    assert metrics["grad_norm"] > 0


def test_a_frozen_random_backbone_is_refused(tmp_path):
    model = dataclasses.replace(MODEL, num_classes=10)
    config = RunConfig(model=model, optimizer=OptimizerConfig(freeze_backbone=True))
    with pytest.raises(InputError, match="freeze_backbone.*init_from"):
        prepare(config, RunDirectory(tmp_path))


def test_sizes_of_the_evaluation_split_are_compared_before_a_run(tmp_path):
    """A photograph and a label map of different sizes are found before anything is written or trained."""
    for kind, size in (("images", (8, 9)), ("annotations", (8, 8))):
        for split in ("train", "val"):
            (tmp_path / kind / split).mkdir(parents=True)
            side = size if split == "val" else (8, 8)
            Image.new("L", side).save(tmp_path / kind / split / "photo.png")
    data = DataConfig(source="segmentation_folder", data_dir=str(tmp_path), eval_split="val", num_classes=2)
    config = RunConfig(
        model=ModelConfig(head="uper", num_classes=2), data=data, optimizer=OptimizerConfig(label_smoothing=0.0)
    )
    with pytest.raises(InputError, match="val.photo.png has 8 x 9 pixels.*8 x 8"):
        prepare(config, RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run").exists()

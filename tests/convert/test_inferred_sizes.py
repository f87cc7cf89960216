"""Sizes read off the shapes of official weights."""

from __future__ import annotations

import dataclasses
import gzip
import json

import numpy as np
import pytest
from small_models import filled

import top_jax
from top_jax.convert import state_dict_of
from top_jax.convert.inferred_sizes import infer_model
from top_jax.convert.key_maps import official_keys
from top_jax.errors import InputError
from top_jax.models import MODELS, abstract_model, model_config
from top_jax.models.weights import variables_by_path

VIM = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, d_state=4, d_conv=3, expand=3, num_classes=5)
PLAIN = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, d_state=4, d_conv=5, num_classes=5)
DEIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, mlp_ratio=2.0, num_classes=5)


def shapes_of(name, **overrides):
    """Shapes of a model's weights by official name."""
    model = abstract_model(name, **overrides)
    weights = variables_by_path(model)
    return {key.torch: key.layout.torch_shape(weights[key.ours].shape) for key in official_keys(model.config)}


@pytest.mark.parametrize(
    "name, sizes, needed",
    [
        ("vim_tiny", VIM, {}),
        ("plain_mamba_l1", PLAIN | {"layers_with_dwconv": (0, 2), "num_convs_patch_embed": 2}, {}),
        ("plain_mamba_l1", PLAIN | {"layers_with_dwconv": (), "num_convs_patch_embed": 0}, {}),
        ("deit_tiny", DEIT | {"num_heads": 4}, {"num_heads": 4}),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_sizes_of_a_small_model(name, sizes, needed, named):
    want = model_config(name, **sizes)
    found, overrides = infer_model(shapes_of(name, **sizes), name if named else None, needed)
    assert dataclasses.replace(model_config(found, **overrides), drop_path=0.0) == want
    assert type(MODELS[found]) is type(MODELS[name])


def test_named_models_need_nothing(fixtures):
    """The shapes of the official models, listed by the official code."""
    official = json.loads(gzip.decompress((fixtures / "official_models.json.gz").read_bytes()))
    for name, listed in official.items():
        shapes = {key: tuple(shape) for key, shape in listed["state_dict"].items()}
        assert infer_model(shapes, None, {}) == infer_model(shapes, name, {}) == (name, {})
        head = "head.fc.weight" if "mamba" in name else "head.weight"
        wrapped = {f"module.model.{key}": shape for key, shape in shapes.items()}
        wrapped[f"module.model.{head}"] = (3, shapes[head][1])
        assert infer_model(wrapped, None, {}) == (name, {"num_classes": 3})
    with pytest.raises(InputError, match="sizes of vim_small, but vim_tiny"):
        infer_model({key: tuple(shape) for key, shape in official["vim_small"]["state_dict"].items()}, "vim_tiny", {})


def test_what_is_asked_for_must_agree():
    shapes = shapes_of("vim_tiny", **VIM)
    for key, wrong in (("depth", 2), ("d_state", 16), ("expand", 2), ("patch_size", 16), ("embed_dim", 16)):
        with pytest.raises(InputError, match=f"{key}={VIM[key]}, but the model has {key}={wrong}"):
            infer_model(shapes, "vim_tiny", {key: wrong})
    assert infer_model(shapes, "vim_tiny", {"num_classes": 7})[1]["num_classes"] == 7  # the head's check decides
    with pytest.raises(InputError, match="num_heads"):
        infer_model(shapes_of("deit_tiny", **DEIT, num_heads=4), "deit_tiny", {})
    with pytest.raises(InputError, match="no known family"):
        infer_model({"a": (1,)}, None, {})
    assert infer_model(shapes, "deit_tiny", {}) == ("deit_tiny", {})  # the keys' check says what is wrong


@pytest.mark.parametrize(
    "name, trained, given, found",
    [
        ("vim_tiny", {"img_size": 384}, {}, {"img_size": (384, 384)}),  # no stride gives 24 x 24 patches at 224
        ("vim_tiny", {"stride": 8}, {}, {}),  # or 432 pixels at stride 16
        ("vim_tiny", {"img_size": 112, "stride": 8}, {"stride": 8}, {"stride": 8, "img_size": (112, 112)}),
        ("deit_base", {"img_size": 384}, {}, {"img_size": (384, 384)}),
        ("deit_base", {"img_size": 384}, {"img_size": 224}, {"img_size": 224}),
        ("plain_mamba_l1", {"img_size": 384}, {}, {"img_size": (384, 384)}),
        ("vim_tiny", {"img_size": (224, 448)}, {}, {}),
    ],
)
def test_image_size_behind_the_positions(name, trained, given, found):
    shapes = (
        shapes_of(name, depth=1, layers_with_dwconv=(), **trained)
        if "mamba" in name
        else shapes_of(name, depth=1, **trained)
    )
    assert infer_model(shapes, name, given)[1].items() - {("depth", 1), ("layers_with_dwconv", ())} == found.items()


def test_files_need_no_sizes(tmp_path):
    model = filled(abstract_model("vim_tiny", **{**VIM, "img_size": 24}), scale=0.3)
    top_jax.save_torch_checkpoint(model, tmp_path / "a.safetensors")
    for name in ((), ("vim_tiny",)):
        again = top_jax.load_torch_checkpoint(tmp_path / "a.safetensors", *name)
        assert again.config == model.config
        for key, array in state_dict_of(model).items():
            np.testing.assert_array_equal(state_dict_of(again)[key], array)
    # 24 pixels hold whole patches of the file, though not of the named model.
    sized = top_jax.load_torch_checkpoint(tmp_path / "a.safetensors", "vim_tiny", img_size=model.config.img_size)
    assert sized.config == model.config

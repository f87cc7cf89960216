from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from top_jax.convert import load_state_dict
from top_jax.convert.keys import CONV2D, DEPTHWISE_CONV1D, LINEAR, SAME, vim_keys
from top_jax.convert.position_embedding import resize_position_embedding
from top_jax.errors import InputError
from top_jax.models import abstract_model


def parameters(model):
    return {path: np.asarray(param[...]) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize(
    "layout, shape, turned",
    [
        (SAME, (2, 3), (2, 3)),
        (LINEAR, (2, 3), (3, 2)),
        (CONV2D, (2, 3, 4, 5), (4, 5, 3, 2)),
        (DEPTHWISE_CONV1D, (5, 1, 4), (4, 5)),
    ],
)
def test_layouts_turn_both_ways(layout, shape, turned):
    array = np.arange(np.prod(shape)).reshape(shape)
    ours = layout.to_ours(array)
    assert ours.shape == turned
    np.testing.assert_array_equal(layout.to_torch(ours), array)


def test_everything_is_loaded_and_comes_back(model, state_dict):
    load_state_dict(model, state_dict)
    loaded = parameters(model)
    assert len(loaded) == len(state_dict)
    for key in vim_keys(model.config.depth):
        np.testing.assert_array_equal(key.layout.to_torch(loaded[key.ours]), state_dict[key.torch])
    # One by hand, so that a layout wrong in both directions shows.
    kernel = model.blocks[1].mixer.backward.conv_kernel[...]
    np.testing.assert_array_equal(kernel[3], state_dict["layers.1.mixer.conv1d_b.weight"][:, 0, 3])
    np.testing.assert_array_equal(model.head.kernel[:, 2], state_dict["head.weight"][2])


def test_keys_and_paths_are_one_to_one(model):
    keys = vim_keys(model.config.depth)
    assert len({key.torch for key in keys}) == len({key.ours for key in keys}) == len(keys)


def test_half_precision_becomes_float32(model, state_dict):
    load_state_dict(model, {name: array.astype(np.float16) for name, array in state_dict.items()})
    assert {array.dtype for array in parameters(model).values()} == {np.dtype(np.float32)}


def test_missing(model, state_dict):
    del state_dict["layers.0.mixer.A_b_log"], state_dict["norm_f.weight"]
    with pytest.raises(InputError, match=r"2 missing \(layers.0.mixer.A_b_log, norm_f.weight\)\. Choose the model"):
        load_state_dict(model, state_dict)


def test_unexpected(model, state_dict):
    state_dict["rope.freqs_cos"] = np.zeros(3, np.float32)
    with pytest.raises(InputError, match=r"^1 unexpected \(rope.freqs_cos\)"):
        load_state_dict(model, state_dict)


def test_misshapen(model, state_dict):
    state_dict["layers.1.mixer.D"] = np.zeros(7, np.float32)
    with pytest.raises(InputError, match=r"^1 misshapen \(layers.1.mixer.D \(7,\) instead of \(32,\)\)"):
        load_state_dict(model, state_dict)


def test_every_problem_is_told_at_once_and_nothing_is_loaded(model, state_dict):
    del state_dict["cls_token"]
    state_dict["head.bias"] = np.zeros((1, 3), np.float32)
    state_dict["extra"] = np.zeros(1, np.float32)
    with pytest.raises(InputError, match="1 missing .*; 1 unexpected .*; 1 misshapen "):
        load_state_dict(model, state_dict)
    assert isinstance(model.norm.scale.get_value(), jax.ShapeDtypeStruct)


def test_long_lists_are_cut(model, state_dict):
    state_dict = {name: array for name, array in state_dict.items() if not name.startswith("layers.1.")}
    with pytest.raises(InputError, match=r"17 missing \((layers.1[\w.]+, ){5}and 12 more\)"):
        load_state_dict(model, state_dict)


def test_another_number_of_classes(state_dict, tiny):
    model = abstract_model("vim_tiny", **{**tiny, "num_classes": 10})
    with pytest.raises(InputError, match=r"head.weight \(3, 16\) instead of \(10, 16\), head.bias \(3,\) instead of"):
        load_state_dict(model, state_dict)


# torch.nn.functional.interpolate(arange(9)**2 as 3 x 3, size=(2, 4), mode="bicubic", align_corners=False), 2.13.0
GRID = np.arange(9, dtype=np.float32).reshape(3, 3) ** 2
TORCH_BICUBIC = np.array([[0.93563, 2.00833, 4.96921, 7.68448], [29.34854, 36.25828, 48.34427, 56.89657]], np.float32)


def test_resize_is_torch_bicubic():
    embedding = np.stack([GRID.ravel(), -2 * GRID.ravel()], axis=-1)[None]
    got = resize_position_embedding(embedding, (3, 3), (2, 4), class_token=False)
    assert got.shape == (1, 8, 2) and got.dtype == np.float32
    np.testing.assert_allclose(got[0, :, 0].reshape(2, 4), TORCH_BICUBIC, rtol=1e-5)
    np.testing.assert_allclose(got[0, :, 1], -2 * got[0, :, 0], rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize(
    "source, target", [((14, 14), (24, 24)), ((14, 14), (7, 10)), ((3, 5), (5, 3)), ((1, 2), (3, 3))]
)
def test_resize_against_torch(source, target):
    import torch

    patches = np.random.default_rng(0).normal(size=(1, source[0] * source[1], 6)).astype(np.float32)
    grid = torch.from_numpy(patches).reshape(1, *source, 6).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(grid, size=target, mode="bicubic", align_corners=False)
    want = want.permute(0, 2, 3, 1).reshape(1, -1, 6).numpy()
    got = resize_position_embedding(patches, source, target, class_token=False)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_class_token_is_taken_from_the_middle():
    patches = np.random.default_rng(0).normal(size=(1, 9, 6)).astype(np.float32)
    cls = np.full((1, 1, 6), 1e6, np.float32)
    embedding = np.concatenate([patches[:, :4], cls, patches[:, 4:]], axis=1)
    got = resize_position_embedding(embedding, (3, 3), (4, 5), class_token=True)
    np.testing.assert_array_equal(got[:, 10], cls[:, 0])
    want = resize_position_embedding(patches, (3, 3), (4, 5), class_token=False)
    np.testing.assert_array_equal(np.delete(got, 10, axis=1), want)


def test_equal_grids_are_left_alone():
    embedding = np.ones((1, 10, 6), np.float32)
    assert resize_position_embedding(embedding, (3, 3), (3, 3), class_token=True) is embedding


def test_loading_resizes_to_the_model(state_dict, tiny):
    model = abstract_model("vim_tiny", **{**tiny, "img_size": (8, 24)})
    load_state_dict(model, state_dict)
    want = resize_position_embedding(state_dict["pos_embed"], (4, 4), (2, 6), class_token=True)
    np.testing.assert_array_equal(model.pos_embed[...], want)


def test_a_grid_that_is_not_square_must_be_told(state_dict, tiny):
    state_dict["pos_embed"] = state_dict["pos_embed"][:, :16]  # 15 patches: 3 x 5
    model = abstract_model("vim_tiny", **tiny)
    with pytest.raises(InputError, match="15 patch tokens, which is no 3 x 3 grid; pass checkpoint_img_size"):
        load_state_dict(model, state_dict)
    with pytest.raises(InputError, match="15 patch tokens, which is no 4 x 5 grid"):
        load_state_dict(model, state_dict, checkpoint_img_size=(16, 20))
    load_state_dict(model, state_dict, checkpoint_img_size=(12, 20))
    want = resize_position_embedding(state_dict["pos_embed"], (3, 5), (4, 4), class_token=True)
    np.testing.assert_array_equal(model.pos_embed[...], want)


def test_as_many_patches_in_another_shape(state_dict, tiny):
    model = abstract_model("vim_tiny", **{**tiny, "img_size": (8, 32)})
    load_state_dict(model, state_dict, checkpoint_img_size=16)
    want = resize_position_embedding(state_dict["pos_embed"], (4, 4), (2, 8), class_token=True)
    np.testing.assert_array_equal(model.pos_embed[...], want)


def test_resizing_does_not_hide_another_width(state_dict, tiny):
    state_dict["pos_embed"] = state_dict["pos_embed"][:, :, :8]
    model = abstract_model("vim_tiny", **{**tiny, "img_size": 32})
    with pytest.raises(InputError, match=r"pos_embed \(1, 65, 8\) instead of \(1, 65, 16\)"):
        load_state_dict(model, state_dict)

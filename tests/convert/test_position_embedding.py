"""Position embeddings for another image size: torch's bicubic, the class token kept in its place."""

from __future__ import annotations

import numpy as np
import pytest

from top_jax.convert import load_state_dict, load_torch_checkpoint, position_embedding
from top_jax.convert.key_maps import family_of
from top_jax.convert.position_embedding import (
    check_official_stride,
    fit_position_embedding,
    resize_position_embedding,
)
from top_jax.errors import InputError
from top_jax.models import abstract_model, model_config

# torch.nn.functional.interpolate(arange(9)**2 as 3 x 3, size=(2, 4), mode="bicubic", align_corners=False), 2.13.0
GRID = np.arange(9, dtype=np.float32).reshape(3, 3) ** 2
TORCH_BICUBIC = np.array([[0.93563, 2.00833, 4.96921, 7.68448], [29.34854, 36.25828, 48.34427, 56.89657]], np.float32)


def test_resize_is_torch_bicubic():
    embedding = np.stack([GRID.ravel(), -2 * GRID.ravel()], axis=-1)[None]
    got = resize_position_embedding(embedding, (3, 3), (2, 4), class_token=None)
    assert got.shape == (1, 8, 2) and got.dtype == np.float32
    np.testing.assert_allclose(got[0, :, 0].reshape(2, 4), TORCH_BICUBIC, rtol=1e-5)
    np.testing.assert_allclose(got[0, :, 1], -2 * got[0, :, 0], rtol=1e-6)


def place_of(class_token, patches):
    return {"first": 0, "middle": patches // 2}[class_token]


@pytest.mark.torch
@pytest.mark.parametrize("class_token", [None, "first", "middle"])
@pytest.mark.parametrize(
    "source, target", [((14, 14), (24, 24)), ((14, 14), (7, 10)), ((3, 5), (5, 3)), ((1, 2), (3, 3)), ((8, 4), (4, 2))]
)
def test_resize_against_torch(source, target, class_token):
    import torch

    def torch_resized(patches):
        grid = torch.from_numpy(patches).reshape(1, *source, -1).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(grid, size=target, mode="bicubic", align_corners=False)
        return resized.permute(0, 2, 3, 1).reshape(1, target[0] * target[1], -1).numpy()

    patches = np.random.default_rng(0).normal(size=(1, source[0] * source[1], 6)).astype(np.float32)
    embedding, want = patches, torch_resized(patches)
    if class_token:
        cls = np.full(6, 1e6, np.float32)  # would show in any patch that it leaks into
        embedding = np.insert(patches, place_of(class_token, patches.shape[1]), cls, axis=1)
        want = np.insert(want, place_of(class_token, want.shape[1]), cls, axis=1)
    got = resize_position_embedding(embedding, source, target, class_token=class_token)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("class_token", ["first", "middle"])
def test_class_token_keeps_its_place(class_token):
    """Checks the same without torch, bit for bit."""
    patches = np.random.default_rng(0).normal(size=(1, 9, 6)).astype(np.float32)
    cls = np.full((1, 6), 1e6, np.float32)
    embedding = np.insert(patches, [place_of(class_token, 9)], cls, axis=1)
    got = resize_position_embedding(embedding, (3, 3), (4, 5), class_token=class_token)
    np.testing.assert_array_equal(got[:, place_of(class_token, 20)], cls)
    want = resize_position_embedding(patches, (3, 3), (4, 5), class_token=None)
    np.testing.assert_array_equal(np.delete(got, place_of(class_token, 20), axis=1), want)


def test_equal_grids_are_left_alone():
    embedding = np.ones((1, 10, 6), np.float32)
    assert resize_position_embedding(embedding, (3, 3), (3, 3), class_token="middle") is embedding


PLACES = {"vim_tiny": "middle", "plain_mamba_l1": None, "deit_tiny": "first"}


def key_of(family):
    return "backbone.pos_embed" if family.name == "plain_mamba_l1" else "pos_embed"


@pytest.mark.parametrize("img_size, grid", [((8, 24), (2, 6)), (32, (8, 8))])
def test_loading_resizes_to_the_model(family, img_size, grid):
    model, key = family.model(img_size=img_size), key_of(family)
    changes = load_state_dict(model, family.state_dict)
    want = resize_position_embedding(family.state_dict[key], (4, 4), grid, class_token=PLACES[family.name])
    assert model.pos_embed.shape[1] == grid[0] * grid[1] + (PLACES[family.name] is not None)
    np.testing.assert_array_equal(model.pos_embed[...], want)
    assert changes == (f"{key} resized from 4 x 4 to {grid[0]} x {grid[1]} patches (bicubic)",)


def test_the_same_grid_is_loaded_as_it_is(family):
    model = family.model()
    assert load_state_dict(model, family.state_dict, checkpoint_img_size=16) == ()
    np.testing.assert_array_equal(model.pos_embed[...], family.state_dict[key_of(family)])


def test_a_source_that_is_not_square(family):
    """Its grid follows from the image size and the family's patches."""
    model = family.model(img_size=(8, 32))
    source = dict(family.state_dict)
    key, place = key_of(family), PLACES[family.name]
    source[key] = source[key][:, : 15 + (place is not None)]
    load_state_dict(model, source, checkpoint_img_size=(12, 20))
    want = resize_position_embedding(source[key], (3, 5), (2, 8), class_token=place)
    np.testing.assert_array_equal(model.pos_embed[...], want)


def test_a_grid_that_is_not_square_must_be_given(state_dict, tiny):
    state_dict["pos_embed"] = state_dict["pos_embed"][:, :16]  # 15 patches: 3 x 5
    model = abstract_model("vim_tiny", **tiny)
    with pytest.raises(InputError, match="15 patch tokens.* 3 x 3 grid.*checkpoint_img_size"):
        load_state_dict(model, state_dict)
    with pytest.raises(InputError, match="15 patch tokens.* 4 x 5 grid"):
        load_state_dict(model, state_dict, checkpoint_img_size=(16, 20))
    load_state_dict(model, state_dict, checkpoint_img_size=(12, 20))
    want = resize_position_embedding(state_dict["pos_embed"], (3, 5), (4, 4), class_token="middle")
    np.testing.assert_array_equal(model.pos_embed[...], want)


def test_as_many_patches_in_another_shape(state_dict, tiny):
    model = abstract_model("vim_tiny", **{**tiny, "img_size": (8, 32)})
    load_state_dict(model, state_dict, checkpoint_img_size=16)
    want = resize_position_embedding(state_dict["pos_embed"], (4, 4), (2, 8), class_token="middle")
    np.testing.assert_array_equal(model.pos_embed[...], want)


def test_resizing_does_not_hide_another_width(state_dict, tiny):
    state_dict["pos_embed"] = state_dict["pos_embed"][:, :, :8]
    model = abstract_model("vim_tiny", **{**tiny, "img_size": 32})
    with pytest.raises(InputError, match=r"pos_embed \(1, 17, 8\) .*\(1, 65, 16\)"):
        load_state_dict(model, state_dict)


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of the module, as text."""
    texts = []
    monkeypatch.setattr(position_embedding.logging, "warning", lambda text, *values: texts.append(text % values))
    return texts


@pytest.mark.parametrize(
    "name, sizes, positions, grids, readings",
    [
        ("vim_tiny", {}, 730, ["27 x 27", "14 x 14"], ["stride 8 at 224", "stride 16 at 432"]),
        ("vim_tiny", {"stride": 8}, 197, ["14 x 14", "27 x 27"], ["stride 16 at 224", "stride 8 at 120"]),
        ("vim_tiny", {"img_size": 448}, 730, ["27 x 27", "28 x 28"], ["stride 8 at 224", "stride 16 at 432"]),
        ("deit_tiny", {}, 577, ["24 x 24", "14 x 14"], ["stride 16 at 384"]),
        ("plain_mamba_l1", {}, 784, ["28 x 28", "14 x 14"], ["stride 8 at 224", "stride 16 at 448"]),
    ],
)
def test_resizing_warns_with_every_reading(warnings, name, sizes, positions, grids, readings):
    config = model_config(name, **sizes)
    key = family_of(config).position_embedding
    embedding = np.zeros((1, positions, config.embed_dim), np.float32)
    fit_position_embedding(config, {key: embedding}, None, "vim.pth")
    (text,) = warnings
    assert all(value in text for value in ("vim.pth", str(positions), *grids, *readings))


@pytest.mark.parametrize("sizes, img_size", [({}, None), ({"img_size": 448}, 224)])
def test_no_warning_where_nothing_is_guessed(warnings, sizes, img_size):
    """The model's own grid; a given size."""
    config = model_config("vim_tiny", **sizes)
    fit_position_embedding(config, {"pos_embed": np.zeros((1, 197, config.embed_dim), np.float32)}, img_size)
    assert not warnings


def test_a_square_grid_taken_as_another_is_a_warning(warnings):
    config = model_config("vim_tiny", img_size=(112, 448))
    fit_position_embedding(config, {"pos_embed": np.zeros((1, 197, config.embed_dim), np.float32)}, None)
    (text,) = warnings
    assert "7 x 28" in text and "14 x 14" in text


@pytest.mark.parametrize(
    "file, stride",
    [
        ("vim_t_midclstok_76p1acc.pth", 16),
        ("vim_t_midclstok_ft_78p3acc.pth", 8),
        ("vim_s_midclstok_80p5acc.pth", 16),
        ("vim_s_midclstok_ft_81p6acc.pth", 8),
        ("vim_b_midclstok_81p9acc.safetensors", 16),
    ],
)
def test_an_official_file_has_a_known_stride(tmp_path, file, stride):
    """Also where the number of positions agrees: stride 16 at 432 pixels has as many as stride 8 at 224."""
    other = 24 - stride
    check_official_stride(tmp_path / file, model_config("vim_tiny", stride=stride))
    for img_size in (224, 432):
        with pytest.raises(InputError, match=rf"{file} .*stride {stride} .*stride {other}"):
            load_torch_checkpoint(tmp_path / file, "vim_tiny", img_size=img_size, stride=other)

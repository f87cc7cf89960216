"""Segmenters against what the official PyTorch code computed (tests/fixtures/README.md)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from compilation import OPTIMISED
from flax import nnx

from top_jax.config import IMAGENET_MEAN, IMAGENET_STD
from top_jax.convert.key_maps import segmenter_keys
from top_jax.convert.position_embedding import resize_position_embedding
from top_jax.convert.segmenter_checkpoint import ROTARY, load_segmenter_state_dict, segmenter_state_dict
from top_jax.models import Segmenter, abstract_segmenter
from top_jax.models.heads import FCNHead, UPerHead
from top_jax.models.weights import parameter_count, variables_by_path

# Relative to the largest value.
FORWARD, GRADIENT = 1e-5, 1e-4
AUXILIARY_WEIGHT = 0.4

# Of each case: the model, its variant, and whether it is in tests/fixtures; the others are in ../shared.
CASES = {
    "vim_seg_small_micro": ("vim_small", "official_small"),
    "vim_seg_tiny_micro": ("vim_tiny", "official_tiny"),
    "vim_seg_residual_micro": ("vim_small", None),
    "plain_mamba_seg_micro": ("plain_mamba_l1", None),
}
HERE = "vim_seg_small_micro"
ELSEWHERE = [pytest.param(name, marks=(pytest.mark.slow, pytest.mark.torch)) for name in CASES if name != HERE]

PLAIN_MAMBAS = ("plain_mamba_l1", "plain_mamba_l2", "plain_mamba_l3")


def ours(array):
    """Returns PyTorch's `[B, C, H, W]` as `[B, H, W, C]`."""
    return jax.device_put(np.moveaxis(array, 1, -1))


def torchs(array):
    return np.moveaxis(np.asarray(array), -1, 1)


class SegmenterCase:
    """One run of official code: `weights` by key, `config`, images as ours, and everything that it computed."""

    def __init__(self, name: str, here: Path, shared: Path | None):
        self.name = name
        path = here / f"{name}.npz" if shared is None else shared / "fixtures/segmentation" / f"{name}.npz"
        with np.load(path) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        self.config = json.loads(str(self.arrays["config"]))
        if shared is None:
            self.weights = self.under("weights/")
            self.image, self.slide_image = (self._normalised(self.arrays[key]) for key in ("image", "slide_image"))
        else:
            import torch

            weights = torch.load(path.with_suffix(".pth"), weights_only=True)["state_dict"]
            self.weights = {key: tensor.numpy() for key, tensor in weights.items()}
            self.image = ours(self.arrays["image_nchw"])
            key = "slide_image" if "slide_image" in self.arrays else "whole_image"
            self.slide_image = ours(self.arrays[key])

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): array for key, array in self.arrays.items() if key.startswith(prefix)}

    @staticmethod
    def _normalised(pixels: np.ndarray) -> jax.Array:
        return jnp.asarray((pixels / 255 - np.asarray(IMAGENET_MEAN)) / np.asarray(IMAGENET_STD), jnp.float32)

    def build(self) -> Segmenter:
        name, variant = CASES[self.name]
        config = self.config
        plain = name.startswith("plain")
        sizes = {"num_convs_patch_embed": 2} if plain else {"variant": variant}
        model = abstract_segmenter(
            name,
            num_classes=config["num_classes"],
            channels=config["channels"],
            aux_channels=config["aux_channels"],
            stages=tuple(index + 1 for index in config["out_indices"]),
            img_size=config["img_size"],
            embed_dim=config["embed_dims" if plain else "embed_dim"],
            depth=config["num_layers" if plain else "depth"],
            **sizes,
        )
        load_segmenter_state_dict(model, self.weights)
        return model


@pytest.fixture(scope="module", params=[HERE, *ELSEWHERE])
def case(request, fixtures):
    return SegmenterCase(request.param, fixtures, None if request.param == HERE else request.getfixturevalue("shared"))


@pytest.fixture(scope="module")
def computed(case):
    """What our model computes of it: token maps, maps, logits of both heads, of the image, and all gradients."""

    def run(model, image):
        def scalar(model, image):
            decode, auxiliary = model.logits(image)
            loss = jnp.sum(decode * ours(case["cotangent_decode"]))
            return loss + jnp.sum(auxiliary * ours(case["cotangent_auxiliary"])), (decode, auxiliary)

        (_, logits), gradients = jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(model, image)
        token_maps = model.token_maps(model.backbone.features(image, stages=model.config.stages))
        return (token_maps, model.maps(image), *logits, model(image)), gradients

    options = {} if case.name == HERE else {"compiler_options": OPTIMISED}  # official_tiny is close to the tolerance
    return jax.jit(run, **options)(case.build(), case.image)


def test_maps(case, computed):
    (token_maps, maps, *_), _ = computed
    compared = 0
    for prefix, got in (("tokens_map", token_maps), ("feature", maps)):
        for index in range(4):
            if f"{prefix}{index}" in case.arrays:
                assert relative_error(torchs(got[index]), case[f"{prefix}{index}"]) < FORWARD
                compared += 1
    assert compared >= 3


def test_logits(case, computed):
    (_, _, decode, auxiliary, logits), _ = computed
    assert relative_error(torchs(decode), case["decode_logits"]) < FORWARD
    assert relative_error(torchs(auxiliary), case["auxiliary_logits"]) < FORWARD
    assert logits.shape == (*case.image.shape[:3], case.config["num_classes"])
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), case["prediction"])
    if "logits_every4" in case.arrays:
        assert relative_error(torchs(logits)[:, :, ::4, ::4], case["logits_every4"]) < FORWARD


def test_gradients(case, computed):
    _, (model, image) = computed
    every = 2 if "grad_image_every2" in case.arrays else 1
    want = case["grad_image_every2" if every == 2 else "grad_image"]
    assert relative_error(torchs(image)[:, :, ::every, ::every], want) < GRADIENT
    gradients = variables_by_path(model)
    keys = {key.torch: key for key in segmenter_keys(model.config)}
    errors = {
        name: relative_error(keys[name].layout.to_torch(np.asarray(gradients[keys[name].ours][...])), want)
        for name, want in case.under("grad/").items()
    }
    assert len(errors) > 30 and max(errors.values()) < GRADIENT, errors


def test_a_position_embedding_of_another_size(shared):
    with np.load(shared / "fixtures/segmentation/vim_seg_tiny_micro.npz") as arrays:
        before, after = arrays["pos_embed_4x4"], arrays["pos_embed_6x6"]
    found = resize_position_embedding(before, (4, 4), (6, 6), class_token=None)
    assert relative_error(found, after) < FORWARD


@pytest.mark.slow
def test_a_training_step(case):
    """Losses and their gradients; the official run had no dropout. (The statistics left behind: `test_heads`.)"""
    model = case.build()
    model.train()
    for head in (model.decode_head, model.auxiliary_head):
        head.classifier.dropout.rate = 0.0

    def losses(model, image):
        parts = [cross_entropy(logits, case["label"]) for logits in model.logits(image)]
        parts[1] *= AUXILIARY_WEIGHT
        return sum(parts), parts

    step = jax.jit(jax.grad(losses, has_aux=True), compiler_options=OPTIMISED)
    gradient, parts = step(model, case.image)
    for name, got in zip(("decode.loss_ce", "aux.loss_ce"), parts, strict=True):
        assert relative_error(got, case[f"train/{name}"]) < FORWARD
    keys = {key.torch: key for key in segmenter_keys(model.config)}
    gradients = variables_by_path(gradient)
    for name, want in case.under("train_grad/").items():
        if np.abs(want).max() < 1e-6:
            continue  # rounding alone: a bias in front of a BatchNorm has no gradient
        got = keys[name].layout.to_torch(np.asarray(gradients[keys[name].ours][...]))
        # The BatchNorm of the 1 x 1 pool normalises two numbers: a difference that rounding changes in its third digit.
        passed = name.startswith("backbone.") or "psp_modules.0" in name
        assert relative_error(got, want) < (5e-3 if passed else GRADIENT), name


def cross_entropy(logits, label):
    """Returns the mean over all pixels, ignored ones counting as zero, at the size of the label."""
    from top_jax.models.resizing import resize

    log_p = jax.nn.log_softmax(resize(logits, label.shape[1:]))
    classes = log_p.shape[-1]
    one_hot = jax.nn.one_hot(jnp.minimum(jnp.asarray(label, jnp.int32), classes), classes, dtype=jnp.float32)
    return -jnp.mean(jnp.sum(log_p * one_hot, axis=-1))  # 255 is one_hot's row of zeros


@pytest.fixture(scope="module")
def heads(fixtures):
    with np.load(fixtures / "uper_fcn_heads.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


class Heads(nnx.Module):
    def __init__(self, config):
        widths, channels, classes = config["in_channels"], config["channels"], config["num_classes"]
        self.decode_head = UPerHead(widths, channels, classes, rngs=nnx.Rngs(0))
        self.auxiliary_head = FCNHead(config["aux_in_channels"], config["aux_channels"], classes, rngs=nnx.Rngs(0))
        for head in (self.decode_head, self.auxiliary_head):
            head.classifier.dropout.rate = 0.0

    def __call__(self, maps):
        return self.decode_head(maps), self.auxiliary_head(maps[2])


@pytest.mark.parametrize("size", ["pyramid", "flat"])
def test_heads(size, heads, quick_jit):
    """Maps of unequal widths, in eval mode with gradients, and in train mode with statistics."""
    model = nnx.eval_shape(lambda: Heads(json.loads(str(heads["config"]))))
    config = abstract_segmenter("vim_tiny", depth=4, embed_dim=4).config
    keys = [key for key in segmenter_keys(config) if key.ours[0] in ("decode_head", "auxiliary_head")]
    weights = variables_by_path(model)
    for key in keys:
        weights[key.ours].set_value(jnp.asarray(key.layout.to_ours(heads[f"weights/{key.torch}"]), jnp.float32))
    nnx.update(model, nnx.from_flat_state(weights))
    case = {key.removeprefix(f"{size}/"): array for key, array in heads.items() if key.startswith(f"{size}/")}
    maps = [ours(case[f"input{index}"]) for index in range(4)]
    trained = nnx.merge(*nnx.split(model))
    model.eval()
    trained.train()

    def run(model, trained, maps):
        def loss(model, maps):
            decode, auxiliary = model(maps)
            total = jnp.float32(0)
            if "cotangent_decode" in case:
                total += jnp.sum(decode * ours(case["cotangent_decode"]))
                total += jnp.sum(auxiliary * ours(case["cotangent_auxiliary"]))
            return total, (decode, auxiliary, model.decode_head.pooled(maps[3]))

        losses = [cross_entropy(logits, case["label"]) for logits in trained(maps)]
        losses[1] *= AUXILIARY_WEIGHT
        if size == "pyramid":  # its gradients are in ../shared only
            return loss(model, maps)[1], None, losses, None
        (_, outputs), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, maps)
        return outputs, gradients, losses, nnx.state(trained, nnx.BatchStat)

    (decode, auxiliary, psp), gradients, losses, statistics = quick_jit(run)(model, trained, maps)
    assert relative_error(torchs(decode), case["decode"]) < FORWARD
    assert relative_error(torchs(auxiliary), case["auxiliary"]) < FORWARD
    assert relative_error(torchs(psp), case["psp"]) < FORWARD
    for name, got in zip(("decode", "auxiliary"), losses, strict=True):
        assert relative_error(got, case[f"train_loss_{name}"]) < FORWARD
    if gradients is None:
        return
    gradient, of_maps = gradients
    for index, got in enumerate(of_maps):
        assert relative_error(torchs(got), case[f"grad_input{index}"]) < GRADIENT
    gradients, after = variables_by_path(gradient), dict(nnx.to_flat_state(statistics))
    named, compared = {key.torch: key for key in keys}, 0
    for name, want in case.items():
        kind, _, key = name.partition("/")
        if kind in ("grad", "train_after"):
            found = (gradients if kind == "grad" else after)[named[key].ours]
            got = named[key].layout.to_torch(np.asarray(found[...]))
            assert relative_error(got, want) < GRADIENT, name
            compared += 1
    assert compared > 50


@pytest.fixture(scope="module")
def official_models(fixtures):
    return json.loads(gzip.decompress((fixtures / "official_seg_models.json.gz").read_bytes()))


@pytest.mark.parametrize(
    "name",
    ["vim_small", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vim_tiny", *PLAIN_MAMBAS))],
)
def test_every_official_parameter(name, official_models):
    official = official_models[f"{name}_upernet"]
    model = abstract_segmenter(name, variant={"vim_tiny": "official_tiny", "vim_small": "official_small"}.get(name))
    weights, keys = variables_by_path(model), segmenter_keys(model.config)
    shapes = {key.torch: list(key.layout.torch_shape(weights[key.ours].shape)) for key in keys}
    if name == "vim_small":
        shapes |= {key: [1024, 384] for key in ROTARY}
    assert shapes == official["state_dict"]
    assert {key.ours for key in keys} == weights.keys() and len(keys) == len(weights)
    assert parameter_count(model) == official["parameters"]


def test_everything_is_saved_as_it_was(case):
    state = segmenter_state_dict(case.build())
    assert state.keys() == case.weights.keys()
    for name, want in case.weights.items():
        assert state[name].dtype == want.dtype and state[name].shape == want.shape
        if name in ROTARY:  # we compute them
            np.testing.assert_allclose(state[name], want, atol=1e-6)
        else:
            np.testing.assert_array_equal(state[name], want)

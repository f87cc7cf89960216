"""The loss of a segmenter against mmseg's, its memory, and what the optimizer does to its parameters."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import filled

from top_jax import save_torch_checkpoint, save_torch_segmenter
from top_jax.build import build_abstract_model
from top_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig
from top_jax.data import prepare_image
from top_jax.errors import InputError
from top_jax.evaluation.segmentation import make_predict
from top_jax.inference import segment
from top_jax.memory import program_memory
from top_jax.models import abstract_segmenter
from top_jax.models.resizing import resize
from top_jax.models.weights import weights_of
from top_jax.training.optimizer import decay_mask, depth_scales, learning_rate_schedule
from top_jax.training.run_directory import RunDirectory
from top_jax.training.saved_weights import find_weights, initial_weights
from top_jax.training.segmentation import IGNORED, losses, pixel_loss
from top_jax.training.weights import load_checkpoint, save_weights


def plain_loss(logits, label):
    """The same by `optax`, with the whole resized array and automatic differentiation."""
    resized, counted = resize(logits, label.shape[1:]), label < logits.shape[-1]
    entropy = optax.softmax_cross_entropy_with_integer_labels(resized, jnp.where(counted, label, 0).astype(jnp.int32))
    return jnp.mean(entropy * counted, axis=(1, 2))


@pytest.mark.parametrize("size, label_size", [((5, 7), (20, 28)), ((9, 6), (37, 17)), ((8, 8), (8, 8))])
def test_loss_and_gradient(size, label_size):
    """Whole and broken ratios, rows that are no multiple of the chunk, ignored pixels, and weights of images."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(2, *size, 5)).astype(np.float32)
    label = rng.integers(0, 6, (2, *label_size))
    label = np.where(label == 5, IGNORED, label).astype(np.uint8)
    share = np.array([0.25, 0.75], np.float32)

    @jax.jit
    def graded(logits, label):
        ours = jax.value_and_grad(lambda x: jnp.sum(pixel_loss(x, label).loss * share))(logits)
        return ours, jax.value_and_grad(lambda x: jnp.sum(plain_loss(x, label) * share))(logits)

    (ours, slope), (want, wanted) = graded(logits, label)
    np.testing.assert_allclose(ours, want, rtol=1e-6)
    np.testing.assert_allclose(slope, wanted, atol=1e-6 * float(np.abs(wanted).max()))


def test_all_ignored_is_zero():
    logits, label = np.ones((1, 4, 4, 3), np.float32), jnp.asarray(np.full((1, 16, 16), IGNORED, np.uint8))

    def loss(logits):
        found = pixel_loss(logits, label)
        return jnp.sum(found.loss), found.labelled

    (found, labelled), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    assert found == 0 and not np.any(slope) and labelled[0] == 0


def test_memory_of_the_loss():
    """Less than one float32 array [B, H, W, classes], forward and backward together."""
    logits, label = np.zeros((2, 32, 32, 40), np.float32), jnp.asarray(np.zeros((2, 128, 128), np.uint8))
    step = jax.jit(jax.value_and_grad(lambda x: jnp.sum(pixel_loss(x, label).loss)))
    temporaries = program_memory(step.lower(logits).compile())["temporaries"]
    whole = 2 * 128 * 128 * 40 * 4
    assert 0 < temporaries < whole, f"{temporaries} of {whole}"


# mmcv 1.7.1's PolyLrUpdaterHook, run: step -> share of the peak rate.
POLY = {
    60_000: {0: 1e-6, 1: 6.67654872e-4, 749: 0.493100483, 1499: 0.974366656, 1500: 0.975, 30_000: 0.5, 59_999: 1 / 6e4},
    160_000: {0: 1e-6, 2: 1.33431532e-3, 1499: 0.98997083, 1501: 0.990618750, 80_000: 0.5, 159_999: 6.25e-6},
}


@pytest.mark.parametrize("total", POLY)
def test_schedule_is_mmcvs(total):
    peak = 6e-5
    rates = dict(learning_rate=peak, warmup_learning_rate=1e-6 * peak, min_learning_rate=0.0)
    config = OptimizerConfig(schedule="poly", warmup_steps=1500, **rates)
    schedule = learning_rate_schedule(config, batch_size=16, total_steps=total, steps_per_epoch=100.0)
    found = {step: float(schedule(step)) / peak for step in POLY[total]}
    assert found == pytest.approx(POLY[total], rel=2e-5, abs=2e-9)


def micro(name="vim_tiny", **settings):
    """A segmenter of shapes: what an optimizer does with a parameter follows from its name and its axes."""
    sizes = dict(
        img_size=32, patch_size=8 if name == "vim_tiny" else 16, embed_dim=16, depth=4, channels=8, aux_channels=8
    )
    return abstract_segmenter(name, num_classes=3, **{**sizes, **settings})


def test_layer_decay():
    """By block as for classifiers; `official` lowers the stem alone."""
    params = weights_of(micro())
    scales = depth_scales(params, 0.5)
    blocks = [scales["backbone"]["blocks"][i]["norm"]["scale"] for i in range(4)]
    assert blocks == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert scales["backbone"]["pos_embed"] == 0.5**5
    assert set(jax.tree.leaves([scales[name] for name in scales if name != "backbone"])) == {1.0}
    official = depth_scales(params, 0.5, "official")
    assert set(jax.tree.leaves(official["backbone"]["blocks"])) == {1.0}
    assert official["backbone"]["pos_embed"] == official["backbone"]["patch_embed"]["proj"]["kernel"] == 0.5**5


def test_weight_decay():
    """None on what PlainMamba's authors leave out; all convolutions and linear layers of the heads."""
    mask = decay_mask(weights_of(micro("plain_mamba_l1")))
    mixer = jax.tree_util.tree_leaves_with_path(mask["backbone"])
    names = ("A_log", "D", "direction_Bs", "pos_embed")
    assert {value for path, value in mixer if path[-1].key in names} == {False}
    assert not any(jax.tree.leaves(mask["map_norms"]))
    assert mask["decode_head"]["fpn_bottleneck"]["conv"]["kernel"]


def test_losses_of_a_model():
    """The auxiliary loss is weighted, and counts nothing without its head."""
    images, label = np.ones((2, 32, 32, 3), np.float32), np.zeros((2, 32, 32), np.uint8)

    def losses_of(aux_weight, *, has_auxiliary=True):
        def logits(images, keys):
            return images[:, ::4, ::4] * 2, images[:, ::8, ::8] if has_auxiliary else None

        model = SimpleNamespace(logits=logits)
        return jax.jit(lambda images, label: losses(model, images, label, None, aux_weight))(images, label)

    found = losses_of(0.4)
    np.testing.assert_allclose(found["loss"], losses_of(0.0)["loss"] + 0.4 * found["auxiliary_loss"], rtol=1e-6)
    assert "auxiliary_loss" not in losses_of(0.4, has_auxiliary=False)


SIZES = dict(name="vim_tiny", patch_size=8, embed_dim=16, depth=4, d_state=4)
CLASSIFIER = ModelConfig(num_classes=5, img_size=(16,), **SIZES)
SEGMENTER = ModelConfig(head="uper", num_classes=3, img_size=(32,), channels=8, aux_channels=0, **SIZES)


def run_of(config, path, **settings):
    """A run directory with random weights of a config's model."""
    weights = weights_of(filled(build_abstract_model(config), scale=0.3))
    optimizer = OptimizerConfig(label_smoothing=0.0)
    RunDirectory(path).describe(RunConfig(model=config, optimizer=optimizer, **settings))
    save_weights(RunDirectory(path), weights)
    return weights


def start(checkpoint, **settings):
    optimizer = OptimizerConfig(label_smoothing=0.0)
    return initial_weights(RunConfig(model=SEGMENTER, init_from=str(checkpoint), optimizer=optimizer, **settings))


def test_starts_from_a_classifier(tmp_path):
    """The backbone has the classifier's weights, at another grid; the rest follows the run's seed."""
    classifier = run_of(CLASSIFIER, tmp_path / "classifier")
    first, other = (start(tmp_path / "classifier", seed=seed) for seed in (0, 1))
    for weights in (first, other):
        jax.tree.map(np.testing.assert_array_equal, weights["backbone"]["blocks"], classifier["blocks"])
    assert first["backbone"]["pos_embed"].shape == (1, 16, 16)
    kernels = [weights["decode_head"]["fpn_bottleneck"]["conv"]["kernel"] for weights in (first, other)]
    assert not np.array_equal(*kernels)
    with pytest.raises(InputError, match="init_from"):
        find_weights(tmp_path / "classifier").for_model(SEGMENTER)
    file = tmp_path / "classifier.safetensors"
    save_torch_checkpoint(filled(build_abstract_model(CLASSIFIER), scale=0.3), file)
    from_file = start(file)
    jax.tree.map(np.testing.assert_array_equal, from_file["backbone"], first["backbone"])


PHOTO_DATA = DataConfig(source="digit_scenes", scale=(48, 24))


def test_a_loaded_run_keeps_how_photographs_are_prepared(tmp_path):
    run_of(SEGMENTER, tmp_path, data=PHOTO_DATA)
    assert load_checkpoint(tmp_path).data == PHOTO_DATA


@pytest.mark.slow
def test_a_loaded_run_segments_as_it_evaluates(tmp_path):
    run_of(SEGMENTER, tmp_path, data=PHOTO_DATA)
    model = load_checkpoint(tmp_path)
    photo = np.random.default_rng(0).integers(256, size=(30, 60, 3), dtype=np.uint8)
    want = make_predict(model)(weights_of(model), jnp.asarray(prepare_image(photo, PHOTO_DATA))[None], (30, 60))[0]
    np.testing.assert_array_equal(segment(model, photo), want)
    assert np.any(segment(model, photo, data=DataConfig(scale=(128, 32))) != want)


def test_starts_from_a_segmenter(tmp_path):
    there = run_of(dataclasses.replace(SEGMENTER, num_classes=7), tmp_path / "seven")
    with pytest.raises(InputError, match='head="new"'):
        start(tmp_path / "seven")
    weights = start(tmp_path / "seven", init_head="new")
    jax.tree.map(np.testing.assert_array_equal, weights["backbone"], there["backbone"])
    assert weights["decode_head"]["classifier"]["conv_seg"]["kernel"].shape[-1] == 3
    with pytest.raises(InputError, match="segmenter"):
        find_weights(tmp_path / "seven").for_model(dataclasses.replace(CLASSIFIER, num_classes=7))
    file = tmp_path / "segmenter.safetensors"
    save_torch_segmenter(filled(build_abstract_model(SEGMENTER), scale=0.3), file)
    with pytest.raises(InputError, match="segmenter.safetensors holds a segmenter"):  # before any key is compared
        find_weights(file).for_model(CLASSIFIER)


def test_a_classifier_of_another_family_is_named(tmp_path):
    sizes = dict(patch_size=8, embed_dim=16, depth=4, num_heads=2)
    run_of(ModelConfig(name="deit_tiny", num_classes=5, img_size=(16,), **sizes), tmp_path / "deit")
    with pytest.raises(InputError, match="a DeiT, but the segmenter's backbone is a ViM"):
        start(tmp_path / "deit")


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"head": "uper"}},  # label smoothing
        {"model": {"head": "uper"}, "optimizer": {"label_smoothing": 0.0}, "augment": {"mixup": 0.8}},
        {"model": {"fill": "zero"}},
        {"data": {"scale": (64, 64)}},
        {"model": {"head": "fcn"}},
        {"optimizer": {"layer_decay_rule": "official"}},
    ],
)
def test_settings_of_the_other_task(settings):
    with pytest.raises(InputError, match=r"^config\."):
        RunConfig.from_config_dict(settings)

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from top_jax.convert import load_state_dict
from top_jax.convert.families import official_keys
from top_jax.convert.keys import CONV2D, COUNT, DEPTHWISE_CONV1D, DEPTHWISE_CONV2D, LINEAR, SAME
from top_jax.errors import InputError
from top_jax.models import abstract_model
from top_jax.models.weights import KINDS, weights_of


def weights_by_path(model):
    return {path: np.asarray(weight[...]) for path, weight in nnx.to_flat_state(nnx.state(model, KINDS))}


@pytest.mark.parametrize(
    "layout, shape, turned",
    [
        (SAME, (2, 3), (2, 3)),
        (LINEAR, (2, 3), (3, 2)),
        (CONV2D, (2, 3, 4, 5), (4, 5, 3, 2)),
        (DEPTHWISE_CONV1D, (5, 1, 4), (4, 5)),
        (DEPTHWISE_CONV2D, (5, 1, 4, 3), (4, 3, 5)),
    ],
)
def test_layouts_turn_both_ways(layout, shape, turned):
    array = np.arange(np.prod(shape)).reshape(shape)
    ours = layout.to_ours(array)
    assert ours.shape == turned and layout.torch_shape(turned) == shape
    np.testing.assert_array_equal(layout.to_torch(ours), array)


@pytest.mark.parametrize("count", [0, 3, 2**24 - 1, 2**24])
def test_counts_turn_both_ways(count):
    ours = COUNT.to_ours(np.asarray(count, np.int64))
    assert ours.dtype == np.float32 and ours.shape == ()
    back = COUNT.to_torch(ours)
    assert isinstance(back, np.ndarray) and back.dtype == np.int64 and back.shape == () and back == count


def test_an_average_of_counts_is_rounded():
    np.testing.assert_array_equal(COUNT.to_torch(np.asarray(6.7, np.float32)), 7)


def test_everything_is_loaded(family):
    model = family.model()
    load_state_dict(model, family.state_dict)
    loaded, keys = weights_by_path(model), official_keys(model.config)
    assert len(loaded) == len(family.state_dict) == len(keys)
    for key in keys:
        np.testing.assert_array_equal(key.layout.to_torch(loaded[key.ours]), family.state_dict[key.torch])


def test_some_by_hand(family_case):
    """So that a layout wrong in both directions shows."""
    vim, plain_mamba = family_case("vim_tiny"), family_case("plain_mamba_l1")
    model = vim.model()
    load_state_dict(model, vim.state_dict)
    kernel = model.blocks[1].mixer.backward.conv_kernel[...]
    np.testing.assert_array_equal(kernel[3], vim.state_dict["layers.1.mixer.conv1d_b.weight"][:, 0, 3])
    np.testing.assert_array_equal(model.head.kernel[:, 2], vim.state_dict["head.weight"][2])

    model, source = plain_mamba.model(), plain_mamba.state_dict
    load_state_dict(model, source)
    np.testing.assert_array_equal(
        model.blocks[1].mixer.conv_kernel[6, 2], source["backbone.layers.1.mamba.conv2d.weight"][:, 0, 6, 2]
    )
    norm = model.patch_embed.convs[1].norm
    np.testing.assert_array_equal(norm.var[...], source["backbone.patch_embed.convs.4.running_var"])
    assert int(norm.num_batches[...]) == source["backbone.patch_embed.convs.4.num_batches_tracked"]
    assert norm.num_batches[...].dtype == jnp.float32


def test_keys_and_paths_are_one_to_one(family):
    keys = official_keys(family.model().config)
    assert len({key.torch for key in keys}) == len({key.ours for key in keys}) == len(keys)


@pytest.mark.parametrize("dtype, verb", [(np.float16, "widened"), (jnp.bfloat16, "widened"), (np.float64, "rounded")])
def test_other_floats_become_float32(family_case, dtype, verb):
    case = family_case("plain_mamba_l1")
    halved = {name: a.astype(dtype) if a.dtype == np.float32 else a for name, a in case.state_dict.items()}
    floats = sum(array.dtype == dtype for array in halved.values())
    model = case.model()
    changes = load_state_dict(model, halved)
    assert changes == (f"{floats} {np.dtype(dtype).name} tensors {verb} to float32",)
    assert {array.dtype for array in weights_by_path(model).values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(model.norm.bias[...], halved["backbone.ln1.bias"].astype(np.float32))


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


@pytest.mark.parametrize(
    "name, value, complaint",
    [
        ("backbone.layers.0.dw.1.num_batches_tracked", np.asarray(2**24 + 1), "16777217 is not in 0 .. 2**24"),
        ("backbone.layers.0.dw.1.num_batches_tracked", np.asarray(-1), "-1 is not in 0 .. 2**24"),
        ("backbone.layers.0.dw.1.num_batches_tracked", np.float32(3), "of type float32 instead of an integer"),
        ("backbone.ln1.bias", np.ones(16, np.int8), "of type int8 instead of a float"),
        ("backbone.ln1.bias", np.ones(16, np.complex64), "of type complex64 instead of a float"),
    ],
)
def test_unusable_numbers(family_case, name, value, complaint):
    case = family_case("plain_mamba_l1")
    with pytest.raises(InputError) as error:
        load_state_dict(case.model(), {**case.state_dict, name: np.asarray(value)})
    assert str(error.value).startswith(f"1 unusable ({name} {complaint}")


# What a reader of the list is told.
OTHERS = [
    ("vim_tiny", "plain_mamba_l1", "a PlainMamba: choose one of plain_mamba_l1, plain_mamba_l2, plain_mamba_l3."),
    ("vim_tiny", "deit_tiny", "a DeiT: choose one of deit_tiny, deit_small, deit_base."),
    ("plain_mamba_l1", "vim_tiny", "a ViM: choose one of vim_tiny, vim_small, vim_base."),
    ("deit_tiny", "vim_tiny", "a ViM: choose one of vim_tiny, vim_small, vim_base."),
]


@pytest.mark.parametrize("wanted, came, told", OTHERS)
def test_keys_of_another_family(family_case, wanted, came, told):
    with pytest.raises(InputError, match=r"missing .* unexpected") as error:
        load_state_dict(family_case(wanted).model(), family_case(came).state_dict)
    assert str(error.value).endswith(f". Its keys look like those of {told}")


def test_a_distilled_deit(family_case):
    case = family_case("deit_tiny")
    distilled = {
        **case.state_dict,
        "dist_token": np.zeros((1, 1, 16), np.float32),
        "pos_embed": np.zeros((1, 18, 16), np.float32),
        "head_dist.weight": np.zeros((3, 16), np.float32),
        "head_dist.bias": np.zeros(3, np.float32),
    }
    with pytest.raises(InputError, match=r"^3 unexpected \(dist_token.*It is a distilled DeiT .* take the checkpoint"):
        load_state_dict(case.model(), distilled)


def test_buffers_of_mmcv_s_ema_hook_are_left_out(family_case):
    """The hook swaps the averages under the plain names before it saves."""
    case = family_case("plain_mamba_l1")
    names = [name for name in case.state_dict if "num_batches" not in name]
    buffers = {f"ema_{name.replace('.', '_')}": np.full_like(case.state_dict[name], 7) for name in names}
    model = case.model()
    changes = load_state_dict(model, {**case.state_dict, **buffers})
    assert changes == (f"{len(names)} buffers of mmcv's EMA hook left out, as the official code does",)
    assert not any((leaf == 7).all() for leaf in jax.tree.leaves(weights_of(model)))


def test_a_buffer_of_mmcv_s_ema_hook_without_its_twin(family_case):
    case = family_case("plain_mamba_l1")
    buffer = {"ema_backbone_gone": np.zeros(1, np.float32)}
    with pytest.raises(InputError, match=r"1 unexpected \(ema_backbone_gone\).*buffers of mmcv's EMA hook"):
        load_state_dict(case.model(), {**case.state_dict, **buffer})


def test_a_wrapper_s_prefix(family):
    wrapped = {f"module.{name}": array for name, array in family.state_dict.items()}
    with pytest.raises(InputError, match=r"Its keys are those of a \w+ with 'module.' before each"):
        load_state_dict(family.model(), wrapped)


def test_keys_of_nobody(family):
    with pytest.raises(InputError, match=r"unexpected \(a, b\). Choose the model and the overrides"):
        load_state_dict(family.model(), {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)})


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite(family, value):
    name = next(name for name in family.state_dict if name.endswith("pos_embed"))
    broken = {**family.state_dict, name: family.state_dict[name].astype(np.float64)}
    broken[name][0, 0, 0] = value
    with (
        np.errstate(over="ignore"),
        pytest.raises(InputError, match=rf"1 tensors are not finite in float32 \({name}\)"),
    ):
        load_state_dict(family.model(), broken)

"""Official weights into our models and back: strict about keys, exact in values, never half a file."""

from __future__ import annotations

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import top_jax
from top_jax.convert import load_state_dict, state_dict_of
from top_jax.convert.key_maps import CONV2D, COUNT, DEPTHWISE_CONV1D, DEPTHWISE_CONV2D, LINEAR, SAME, official_keys
from top_jax.errors import InputError
from top_jax.models import abstract_model
from top_jax.models.weights import KINDS, weights_of

ENTRIES = {"vim_tiny": "model", "plain_mamba_l1": "state_dict", "deit_tiny": "model"}
SUFFIXES = [pytest.param(".pth", marks=pytest.mark.torch), pytest.param(".pt", marks=pytest.mark.torch), ".safetensors"]


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
    """Catches a layout that is wrong in both directions."""
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
    with pytest.raises(InputError, match=r"^2 missing \(layers.0.mixer.A_b_log, norm_f.weight\)"):
        load_state_dict(model, state_dict)


def test_unexpected(model, state_dict):
    state_dict["rope.freqs_cos"] = np.zeros(3, np.float32)
    with pytest.raises(InputError, match=r"^1 unexpected \(rope.freqs_cos\)"):
        load_state_dict(model, state_dict)


def test_misshapen(model, state_dict):
    state_dict["layers.1.mixer.D"] = np.zeros(7, np.float32)
    with pytest.raises(InputError, match=r"^1 misshapen \(layers.1.mixer.D \(7,\) .*\(32,\)"):
        load_state_dict(model, state_dict)


def test_every_problem_is_named_at_once_and_nothing_is_loaded(model, state_dict):
    del state_dict["cls_token"]
    state_dict["head.bias"] = np.zeros((1, 3), np.float32)
    state_dict["extra"] = np.zeros(1, np.float32)
    with pytest.raises(InputError, match="1 missing .*1 unexpected .*1 misshapen "):
        load_state_dict(model, state_dict)
    assert isinstance(model.norm.scale.get_value(), jax.ShapeDtypeStruct)


def test_long_lists_are_cut(model, state_dict):
    state_dict = {name: array for name, array in state_dict.items() if not name.startswith("layers.1.")}
    with pytest.raises(InputError, match=r"17 missing \((layers.1[\w.]+, ){5}and 12 more\)"):
        load_state_dict(model, state_dict)


def test_another_number_of_classes(state_dict, tiny):
    model = abstract_model("vim_tiny", **{**tiny, "num_classes": 10})
    with pytest.raises(InputError, match=r"head.weight \(3, 16\) .*\(10, 16\).*head.bias \(3,\)"):
        load_state_dict(model, state_dict)


@pytest.mark.parametrize(
    "name, value, offending",
    [
        ("backbone.layers.0.dw.1.num_batches_tracked", np.asarray(2**24 + 1), "16777217"),
        ("backbone.layers.0.dw.1.num_batches_tracked", np.asarray(-1), "-1"),
        ("backbone.layers.0.dw.1.num_batches_tracked", np.float32(3), "float32"),
        ("backbone.ln1.bias", np.ones(16, np.int8), "int8"),
        ("backbone.ln1.bias", np.ones(16, np.complex64), "complex64"),
    ],
)
def test_unusable_numbers(family_case, name, value, offending):
    case = family_case("plain_mamba_l1")
    with pytest.raises(InputError, match=rf"^1 unusable \({name} .*{offending}"):
        load_state_dict(case.model(), {**case.state_dict, name: np.asarray(value)})


@pytest.mark.parametrize(
    "wanted, given, family, models",
    [
        ("vim_tiny", "plain_mamba_l1", "PlainMamba", "plain_mamba_l1, plain_mamba_l2, plain_mamba_l3"),
        ("vim_tiny", "deit_tiny", "DeiT", "deit_tiny, deit_small, deit_base"),
        ("plain_mamba_l1", "vim_tiny", "ViM", "vim_tiny, vim_small, vim_base"),
        ("deit_tiny", "vim_tiny", "ViM", "vim_tiny, vim_small, vim_base"),
    ],
)
def test_keys_of_another_family(family_case, wanted, given, family, models):
    """The message names the family that the keys belong to, and its models."""
    with pytest.raises(InputError, match=rf"missing .* unexpected .* {family}\b.* {models}\.$"):
        load_state_dict(family_case(wanted).model(), family_case(given).state_dict)


def test_a_distilled_deit(family_case):
    case = family_case("deit_tiny")
    distilled = {
        **case.state_dict,
        "dist_token": np.zeros((1, 1, 16), np.float32),
        "pos_embed": np.zeros((1, 18, 16), np.float32),
        "head_dist.weight": np.zeros((3, 16), np.float32),
        "head_dist.bias": np.zeros(3, np.float32),
    }
    with pytest.raises(InputError, match=r"^3 unexpected \(dist_token.*distilled DeiT"):
        load_state_dict(case.model(), distilled)


def test_buffers_of_mmcv_s_ema_hook_are_left_out(family_case):
    """The hook swaps the averages under the plain names before it saves."""
    case = family_case("plain_mamba_l1")
    names = [name for name in case.state_dict if "num_batches" not in name]
    buffers = {f"ema_{name.replace('.', '_')}": np.full_like(case.state_dict[name], 7) for name in names}
    model = case.model()
    changes = load_state_dict(model, {**case.state_dict, **buffers})
    assert changes == (f"{len(names)} buffers of mmcv's EMA hook left out, as the official code does",)
    assert not any((np.asarray(leaf) == 7).all() for leaf in jax.tree.leaves(weights_of(model)))


def test_a_buffer_of_mmcv_s_ema_hook_without_its_twin(family_case):
    case = family_case("plain_mamba_l1")
    buffer = {"ema_backbone_gone": np.zeros(1, np.float32)}
    with pytest.raises(InputError, match=r"1 unexpected \(ema_backbone_gone\).*EMA hook"):
        load_state_dict(case.model(), {**case.state_dict, **buffer})


WRAPPED = {
    "DistributedDataParallel": "module.{}",
    "torch.compile of it": "_orig_mod.module.{}",
    "it of torch.compile": "module._orig_mod.{}",
    "lightning": "model.{}",
    "a compiled module of lightning": "model._orig_mod.{}",
    "a classifier": "backbone.{}",
    "all": "_orig_mod.module.model.backbone.{}",
    "all, in another order": "model.module.backbone._orig_mod.{}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_wrappers_add_to_the_keys(family, wrapper):
    wrapped = {WRAPPED[wrapper].format(name): array for name, array in family.state_dict.items()}
    model = family.model()
    (change,) = load_state_dict(model, wrapped)
    assert f"{len(wrapped)} keys" in change
    assert_same_arrays(state_dict_of(model), family.state_dict)


def test_wrappers_inside(family):
    """Blocks that are compiled one by one; the body, but not the head, under `backbone`."""
    wrapped = {re.sub(r"\.(\d+)\.", r".\1._orig_mod.", name): array for name, array in family.state_dict.items()}
    without = {name.removeprefix("backbone."): array for name, array in family.state_dict.items()}
    mixed = {name if name.startswith("head.") else f"backbone.{name}": array for name, array in without.items()}
    for state_dict in (wrapped, without, mixed):
        model = family.model()
        load_state_dict(model, state_dict)
        assert_same_arrays(state_dict_of(model), family.state_dict)


def test_one_weight_under_two_names(family):
    name = next(iter(family.state_dict))
    with pytest.raises(InputError, match=rf"{name} and module\.{name}"):
        load_state_dict(family.model(), {**family.state_dict, f"module.{name}": family.state_dict[name]})


def test_buffers_of_mmcv_s_ema_hook_in_a_wrapper(family_case):
    case = family_case("plain_mamba_l1")
    buffers = {f"ema_{name.replace('.', '_')}": array for name, array in case.state_dict.items()}
    wrapped = {f"module.{name}": array for name, array in {**case.state_dict, **buffers}.items()}
    model = case.model()
    load_state_dict(model, wrapped)
    assert_same_arrays(state_dict_of(model), case.state_dict)


def test_another_prefix(family):
    wrapped = {f"net.{name}": array for name, array in family.state_dict.items()}
    with pytest.raises(InputError, match=r"(ViM|PlainMamba|DeiT) .*'net.'"):
        load_state_dict(family.model(), wrapped)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module."])
def test_another_family_in_a_wrapper(family_case, prefix):
    wrapped = {f"{prefix}{name}": array for name, array in family_case("deit_tiny").state_dict.items()}
    with pytest.raises(InputError, match=r"DeiT.*deit_tiny"):
        load_state_dict(family_case("vim_tiny").model(), wrapped)


def test_keys_of_nobody(family):
    with pytest.raises(InputError, match=r"unexpected \(a, b\)"):
        load_state_dict(family.model(), {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)})


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite(family, value):
    name = next(name for name in family.state_dict if name.endswith("pos_embed"))
    broken = {**family.state_dict, name: family.state_dict[name].astype(np.float64)}
    broken[name][0, 0, 0] = value
    with (
        np.errstate(over="ignore"),
        pytest.raises(InputError, match=rf"1 tensor .*\({name}\)"),
    ):
        load_state_dict(family.model(), broken)


def loaded(family, state_dict=None):
    model = family.model()
    load_state_dict(model, family.state_dict if state_dict is None else state_dict)
    return model


def assert_same_arrays(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name  # -0 and subnormals too


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(family, tmp_path, suffix):
    """Through a file, and what the model computes with."""
    source = dict(family.state_dict)
    name = next(name for name in source if name.endswith("in_proj.weight") or name.endswith("qkv.weight"))
    source[name] = source[name].copy()
    source[name].flat[:4] = [3e38, -0.0, 1e-30, 1e-42]
    model, path = loaded(family, source), tmp_path / f"model{suffix}"
    top_jax.save_torch_checkpoint(model, path)
    back = top_jax.load_torch_checkpoint(path, family.name, **family.sizes)
    assert_same_arrays(state_dict_of(back), source)
    ours, theirs = (nnx.to_pure_dict(nnx.state(m, KINDS)) for m in (model, back))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert os.listdir(tmp_path) == [path.name]  # no temporary file is left


@pytest.mark.torch
def test_what_torch_finds_in_it(family, tmp_path):
    """The entry that the official code reads, with tensors as its own: contiguous, int64 counts."""
    import torch

    top_jax.save_torch_checkpoint(loaded(family), tmp_path / "model.pth")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(content) == [ENTRIES[family.name]]
    tensors = content[ENTRIES[family.name]]
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same_arrays({name: tensor.numpy() for name, tensor in tensors.items()}, family.state_dict)


def test_what_safetensors_finds_in_it(family, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    top_jax.save_torch_checkpoint(loaded(family), tmp_path / "model.safetensors")
    assert_same_arrays(numpy.load_file(tmp_path / "model.safetensors"), family.state_dict)


def test_another_dtype_of_computation_changes_nothing(family_case):
    case = family_case("vim_tiny")
    model = case.model(dtype=jnp.bfloat16)
    load_state_dict(model, case.state_dict)
    assert_same_arrays(state_dict_of(model), case.state_dict)


def test_an_existing_file(family_case, tmp_path):
    model, path = loaded(family_case("vim_tiny")), tmp_path / "model.safetensors"
    path.write_text("precious")
    with pytest.raises(InputError, match="model.safetensors exists"):
        top_jax.save_torch_checkpoint(model, path)
    assert path.read_text() == "precious"
    top_jax.save_torch_checkpoint(model, path, overwrite=True)
    assert_same_arrays(
        state_dict_of(top_jax.load_torch_checkpoint(path, "vim_tiny", **family_case("vim_tiny").sizes)),
        family_case("vim_tiny").state_dict,
    )


@pytest.mark.parametrize("name", ["model.bin", "model"])
def test_another_suffix(family_case, tmp_path, name):
    with pytest.raises(InputError, match=f"{name} .* .pth, .pt, .safetensors"):
        top_jax.save_torch_checkpoint(loaded(family_case("vim_tiny")), tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_such_folder(family_case, tmp_path, suffix):
    with pytest.raises(InputError, match=rf"nowhere/model{suffix} .*\(No such file or directory\)"):
        top_jax.save_torch_checkpoint(loaded(family_case("vim_tiny")), tmp_path / "nowhere" / f"model{suffix}")


@pytest.mark.torch
def test_a_disk_that_is_full(family_case, tmp_path, monkeypatch):
    """PyTorch's writer raises its own error; the existing file stays."""
    import torch

    path = tmp_path / "model.pth"
    path.write_text("precious")

    def save(content, stream):
        stream.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing\nframe #0")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(InputError, match=r"model.pth .*\(\[enforce .* failed writing\)"):
        top_jax.save_torch_checkpoint(loaded(family_case("vim_tiny")), path, overwrite=True)
    assert path.read_text() == "precious" and os.listdir(tmp_path) == ["model.pth"]


def test_a_new_head_for_other_classes(family, tmp_path):
    """Everything but the classifier is the file's; `num_classes=0` leaves it out; otherwise an error names the way."""
    path = tmp_path / "model.safetensors"
    top_jax.save_torch_checkpoint(loaded(family), path)
    sizes = {**family.sizes, "num_classes": 5}
    with pytest.raises(InputError, match=r'3 classes.* 5.*num_classes=3.*head="new"'):
        top_jax.load_torch_checkpoint(path, family.name, **sizes)
    model = top_jax.load_torch_checkpoint(path, family.name, head="new", rngs=nnx.Rngs(1), **sizes)
    body = {name: a for name, a in state_dict_of(model).items() if not name.startswith("head.")}
    assert_same_arrays(body, {name: a for name, a in family.state_dict.items() if not name.startswith("head.")})
    assert model.head.kernel.shape == (16, 5) and 0.01 < float(model.head.kernel[...].std()) < 0.03
    again = top_jax.load_torch_checkpoint(path, family.name, head="new", rngs=nnx.Rngs(2), **sizes)
    assert np.abs(model.head.kernel[...] - again.head.kernel[...]).max() > 0
    bare = top_jax.load_torch_checkpoint(path, family.name, **{**sizes, "num_classes": 0})
    assert jax.eval_shape(bare, jnp.ones((1, 16, 16, 3))).shape == (1, bare.num_features)
    assert "head" not in weights_of(bare)
    top_jax.save_torch_checkpoint(bare, tmp_path / "bare.safetensors")
    again = top_jax.load_torch_checkpoint(tmp_path / "bare.safetensors", family.name, head="new", **sizes)
    with pytest.raises(InputError, match=r'2 missing .*num_classes=0.*head="new"'):
        top_jax.load_torch_checkpoint(tmp_path / "bare.safetensors", family.name, **sizes)
    bare.reset_classifier(5)
    assert again.config == bare.config
    jax.tree.map(np.testing.assert_array_equal, weights_of(again), weights_of(bare))
    with pytest.raises(InputError, match="head='old'"):
        top_jax.load_torch_checkpoint(path, family.name, head="old")

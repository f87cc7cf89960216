"""The summary of every key."""

from __future__ import annotations

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.convert.key_summary import key_summary
from top_jax.convert.torch_checkpoint import load_official
from top_jax.models import abstract_model


def lines_of(summary):
    return {line.split("  ")[0]: " ".join(line.split()) for line in str(summary).splitlines()}


def test_every_key_is_counted(family):
    summary = key_summary(family.model())
    sizes = {name: array.size for name, array in family.state_dict.items()}
    buffers = {name for name in sizes if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert summary.keys == len(sizes)
    assert summary.buffers == sum(sizes[name] for name in buffers)
    assert summary.parameters == sum(sizes.values()) - summary.buffers
    # Each key is shown once with its shape, those of the blocks for all of them.
    shown = {}
    for group in summary.groups:
        for rest, shape in group.shapes.items():
            block = ".0" if group.blocks else ""
            name = f"{group.name}{block}.{rest}" if rest else group.name
            shown[name] = shape
            assert list(shape) == list(family.state_dict[name].shape)
    assert {name for name in sizes if not re.search(r"(layers|blocks)\.1\.", name)} == shown.keys()
    assert json.loads(json.dumps(summary.to_dict()))["keys"] == summary.keys


@pytest.mark.slow
def test_vim_small():
    """The official counts, group by group."""
    summary = key_summary(abstract_model("vim_small"))
    lines = lines_of(summary)
    assert lines["cls_token"] == "cls_token 1 key 384 parameters"
    assert lines["pos_embed"] == "pos_embed 1 key 75,648 parameters"
    assert lines["patch_embed"] == "patch_embed 2 keys 295,296 parameters"
    assert lines["layers x 24"].startswith("layers x 24 408 keys ")
    assert lines["head"] == "head 2 keys 385,000 parameters"
    text = str(summary)
    assert "mixer.in_proj.weight [1536, 384], mixer.out_proj.weight [384, 768]," in text
    assert "all together: 415 keys, 25,796,584 parameters\n" in text
    # in_proj, out_proj, x_proj and dt_proj of two directions in 24 blocks, and the head
    assert "axes turned in 145 tensors: [out, in] -> [in, out]" in text
    assert "axes turned in 48 tensors: [E, 1, taps] -> [taps, E]" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
def test_plain_mamba_l1():
    """Block 0 has keys that the others lack; buffers are no parameters."""
    summary = key_summary(abstract_model("plain_mamba_l1"))
    text = str(summary)
    assert summary.parameters == 7_551_656
    assert "dw.0.weight [192, 1, 3, 3] (in 1 of 24)" in text and "norm.weight [192]," in text
    assert f"7,551,656 parameters, {summary.buffers:,} values in buffers" in text
    # Two BatchNorms of 64 channels in the stem, one of 192 in block 0: mean, variance and a count each.
    assert summary.buffers == 2 * (2 * 64 + 1) + 2 * 192 + 1


def test_what_was_changed(family, tmp_path):
    from top_jax.convert.checkpoint_files import write_state_dict

    path = tmp_path / "model.safetensors"
    halved = {n: a.astype(jnp.float16) if a.dtype == np.float32 else a for n, a in family.state_dict.items()}
    write_state_dict(path, halved, entry="unused")
    summary = load_official(path, family.name, **{**family.sizes, "img_size": (24, 16)}).summary
    key = "backbone.pos_embed" if family.name == "plain_mamba_l1" else "pos_embed"
    floats = sum(array.dtype == np.float16 for array in halved.values())
    resized = f"{key} resized from 4 x 4 to 6 x 4 patches (bicubic)"
    assert summary.changes == (f"{floats} float16 tensors widened to float32", resized)
    assert str(summary).endswith("\n".join(summary.changes)) and summary.to_dict()["changes"] == list(summary.changes)

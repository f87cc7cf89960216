"""A fingerprint: any bit of any array, and its place, make another."""

from __future__ import annotations

import itertools
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.training.seals import fingerprint

TREE = {
    "w": np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 4, 5),
    "b": np.array([0.0, -0.0, 1e-42, np.inf], np.float32),
    "step": np.array(7, np.int32),
    "half": np.arange(6, dtype=np.float16),
    "key": np.array([1, 2], np.uint32),
}
GOLDEN = 3311267499


def of(tree):
    return fingerprint({name: jnp.asarray(array) for name, array in tree.items()})


def test_it_is_the_same_everywhere(monkeypatch):
    """The value is the same in every process and release: it is compared with one that another wrote."""
    assert of(TREE) == of(TREE) == fingerprint(TREE) == GOLDEN
    monkeypatch.setattr("top_jax.training.seals._in_memory", lambda leaf: False)
    assert of(TREE) == GOLDEN  # computed by JAX, as on a GPU


@pytest.mark.parametrize("name", TREE)
def test_every_bit_counts(name):
    seen = {of(TREE)}
    array = np.atleast_1d(TREE[name])
    for place, bit in itertools.product(range(array.nbytes), range(8)):
        bytes_ = bytearray(array.tobytes())
        bytes_[place] ^= 1 << bit
        changed = np.frombuffer(bytes(bytes_), array.dtype).reshape(TREE[name].shape)
        seen.add(of({**TREE, name: changed}))
    assert len(seen) == 1 + 8 * array.nbytes


def test_every_place_counts():
    """Numbers that changed places, in one array or between two; and changes that a plain sum would not see."""
    w = TREE["w"]
    signs = w.copy()
    signs[0, 0, :2] *= -1
    others = [w[::-1], w[:, ::-1], w[:, :, ::-1], np.roll(w, 1, axis=2), w.transpose(2, 0, 1).reshape(3, 4, 5), signs]
    assert len({of({"w": other}) for other in (w, *others)}) == 1 + len(others)
    assert of({"a": w, "b": 2 * w}) != of({"a": 2 * w, "b": w})


SPLIT = """
import jax, numpy as np
from top_jax.sharding import by_image, make_mesh, replicated
from top_jax.training.seals import fingerprint
x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
mesh = make_mesh(fsdp=2)
split = {fingerprint(jax.device_put(x, where(mesh))) for where in (by_image, replicated)}
print(len({fingerprint(x), *split}), len(jax.devices()))
"""


@pytest.mark.slow
def test_devices_do_not_matter(root):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": ""}
    command = [sys.executable, "-c", SPLIT]
    done = subprocess.run(command, cwd=root, env=flags, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "8"], done.stderr

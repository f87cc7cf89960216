"""Weights in parts: what each device holds, what is sent, and that no number changes.

This file is also the program that is started on eight devices.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from collectives import traffic

from top_jax.config import RunConfig
from top_jax.training.prepare import make_plan
from top_jax.training.programs import TrainPrograms
from top_jax.training.saved_weights import initial_weights

CONFIG = RunConfig.from_config_dict(
    dict(
        batch_size=32,
        eval_batch_size=120,
        total_steps=4,
        model=dict(name="vim_tiny", num_classes=10, img_size=16, patch_size=4, embed_dim=64, depth=2, drop_path=0.2),
        pruning=dict(after_blocks=(1,), keep_ratio=0.5),
        optimizer=dict(ema_decay=0.9, accumulate=2, warmup_epochs=0.0),
        augment=dict(mixup=0.8, cutmix=1.0, erasing=0.25),
    )
)
IMAGES = CONFIG.batch_size * 16 * 16 * 3


@pytest.mark.slow
def test_eight_devices(root):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    path = f"{root}:{root}/tests/support"
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ok"]


def train(fsdp: int) -> tuple[Any, list[float], Any]:
    """State and losses of three steps, and the compiled program."""
    plan = make_plan(dataclasses.replace(CONFIG, fsdp=fsdp), 1437)
    state = plan.first_state(initial_weights(CONFIG))
    rng, programs, losses = np.random.default_rng(0), TrainPrograms(plan, None), []
    for step in range(3):
        rows = {
            "image": rng.integers(0, 256, (CONFIG.batch_size, 16, 16, 3), dtype=np.uint8),
            "label": rng.integers(0, 10, CONFIG.batch_size, dtype=np.int32),
            "mask": np.ones(CONFIG.batch_size, np.float32),
            "index": np.arange(CONFIG.batch_size, dtype=np.int32),
        }
        batch = jax.device_put(rows, plan.by_image)
        program = programs.compile(step, state, batch)
        state, metrics = programs(step, state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses, program


def bytes_on_one_device(state: Any) -> int:
    first = jax.devices()[0]
    return sum(s.data.nbytes for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == first)


def main() -> None:
    """Losses and weights are those without parts; a device holds less; only weights are gathered."""
    whole, losses, _ = train(fsdp=1)
    largest = max(leaf.size for leaf in jax.tree.leaves(whole.params))
    for fsdp in (2, 8):
        state, split_losses, program = train(fsdp)
        np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state.params, whole.params)
        split = {leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)}
        assert split == {True, False}
        assert bytes_on_one_device(state) < 0.75 * bytes_on_one_device(whole)
        sent = traffic(program)
        gathered = [size for name, size in sent if name == "all-gather"]
        assert gathered and max(gathered) <= largest, (gathered, largest)
        assert all(size <= IMAGES for name, size in sent if name in ("all-to-all", "collective-permute")), sent
    print("ok")


if __name__ == "__main__":
    main()

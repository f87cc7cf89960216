"""The keys of an official PlainMamba checkpoint (mmcls: backbone.*, head.fc.*)."""

from __future__ import annotations

from collections.abc import Iterator

from top_jax.convert.keys import CONV2D, COUNT, DEPTHWISE_CONV2D, LINEAR, SAME, Key, Path
from top_jax.models import PlainMambaConfig


def plain_mamba_keys(config: PlainMambaConfig) -> list[Key]:
    """Every parameter and buffer of a checkpoint of this size."""
    stem = "backbone.patch_embed"
    return [
        Key("backbone.pos_embed", ("pos_embed",), SAME),
        *_conv_batch_norm(f"{stem}.stem", 0, ("patch_embed", "stem")),
        *(
            key
            for index in range(config.num_convs_patch_embed)
            for key in _conv_batch_norm(f"{stem}.convs", 3 * index, ("patch_embed", "convs", index))
        ),
        Key(f"{stem}.projection.weight", ("patch_embed", "proj", "kernel"), CONV2D),
        Key(f"{stem}.projection.bias", ("patch_embed", "proj", "bias"), SAME),
        *(key for index in range(config.depth) for key in _layer(config, index)),
        Key("backbone.ln1.weight", ("norm", "scale"), SAME),
        Key("backbone.ln1.bias", ("norm", "bias"), SAME),
        Key("head.fc.weight", ("head", "kernel"), LINEAR),
        Key("head.fc.bias", ("head", "bias"), SAME),
    ]


def _conv_batch_norm(sequential: str, index: int, ours: Path) -> Iterator[Key]:
    yield Key(f"{sequential}.{index}.weight", (*ours, "conv", "kernel"), CONV2D)
    yield from _batch_norm(f"{sequential}.{index + 1}", (*ours, "norm"))


def _batch_norm(torch: str, ours: Path) -> Iterator[Key]:
    yield Key(f"{torch}.weight", (*ours, "scale"), SAME)
    yield Key(f"{torch}.bias", (*ours, "bias"), SAME)
    yield Key(f"{torch}.running_mean", (*ours, "mean"), SAME)
    yield Key(f"{torch}.running_var", (*ours, "var"), SAME)
    yield Key(f"{torch}.num_batches_tracked", (*ours, "num_batches"), COUNT)


def _layer(config: PlainMambaConfig, index: int) -> Iterator[Key]:
    layer, mixer = f"backbone.layers.{index}", f"backbone.layers.{index}.mamba"
    block: Path = ("blocks", index)
    ours: Path = (*block, "mixer")
    yield Key(f"{layer}.norm.weight", (*block, "norm", "scale"), SAME)
    yield Key(f"{layer}.norm.bias", (*block, "norm", "bias"), SAME)
    yield Key(f"{mixer}.A_log", (*ours, "A_log"), SAME)
    yield Key(f"{mixer}.D", (*ours, "D"), SAME)
    yield Key(f"{mixer}.direction_Bs", (*ours, "direction_Bs"), SAME)
    yield Key(f"{mixer}.conv2d.weight", (*ours, "conv_kernel"), DEPTHWISE_CONV2D)
    yield Key(f"{mixer}.conv2d.bias", (*ours, "conv_bias"), SAME)
    yield Key(f"{mixer}.x_proj.weight", (*ours, "x_proj", "kernel"), LINEAR)
    for name in ("in_proj", "dt_proj", "out_proj"):
        yield Key(f"{mixer}.{name}.weight", (*ours, name, "kernel"), LINEAR)
        yield Key(f"{mixer}.{name}.bias", (*ours, name, "bias"), SAME)
    if index in config.layers_with_dwconv:
        yield Key(f"{layer}.dw.0.weight", (*block, "tail", "kernel"), DEPTHWISE_CONV2D)
        yield from _batch_norm(f"{layer}.dw.1", (*block, "tail", "norm"))

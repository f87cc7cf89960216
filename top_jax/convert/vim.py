"""The keys of an official ViM checkpoint (hustvl/Vim, bimamba_type="v2")."""

from __future__ import annotations

from collections.abc import Iterator

from top_jax.convert.keys import CONV2D, DEPTHWISE_CONV1D, LINEAR, SAME, Key, Path
from top_jax.models import VimConfig


def vim_keys(config: VimConfig) -> list[Key]:
    """Every parameter of a checkpoint of this size."""
    return [
        Key("cls_token", ("cls_token",), SAME),
        Key("pos_embed", ("pos_embed",), SAME),
        Key("patch_embed.proj.weight", ("patch_embed", "proj", "kernel"), CONV2D),
        Key("patch_embed.proj.bias", ("patch_embed", "proj", "bias"), SAME),
        *(key for index in range(config.depth) for key in _vim_block(index)),
        Key("norm_f.weight", ("norm", "scale"), SAME),
        Key("head.weight", ("head", "kernel"), LINEAR),
        Key("head.bias", ("head", "bias"), SAME),
    ]


def _vim_block(index: int) -> Iterator[Key]:
    block, mixer = f"layers.{index}", f"layers.{index}.mixer"
    ours: Path = ("blocks", index, "mixer")
    yield Key(f"{block}.norm.weight", ("blocks", index, "norm", "scale"), SAME)
    yield Key(f"{mixer}.in_proj.weight", (*ours, "in_proj", "kernel"), LINEAR)
    yield Key(f"{mixer}.out_proj.weight", (*ours, "out_proj", "kernel"), LINEAR)
    for direction, suffix in (("forward", ""), ("backward", "_b")):
        here: Path = (*ours, direction)
        yield Key(f"{mixer}.conv1d{suffix}.weight", (*here, "conv_kernel"), DEPTHWISE_CONV1D)
        yield Key(f"{mixer}.conv1d{suffix}.bias", (*here, "conv_bias"), SAME)
        yield Key(f"{mixer}.x_proj{suffix}.weight", (*here, "x_proj", "kernel"), LINEAR)
        yield Key(f"{mixer}.dt_proj{suffix}.weight", (*here, "dt_proj", "kernel"), LINEAR)
        yield Key(f"{mixer}.dt_proj{suffix}.bias", (*here, "dt_bias"), SAME)
        yield Key(f"{mixer}.A{suffix}_log", (*here, "A_log"), SAME)
        yield Key(f"{mixer}.D{suffix}", (*here, "D"), SAME)

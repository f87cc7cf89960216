"""The keys of an official DeiT checkpoint (facebookresearch/deit, timm), which are EViT's too."""

from __future__ import annotations

from collections.abc import Iterator

from top_jax.convert.keys import CONV2D, LINEAR, SAME, Key, Path
from top_jax.models import DeitConfig


def deit_keys(config: DeitConfig) -> list[Key]:
    """Every parameter of a checkpoint of this size."""
    return [
        Key("cls_token", ("cls_token",), SAME),
        Key("pos_embed", ("pos_embed",), SAME),
        Key("patch_embed.proj.weight", ("patch_embed", "proj", "kernel"), CONV2D),
        Key("patch_embed.proj.bias", ("patch_embed", "proj", "bias"), SAME),
        *(key for index in range(config.depth) for key in _block(index)),
        *_norm("norm", ("norm",)),
        *_linear("head", ("head",)),
    ]


def _block(index: int) -> Iterator[Key]:
    block, ours = f"blocks.{index}", ("blocks", index)
    yield from _norm(f"{block}.norm1", (*ours, "norm1"))
    yield from _linear(f"{block}.attn.qkv", (*ours, "attn", "qkv"))
    yield from _linear(f"{block}.attn.proj", (*ours, "attn", "proj"))
    yield from _norm(f"{block}.norm2", (*ours, "norm2"))
    yield from _linear(f"{block}.mlp.fc1", (*ours, "mlp", "fc1"))
    yield from _linear(f"{block}.mlp.fc2", (*ours, "mlp", "fc2"))


def _norm(torch: str, ours: Path) -> Iterator[Key]:
    yield Key(f"{torch}.weight", (*ours, "scale"), SAME)
    yield Key(f"{torch}.bias", (*ours, "bias"), SAME)


def _linear(torch: str, ours: Path) -> Iterator[Key]:
    yield Key(f"{torch}.weight", (*ours, "kernel"), LINEAR)
    yield Key(f"{torch}.bias", (*ours, "bias"), SAME)

"""Multiply-accumulates: the published numbers, and an independent count from the parameters' own shapes."""

import jax
import pytest
from flax import nnx

from top_jax.evaluation.flops import count_macs
from top_jax.evaluation.flops.of_config import check_executed, trace_model
from top_jax.evaluation.flops.parts import PART_NAMES
from top_jax.models import abstract_model, model_config, segmenter_config
from top_jax.pruning import Evit, Merging, Pruning


@pytest.mark.parametrize(
    ("name", "published", "all_directions"),
    [
        ("vim_tiny", 1.45, 1.82),
        ("vim_small", 5.07, 5.90),
        ("vim_base", 18.85, 20.86),
        ("plain_mamba_l1", 3.01, 3.01),
        ("plain_mamba_l2", 8.06, 8.06),
        ("plain_mamba_l3", 14.41, 14.41),
        ("deit_small", 4.60, 4.60),
    ],
)
def test_dense(name, published, all_directions):
    config = model_config(name)
    cost = count_macs(config)
    assert round(cost.gmacs("published"), 2) == published
    assert round(cost.gmacs("all_directions"), 2) == all_directions
    assert cost.tokens_per_block == (196 if name.startswith("plain") else 197,) * config.depth


@pytest.mark.parametrize(
    ("name", "after_blocks", "keep_ratio", "published"),
    [
        ("vim_small", (5, 10, 15), 0.8, 3.59),
        ("vim_tiny", (10, 20), 0.75, 1.20),
        ("vim_tiny", (10, 20), 0.8, 1.24),
        ("vim_tiny", (10, 20), 0.85, 1.29),
        ("plain_mamba_l3", (6, 12, 18), 0.7, 8.43),
    ],
)
def test_pruned(name, after_blocks, keep_ratio, published):
    cost = count_macs(model_config(name), Pruning(after_blocks=after_blocks, keep_ratio=keep_ratio))
    assert round(cost.gmacs("published"), 2) == published


def test_tokens_per_block():
    """Pruning after block 5 reduces the tokens of block 6; the class token is added."""
    cost = count_macs(model_config("vim_small"), Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8))
    assert cost.tokens_per_block == (197,) * 5 + (158,) * 5 + (127,) * 5 + (102,) * 9
    ratios = Pruning(after_blocks=(1, 2), keep_ratio=(0.5, 0.25))
    assert count_macs(model_config("vim_tiny", depth=3, img_size=64), ratios).tokens_per_block == (17, 9, 3)


@pytest.mark.parametrize(("ratio", "published"), [(0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)])
def test_evit(ratio, published):
    """The MACs of DeiT-S in EViT's README."""
    cost = count_macs(model_config("deit_small"), Evit(after_blocks=(4, 7, 10), keep_ratio=ratio))
    assert round(cost.gmacs("published"), 1) == published
    if ratio == 0.7:
        assert cost.tokens_per_block == (197,) * 4 + (140,) * 3 + (100,) * 3 + (72,) * 2


def brute_force(model, tokens_per_block, directions):
    """Sums each kernel's size times the places where it is applied, plus 9 L E N per scan."""
    num_patches, total = model.config.num_patches, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name == "patch_embed.proj.kernel":
            total += leaf.size * num_patches
        elif name == "head.kernel":
            total += leaf.size
        elif name.startswith("blocks."):
            tokens = tokens_per_block[int(name.split(".")[1])]
            if ".backward." in name and "backward" not in directions:
                continue
            if name.endswith("kernel"):
                total += leaf.size * tokens
            elif name.endswith("A_log"):
                total += 9 * leaf.size * tokens
    return total


@pytest.mark.parametrize(
    ("overrides", "pruning"),
    [
        ({}, Pruning()),
        ({"img_size": (64, 96), "patch_size": 16, "stride": 8, "embed_dim": 40, "d_state": 5}, Pruning()),
        ({"img_size": 32, "patch_size": 4, "d_conv": 3}, Pruning(after_blocks=(1, 2), keep_ratio=(0.7, 0.3))),
        ({"num_classes": 7, "expand": 3}, Pruning(after_blocks=(2,), keep_ratio=0.01)),
    ],
)
def test_independent_count(overrides, pruning):
    model = abstract_model("vim_tiny", depth=3, pruning=pruning, **overrides)
    cost = count_macs(model.config, pruning)
    assert cost.macs["published"] == brute_force(model, cost.tokens_per_block, {"forward"})
    assert cost.macs["all_directions"] == brute_force(model, cost.tokens_per_block, {"forward", "backward"})
    counts = [cut.after for cut in pruning.schedule(model.config.num_patches, 3)]
    assert cost.tokens_per_block[-1] == 1 + [model.config.num_patches, *counts][-1]


def kernels(model):
    """Yields (dotted name, size) of every parameter that multiplies tokens or pixels."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith(("kernel", "A_log")):
            yield name, leaf.size


@pytest.mark.parametrize(
    ("overrides", "pruning"),
    [
        ({}, Pruning()),
        ({"img_size": (63, 34), "patch_size": 8, "stride": 4, "embed_dim": 40, "d_state": 5}, Pruning()),
        ({"num_convs_patch_embed": 2, "d_conv": 3}, Pruning(after_blocks=(1, 2), keep_ratio=(0.7, 0.3))),
        ({"layers_with_dwconv": (1, 2), "img_size": 48}, Pruning(after_blocks=(1,), keep_ratio=0.5)),
    ],
)
def test_independent_count_of_plain_mamba(overrides, pruning):
    model = abstract_model("plain_mamba_l1", depth=3, pruning=pruning, **overrides)
    height, width = model.config.img_size
    pixels, patches = ((height + 1) // 2) * ((width + 1) // 2), model.config.num_patches
    cost = count_macs(model.config, pruning)
    total = 0
    for name, size in kernels(model):
        if name.startswith("patch_embed"):
            total += size * (patches if ".proj." in name else pixels)
        elif name == "head.kernel":
            total += size
        else:
            tokens = cost.tokens_per_block[int(name.split(".")[1])]
            total += tokens * size * (4 * 9 if name.endswith("A_log") else 1)
    assert (cost.macs["published"], cost.macs["all_directions"]) == (total, total)


def test_independent_count_of_deit():
    pruning = Evit(after_blocks=(1, 2), keep_ratio=0.6, fuse=False)
    model = abstract_model("deit_tiny", depth=3, img_size=64, embed_dim=24, num_heads=2, pruning=pruning)
    entering, leaving, total = (17, 11, 7), (11, 7, 7), 0
    for name, size in kernels(model):
        if name == "patch_embed.proj.kernel":
            total += size * 16
        elif name == "head.kernel":
            total += size
        else:
            block = int(name.split(".")[1])
            total += size * (leaving if ".mlp." in name else entering)[block]
    total += sum(2 * length * length * 24 for length in entering)
    macs = count_macs(model.config, pruning).macs
    assert set(macs.values()) == {total}  # without a fused token, `executed` is the same


def test_parts_and_blocks_add_up():
    cost = count_macs(model_config("vim_small"), Merging(after_blocks=(5, 10), keep_ratio=0.8))
    for convention, macs in cost.macs.items():
        assert sum(cost.parts(convention).values()) == macs
        of_blocks = sum(sum(parts.values()) for parts in cost.blocks[convention])
        assert of_blocks + sum(cost.stem_and_head.values()) == macs
        assert set(cost.parts(convention)) <= set(PART_NAMES) and len(cost.blocks[convention]) == 24
    published, executed = cost.parts("published"), cost.parts("executed")
    assert "merging" not in published and executed["scan"] == published["scan"] * 2
    # 196 -> 157: 98 sources by 98 targets; 39 into 158 slots, in x and in the residual. Then 157 -> 126.
    assert executed["merging"] == (98 * 98 + 2 * 39 * 158 + 79 * 78 + 2 * 31 * 127) * 384


def test_executed_convolutions_cover_the_grid():
    """PlainMamba convolves the image's 14 x 14 cells, or with `none` the condensed grid: 12 rows of 12."""
    config, schedule = model_config("plain_mamba_l1", depth=2), {"after_blocks": (1,), "keep_ratio": 0.7}
    hold, none = (count_macs(config, Pruning(alignment=name, **schedule)) for name in ("hold", "none"))
    taps = 7 * 7 * 384
    assert [cost.blocks["executed"][1]["conv"] for cost in (hold, none)] == [196 * taps, 144 * taps]
    assert [cost.blocks["published"][1]["conv"] for cost in (hold, none)] == [138 * taps, 138 * taps]


@pytest.mark.parametrize(
    ("name", "backbone", "heads"),
    [
        ("vim_tiny", 7.51, 31.47),
        ("vim_small", 26.35, 124.96),
        ("plain_mamba_l1", 15.70, 27.87),
        ("plain_mamba_l2", 42.11, 29.08),
        ("plain_mamba_l3", 75.27, 29.48),
    ],
)
def test_segmenters(name, backbone, heads):
    """Published convention at 512 x 512."""
    cost = count_macs(segmenter_config(name), img_size=(512, 512))
    assert round(cost.backbone_macs["published"] / 1e9, 2) == backbone
    assert round(sum(cost.heads["published"].values()) / 1e9, 2) == heads
    assert cost.macs["published"] == cost.backbone_macs["published"] + sum(cost.heads["published"].values())


@pytest.mark.parametrize(
    ("name", "sizes", "image"),
    [
        ("vim_tiny", {"img_size": (96, 160), "patch_size": 16}, None),
        ("vim_tiny", {"img_size": 64, "patch_size": 8, "stages": (1, 2, 3, 4)}, None),
        ("plain_mamba_l1", {"img_size": 64}, (70, 130)),
    ],
)
def test_what_a_segmenter_executes(name, sizes, image):
    """Neck, decoder and resizing count what the traced model multiplies, to the last product."""
    config = segmenter_config(name, embed_dim=16, depth=5, channels=12, num_classes=7, **sizes)
    reduction = Pruning(after_blocks=(2, 3), keep_ratio=0.7)
    _, without_scans, scans = check_executed(
        trace_model(config, reduction, img_size=image), count_macs(config, reduction, img_size=image)
    )
    assert (without_scans, scans) == (0, 0)

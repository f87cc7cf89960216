"""Who is timed with whom."""

import jax
import pytest

from top_jax.benchmark.contestants import DENSE, _alignments, _label, field_of
from top_jax.benchmark.programs import make_inference, random_weights
from top_jax.config import ModelConfig
from top_jax.errors import InputError
from top_jax.models import abstract_model, model_config
from top_jax.models.weights import statistics_of, weights_of
from top_jax.pruning import Evit, Merging, Pruning

SIZES = {"img_size": (8, 8), "patch_size": 2, "embed_dim": 16, "depth": 2, "d_state": 2, "num_classes": 3}
TOP = Pruning(after_blocks=(1,), keep_ratio=0.5, score="l1")


def field(name, reduction, **sizes):
    return field_of(ModelConfig(name=name, **sizes), reduction)


def names(name, reduction, **sizes):
    return [contestant.name for contestant in field(name, reduction, **sizes)[0]]


def test_every_alignment_once():
    found, problem = field("vim_tiny", TOP, **SIZES)
    assert [c.name for c in found] == [
        DENSE, "top hold (config)", "deit", "top none, score order", "top none", "top decay",
    ]  # fmt: skip
    assert problem is None and [c.prunes for c in found] == [False, True, False, True, True, True]
    assert {c.model.reduction.score for c in found if c.prunes} == {"l1"}
    assert {c.cost.tokens_per_block for c in found if c.prunes} == {(17, 9)}


def test_the_baseline_as_the_config():
    baseline = Pruning(after_blocks=(1,), keep_ratio=0.5, alignment="none", order="score")
    assert [_label(other) for other in _alignments(baseline)] == ["top none", "top hold", "top decay"]
    assert _label(baseline) == "top none, score order"


def test_other_methods_and_none():
    evit = Evit(after_blocks=(1,), keep_ratio=0.5, score="clip", fuse=False)
    assert names("vim_tiny", evit, **SIZES) == [DENSE, "evit none (config)", "deit"]
    assert names("vim_tiny", Pruning(), **SIZES, drop_path=0.1) == [DENSE, "deit"]
    merging = Merging(after_blocks=(1,), keep_ratio=0.5)
    assert _label(merging) == "merge hold" and not _alignments(merging)


@pytest.mark.slow
def test_yardstick():
    """The one of the papers at the named size, whatever the image; else of the same width and nearly the parameters."""
    (dense, deit), _ = field("vim_tiny", Pruning(), img_size=(32,), patch_size=2, num_classes=10)
    assert deit.name == "deit_tiny" and deit.what.startswith("deit_tiny, which the papers compare with: 192 wide, 12")
    wanted = model_config("deit_tiny", img_size=32, patch_size=2, num_classes=10, dtype="float32")
    assert deit.model.config == wanted
    assert deit.cost.tokens_per_block[0] == dense.cost.tokens_per_block[0] == 257
    (dense, deit), _ = field("plain_mamba_l3", Pruning(), **{**SIZES, "embed_dim": 80, "depth": 5, "dtype": "bfloat16"})
    made = deit.model.config
    assert (deit.name, made.embed_dim, made.num_heads, made.dtype) == ("deit", 80, 2, "bfloat16")
    assert abs(deit.parameters - dense.parameters) <= 12 * 80 * 80 // 2 + 80 * 16  # half a block


def test_yardstick_makes_as_many_tokens_as_overlapping_patches():
    (dense, deit), _ = field("vim_tiny", Pruning(), **{**SIZES, "img_size": (16,), "patch_size": 4, "stride": 2})
    assert (dense.cost.tokens_per_block[0], deit.cost.tokens_per_block[0]) == (50, 65)  # DeiT has the border too


def test_no_yardstick():
    (only,), problem = field("deit_tiny", Pruning(), img_size=(32,), depth=1)
    assert only.name == DENSE and problem == "the model is a DeiT itself"
    found, problem = field("plain_mamba_l1", Pruning(), **{**SIZES, "img_size": (9,)})
    assert [c.name for c in found] == [DENSE]
    assert problem is not None and problem.startswith("there is no DeiT of this size: img_size=(9, 9)")


def test_segmenters(micro_segmenter):
    """Dense and every alignment, no DeiT; the heads cost the same in all."""
    found, problem = field_of(micro_segmenter, TOP)
    assert [c.name for c in found] == [DENSE, "top hold (config)", "top none, score order", "top none", "top decay"]
    assert problem is not None and "segmenter" in problem
    dense, pruned = found[0].row(), found[1].row()
    for convention, backbone in dense["backbone_gmacs"].items():
        heads = dense["gmacs"][convention] - backbone
        assert pruned["gmacs"][convention] - pruned["backbone_gmacs"][convention] == pytest.approx(heads)
        assert heads > 0 and pruned["backbone_gmacs"][convention] < backbone
    with pytest.raises(InputError, match=r"\(64, 32\).*\(32, 32\)"):
        field_of(micro_segmenter, TOP, (64, 32))


def test_plain_mamba_segmenters_take_other_crops():
    micro = {"name": "plain_mamba_l1", "head": "uper", "num_classes": 3, "channels": 8, "aux_channels": 8}
    config = ModelConfig(**micro, img_size=(32,), patch_size=8, embed_dim=8, depth=4, d_state=2)
    (small,), (large,) = (field_of(config, Pruning(), size)[0] for size in (None, (32, 64)))
    assert (small.img_size, large.img_size) == ((32, 32), (32, 64))
    assert 2 * small.cost.tokens_per_block[0] == large.cost.tokens_per_block[0]


def test_deit_has_no_alignments():
    evit = Pruning(after_blocks=(1,), keep_ratio=0.5, score="attention")
    assert names("deit_tiny", evit, img_size=(32,), depth=2) == [DENSE, "top hold (config)"]


def test_what_cannot_be():
    with pytest.raises(InputError, match="2"):
        field("vim_tiny", Pruning(after_blocks=(2,), keep_ratio=0.5), **SIZES)


def test_weights_to_time_with_are_weights():
    """The weights have the model's shapes, variances above 0, and a scale that keeps logits finite."""
    model = abstract_model("plain_mamba_l1", **{**SIZES, "layers_with_dwconv": (0,), "depth": 1})
    weights = random_weights(model)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), weights) == jax.tree.map(
        lambda a: (a.shape, a.dtype), weights_of(model)
    )
    assert jax.tree.leaves(statistics_of(model))
    logits = jax.jit(make_inference(model))(weights, jax.random.normal(jax.random.key(0), (2, 8, 8, 3)))
    assert 1e-3 < float(abs(logits).max()) < 1e3

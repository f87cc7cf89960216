"""Every file in configs/ is a run that could start."""

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from top_jax import recipes
from top_jax.build import build_reduction, build_sizes, crop_size
from top_jax.config import AugmentConfig, PruningConfig, RunConfig
from top_jax.data import rand_augment
from top_jax.evaluation.flops import count_macs
from top_jax.models.registry import BACKBONES
from top_jax.pruning import METHODS, Pruning

FOLDER = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
PRUNED = [name for name in NAMES if name.endswith(("_top", "_evit"))]


class Published(NamedTuple):
    """A row of the published recipes, with the cost in the papers' convention."""

    gmacs: float  # per image, published convention
    batch_size: int
    epochs: int
    learning_rate: float  # at the peak, per 512 images (fine-tuning a Mamba: as it is)
    min_learning_rate: float
    warmup_learning_rate: float
    warmup_epochs: int
    weight_decay: float
    drop_path: float
    clip_norm: float | None
    ema_decay: float | None
    after_blocks: tuple[int, ...] = ()
    keep_ratio: float | None = None


# Written out from the authors' scripts, not from top_jax.recipes, which the configs are made of:
# vim_*: hustvl/Vim, vim/scripts/pt-vim-{t,s}.sh over the defaults of vim/main.py (no script for vim_b: ours);
# plain_mamba_*: ChenhongyiYang/PlainMamba, plain_mamba_configs/plain_mamba_l*_in1k_300e.py;
# deit_*: facebookresearch/deit, main.py and README; deit_*_evit: youweiliang/evit, finetune.sh and main.py;
# *_top and the other *_evit: ToP (arXiv 2409.18962), with the falling learning rate that recipes.finetune explains.
TABLE = {
    "vim_t": Published(1.45, 1024, 300, 5e-4, 1e-5, 1e-6, 5, 0.1, 0.0, None, 0.99996),
    "vim_s": Published(5.07, 512, 300, 1e-3, 1e-5, 1e-6, 5, 0.05, 0.05, None, 0.99996),
    "vim_b": Published(18.85, 512, 300, 5e-4, 1e-5, 1e-6, 5, 0.05, 0.4, None, 0.99996),
    "plain_mamba_l1": Published(3.01, 2048, 300, 5e-4, 2e-5, 2e-6, 15, 0.05, 0.2, 5.0, None),
    "plain_mamba_l2": Published(8.06, 2048, 300, 5e-4, 2e-5, 2e-6, 20, 0.05, 0.2, 1.0, 0.9999),
    "plain_mamba_l3": Published(14.41, 1024, 300, 5e-4, 1e-5, 1e-6, 20, 0.05, 0.4, 1.0, 0.9999),
    "deit_t": Published(1.25, 1024, 300, 5e-4, 1e-5, 1e-6, 5, 0.05, 0.1, None, 0.99996),
    "deit_s": Published(4.60, 1024, 300, 5e-4, 1e-5, 1e-6, 5, 0.05, 0.1, None, 0.99996),
    "deit_b": Published(17.56, 1024, 300, 5e-4, 1e-5, 1e-6, 5, 0.05, 0.1, None, 0.99996),
    "deit_t_evit": Published(0.82, 2048, 30, 2e-5, 2e-6, 1e-6, 0, 1e-6, 0.1, None, None, (4, 7, 10), 0.7),
    "deit_s_evit": Published(3.03, 2048, 30, 2e-5, 2e-6, 1e-6, 0, 1e-6, 0.1, None, None, (4, 7, 10), 0.7),
    "deit_b_evit": Published(11.61, 2048, 30, 2e-5, 2e-6, 1e-6, 0, 1e-6, 0.1, None, None, (4, 7, 10), 0.7),
    "vim_t_top": Published(1.29, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.0, None, None, (10, 20), 0.85),
    "vim_t_evit": Published(1.29, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.0, None, None, (10, 20), 0.85),
    "vim_s_top": Published(3.59, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.05, None, None, (5, 10, 15), 0.8),
    "vim_s_evit": Published(3.59, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.05, None, None, (5, 10, 15), 0.8),
    "vim_b_top": Published(13.30, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.4, None, None, (5, 10, 15), 0.8),
    "plain_mamba_l1_top": Published(2.07, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.2, 5.0, None, (5, 10, 15), 0.7),
    "plain_mamba_l1_evit": Published(2.07, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.2, 5.0, None, (5, 10, 15), 0.7),
    "plain_mamba_l2_top": Published(5.30, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.2, 1.0, None, (5, 10, 15), 0.7),
    "plain_mamba_l2_evit": Published(5.30, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.2, 1.0, None, (5, 10, 15), 0.7),
    "plain_mamba_l3_top": Published(8.43, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.4, 1.0, None, (6, 12, 18), 0.7),
    "plain_mamba_l3_evit": Published(8.43, 512, 30, 1e-5, 1e-6, 1e-6, 5, 1e-8, 0.4, 1.0, None, (6, 12, 18), 0.7),
}

SEG_DIGITS = {"seg_digits", "seg_digits_top"}


class Segmenting(NamedTuple):
    """A row of the authors' segmentation settings."""

    batch_size: int
    total_steps: int
    learning_rate: float
    weight_decay: float
    drop_path: float
    layer_decay: float | None
    gmacs: float  # of the backbone at 512 x 512, published convention
    after_blocks: tuple[int, ...] = ()


# hustvl/Vim, seg/ and its scripts; ChenhongyiYang/PlainMamba, downstream/mmsegmentation. Pruning is ours.
SEGMENTERS = {
    "seg_vim_t": Segmenting(32, 60_000, 2e-4, 0.1, 0.1, 0.92, 7.51),
    "seg_vim_s": Segmenting(32, 60_000, 1e-4, 0.05, 0.1, 0.95, 26.35),
    "seg_plain_mamba_l1": Segmenting(16, 160_000, 6e-5, 0.01, 0.1, None, 15.70),
    "seg_plain_mamba_l2": Segmenting(16, 160_000, 6e-5, 0.01, 0.2, None, 42.11),
    "seg_plain_mamba_l3": Segmenting(16, 160_000, 6e-5, 0.01, 0.3, None, 75.27),
}
for _name, _gmacs, _blocks in (
    ("seg_vim_t", 6.71, (10, 20)),
    ("seg_vim_s", 18.56, (5, 10, 15)),
    ("seg_plain_mamba_l1", 10.78, (5, 10, 15)),
    ("seg_plain_mamba_l2", 27.57, (5, 10, 15)),
    ("seg_plain_mamba_l3", 43.81, (6, 12, 18)),
):
    for _kind in ("top", "evit"):
        SEGMENTERS[f"{_name}_{_kind}"] = SEGMENTERS[_name]._replace(gmacs=_gmacs, after_blocks=_blocks)


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    return RunConfig.from_config_dict(load(name).get_config())


def test_all_are_there():
    small = {f"vim_{data}{kind}" for data in ("cifar10", "digits") for kind in ("", "_top")}
    study = {f"study_{model}{where}" for model in ("vim", "plain_mamba") for where in ("", "_gpu")}
    assert (
        set(NAMES)
        == set(TABLE)
        | small
        | study
        | {"my_images", "my_images_top", "my_labels", "my_labels_top"}
        | set(SEGMENTERS)
        | SEG_DIGITS
    )


@pytest.mark.parametrize("name", TABLE)
def test_values_are_the_published_ones(name):
    config, row = read(name), TABLE[name]
    rates, finetuned_mamba = config.optimizer, name in PRUNED and not name.startswith("deit")
    assert (
        Published(
            gmacs=round(count_macs(build_sizes(config.model), build_reduction(config.pruning)).gmacs("published"), 2),
            batch_size=config.batch_size,
            epochs=int(config.epochs),
            learning_rate=rates.learning_rate,
            min_learning_rate=rates.min_learning_rate,
            warmup_learning_rate=rates.warmup_learning_rate,
            warmup_epochs=int(rates.warmup_epochs),
            weight_decay=rates.weight_decay,
            drop_path=config.model.drop_path,
            clip_norm=rates.clip_norm,
            ema_decay=rates.ema_decay,
            after_blocks=config.pruning.after_blocks,
            keep_ratio=config.pruning.keep_ratio[0] if config.pruning.keep_ratio else None,
        )
        == row
    )
    assert rates.reference_batch_size == (None if finetuned_mamba else 512)
    assert len(config.pruning.keep_ratio) <= 1 and config.total_steps is None
    assert (rates.b1, rates.b2, rates.label_smoothing, rates.accumulate) == (0.9, 0.999, 0.1, 1)
    assert config.model.dtype == "bfloat16" and config.model.num_classes == 1000
    assert (config.data.source, config.data.name, config.data.eval_split) == ("tfds", "imagenet2012", "validation")


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmentation_is_as_published(name):
    config, row = read(name), SEGMENTERS[name]
    rates, sizes = config.optimizer, dataclasses.replace(build_sizes(config.model), img_size=(512, 512))
    cost = count_macs(sizes, build_reduction(config.pruning)).gmacs("published")
    found = (config.batch_size, config.total_steps, rates.learning_rate, rates.weight_decay, config.model.drop_path)
    assert Segmenting(*found, rates.layer_decay, round(cost, 2), config.pruning.after_blocks) == row
    assert f"{cost:.2f}" in load(name).__doc__
    assert (rates.schedule, rates.warmup_steps, rates.min_learning_rate, rates.aux_weight) == ("poly", 1500, 0.0, 0.4)
    assert rates.warmup_learning_rate / rates.learning_rate == pytest.approx(1e-6)
    assert crop_size(config) == (512, 512) and config.data.scale == (2048, 512) and config.data.reduce_zero_label
    assert config.data.size_divisor == (32 if "plain" in name else 1) and config.augment.photometric


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    text = load(name).__doc__
    assert re.search(rf"^python train\.py --config configs/{name}\.py( |$)", text, re.MULTILINE)
    assert re.search(r"^Expected\b.*:", text, re.MULTILINE) and "Measured: " in text
    recipe = re.search(r"^Recipe: top_jax\.recipes\.(\w+)\.$", text, re.MULTILINE)[1]
    assert f"return recipes.{recipe}(" in inspect.getsource(load(name).get_config) and getattr(recipes, recipe).__doc__
    config = read(name)
    assert ("--config.data.data_dir=" in text) == (config.data.source not in ("digits", "digit_scenes"))


@pytest.mark.parametrize("name", NAMES)
def test_model_and_pruning_fit(name):
    """Whole models of these sizes are built in tests/models/test_official.py."""
    config = read(name)
    sizes, pruning = (
        build_sizes(config.model),
        build_reduction(config.pruning),
    )
    assert sizes.num_classes == config.model.num_classes
    pruning.check_evidence(next(family.EVIDENCE for kind, family in BACKBONES.items() if isinstance(sizes, kind)))
    cuts = pruning.schedule(sizes.num_patches, sizes.depth)
    assert tuple(cut.block for cut in cuts) == config.pruning.after_blocks
    assert bool(cuts) == (name in PRUNED)


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_twin(name):
    """The dense run's weights fit, and only pruning tells the two models apart."""
    pruned, dense = read(name), read(name.removesuffix("_top").removesuffix("_evit"))
    assert dense.pruning == PruningConfig()
    assert dataclasses.replace(pruned.model, drop_path=None) == dataclasses.replace(dense.model, drop_path=None)
    recipe = ("train_transform", "min_area", "shift")
    assert {k: v for k, v in dataclasses.asdict(pruned.data).items() if k not in recipe} == {
        k: v for k, v in dataclasses.asdict(dense.data).items() if k not in recipe
    }


# The values of the official scripts, by the configs that follow them; `recipes` gives them to the configs.
DEIT = AugmentConfig(
    repeats=3, rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.0, erasing=0.25, mixup=0.8, cutmix=1.0
)
PLAIN_MAMBA = dataclasses.replace(DEIT, repeats=1)


@pytest.mark.parametrize("name", TABLE)
def test_imagenet_is_augmented_by_the_recipe(name):
    config = read(name)
    family = config.model.name.rpartition("_")[0]
    assert config.augment == {"deit": DEIT, "vim": DEIT, "plain_mamba": PLAIN_MAMBA}[family]
    assert config.augment.flip and (config.augment.mix_probability, config.augment.switch_probability) == (1.0, 0.5)
    assert config.data.train_transform == "random_resized_crop" and config.data.min_area == 0.08


@pytest.mark.parametrize("name", ["vim_cifar10", "vim_cifar10_top"])
def test_cifar10_has_every_augmentation_on(name):
    augment = read(name).augment
    off = {field for field, value in dataclasses.asdict(augment).items() if not value}
    assert off == {"photometric"} and augment.repeats > 1  # that one is for labelled pixels


@pytest.mark.parametrize("name", ["vim_digits", "vim_digits_top"])
def test_digits_are_not_mirrored(name):
    """Nor changed otherwise than by the crop."""
    assert read(name).augment == AugmentConfig(flip=False)


def test_recipes_are_fresh_and_complete():
    """Every field is said, so that a change of a default changes no recipe; and one config's copy is its own."""
    for recipe in (recipes.deit, recipes.plain_mamba, recipes.small_images):
        values = recipe()
        assert values.keys() == {field.name for field in dataclasses.fields(AugmentConfig)}
        assert values is not recipe()
        assert rand_augment.parse(AugmentConfig(**values).rand_augment).increasing


@pytest.mark.parametrize("name", TABLE)
def test_the_docstring_counts_right(name):
    """ "196 -> 157, 3.59 of 5.07 GMACs" is what the model costs."""
    config, text = read(name), load(name).__doc__
    pruning = build_reduction(config.pruning)
    sizes = build_sizes(config.model)
    cost, dense = count_macs(sizes, pruning), count_macs(sizes)
    got, *whole = re.search(r"([\d.]+)(?: of ([\d.]+))? GMACs", text).groups()
    digits = len(got.partition(".")[2])
    assert got == f"{cost.gmacs('published'):.{digits}f}"
    assert whole in ([None], [f"{dense.gmacs('published'):.{digits}f}"])
    if stages := re.search(r"[Tt]okens (\d+(?: -> [\d+]+)+)", text):
        counts = [sum(map(int, stage.split("+"))) for stage in stages[1].split(" -> ")]
        assert counts == [sizes.num_patches, *(cut.after for cut in pruning.schedule(sizes.num_patches, sizes.depth))]


def test_the_baseline_is_the_naive_way():
    for name in ("vim_t", "vim_s", "plain_mamba_l1", "plain_mamba_l2", "plain_mamba_l3"):
        baseline, ours = (build_reduction(read(f"{name}_{kind}").pruning) for kind in ("evit", "top"))
        assert (baseline.alignment, baseline.order, ours.alignment) == ("none", "score", "hold")
        assert baseline.schedule(196, 24) == ours.schedule(196, 24)


def test_the_papers_schedule():
    config = read("vim_s_top")
    assert config.pruning.after_blocks == (5, 10, 15) and config.pruning.keep_ratio == (0.8,)
    pruning = build_reduction(config.pruning)
    assert isinstance(pruning, Pruning) and (pruning.score, pruning.alignment) == ("clip", "hold")


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_top")])
@pytest.mark.parametrize("method", ["evit", "merge"])
def test_another_method_in_the_place_of_top(name, method):
    config = load(name).get_config()
    config.pruning.method = method
    assert type(build_reduction(RunConfig.from_config_dict(config).pruning)) is METHODS[method]

"""Every file in configs/ is a run that could start."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from top_jax import recipes
from top_jax.build import build_reduction, build_sizes
from top_jax.config import AugmentConfig, PruningConfig, RunConfig
from top_jax.data import rand_augment
from top_jax.evaluation.flops import count_macs
from top_jax.models.registry import BACKBONES
from top_jax.pruning import METHODS, Pruning

FOLDER = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
PRUNED = [name for name in NAMES if name.endswith(("_top", "_evit"))]
# The paper's Table "ImageNet-1K", in our files' names.
TABLE = [
    *(f"{model}{kind}" for model in ("vim_t", "vim_s") for kind in ("", "_evit", "_top")),
    *(f"plain_mamba_l{size}{kind}" for size in (1, 2, 3) for kind in ("", "_evit", "_top")),
    *(f"deit_{size}{kind}" for size in "tsb" for kind in ("", "_evit")),
]


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    return RunConfig.from_config_dict(load(name).get_config())


def test_all_are_there():
    dense = {"vim_t", "vim_s", "vim_b", "vim_cifar10", "vim_digits"}
    study = {f"study_{model}{where}" for model in ("vim", "plain_mamba") for where in ("", "_gpu")}
    assert set(NAMES) == dense | {f"{name}_top" for name in dense} | set(TABLE) | study


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    text = load(name).__doc__
    assert re.search(rf"^python train\.py --config configs/{name}\.py( |$)", text, re.MULTILINE)
    assert re.search(r"^Expected\b.*:", text, re.MULTILINE) and "Measured: " in text
    config = read(name)
    assert ("--config.data.data_dir=" in text) == (config.data.source != "digits")


@pytest.mark.parametrize("name", NAMES)
def test_model_and_pruning_fit(name):
    """Whole models of these sizes are built in tests/models/test_official.py."""
    config = read(name)
    sizes, pruning = (
        build_sizes(config.model),
        build_reduction(config.pruning),
    )
    assert sizes.num_classes == config.model.num_classes
    pruning.check_evidence(BACKBONES[type(sizes)].EVIDENCE)
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


@pytest.mark.parametrize("name", [*TABLE, "vim_b", "vim_b_top"])
def test_imagenet_is_augmented_by_the_recipe(name):
    config, text = read(name), load(name).__doc__
    family = config.model.name.rpartition("_")[0]
    assert config.augment == {"deit": DEIT, "vim": DEIT, "plain_mamba": PLAIN_MAMBA}[family]
    assert config.augment.flip and (config.augment.mix_probability, config.augment.switch_probability) == (1.0, 0.5)
    assert config.data.train_transform == "random_resized_crop" and config.data.min_area == 0.08
    assert config.optimizer.label_smoothing == 0.1
    assert config.optimizer.clip_norm == {"plain_mamba_l1": 5.0, "plain_mamba_l2": 1.0, "plain_mamba_l3": 1.0}.get(
        config.model.name
    )
    if family == "plain_mamba":
        assert config.model.drop_path == (0.4 if config.model.name == "plain_mamba_l3" else 0.2)
    assert "top_jax.recipes" in text or re.search(r"^Recipe: as vim_[ts]_top\.$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["vim_cifar10", "vim_cifar10_top"])
def test_cifar10_has_every_augmentation_on(name):
    augment = read(name).augment
    off = {field for field, value in dataclasses.asdict(augment).items() if not value}
    assert off == set() and augment.repeats > 1 and "top_jax.recipes" in load(name).__doc__


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

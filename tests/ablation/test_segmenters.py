"""mIoU in the place of accuracy: its error over images, its tables, and the numbers of evaluate."""

import csv
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from tests.tiny_segmenter import get_config
from top_jax.ablation import base_pruning, compare, make_grid, run_ablation, summarise
from top_jax.ablation.evaluate import EvaluationImages, miou_of_images
from top_jax.ablation.grid import DENSE, Filled
from top_jax.ablation.picture import draw
from top_jax.ablation.results import common_settings, result_of_images, setting_fields, to_text
from top_jax.ablation.run import Finetune, config_of, run_name
from top_jax.ablation.tables import arrange, as_csv, markdown
from top_jax.build import build_abstract_model, crop_size
from top_jax.config import RunConfig
from top_jax.data import is_dense, open_source
from top_jax.evaluation.segmentation import evaluate_segmenter, numbers
from top_jax.models.weights import weights_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.weights import fill, read_weights, save_weights

BASE = Filled(after_blocks=(1,), keep_ratio=0.5)
NAMES = ("intersection", "predicted", "labelled")


@pytest.fixture(scope="module")
def config():
    config = RunConfig.from_config_dict(get_config())
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema_decay=None))


def made_up(seed, images=400, classes=3):
    """Areas of images that differ in how well they are segmented; the last class occurs nowhere."""
    rng = np.random.default_rng(seed)
    labelled = rng.integers(0, 200, (images, classes)) * np.array([5, 1, 0])
    share = rng.beta(4, 2, (images, 1))
    intersection = (labelled * share).astype(int)
    predicted = intersection + (labelled[:, ::-1] * (1 - share) * np.array([1, 0.5, 0])).astype(int)
    return {"intersection": intersection, "predicted": predicted, "labelled": labelled}


def miou(areas, chosen=slice(None)):
    return numbers({name: areas[name][chosen].sum(axis=0) for name in NAMES})["miou"]


def test_miou_of_images():
    """Their mean is the mIoU; its standard error, and that of a difference, are the bootstrap's."""
    one, other = made_up(0), made_up(1)
    other["labelled"] = one["labelled"]
    values = [miou_of_images(areas) for areas in (one, other)]
    assert [value.mean() for value in values] == pytest.approx([miou(one), miou(other)], abs=1e-12)
    rng = np.random.default_rng(2)
    drawn = [rng.integers(0, 400, 400) for _ in range(2000)]
    resampled = np.array([[miou(areas, chosen) for areas in (one, other)] for chosen in drawn])
    assert values[0].std() / 20 == pytest.approx(resampled[:, 0].std(), rel=0.06)
    assert (values[0] - values[1]).std() / 20 == pytest.approx((resampled[:, 0] - resampled[:, 1]).std(), rel=0.06)
    assert miou_of_images({name: np.zeros((5, 3), int) for name in NAMES}).tolist() == [0] * 5


def row(setting, seed, weights=1):
    areas = made_up(seed, images=20)
    sums = {name: area.sum(axis=0) for name, area in areas.items()}
    return {
        "checkpoint": f"runs/{weights}",
        "weights": weights,
        **setting_fields(setting),
        "finetuned": None,
        "tokens_per_block": [16, 8] if setting.after_blocks else [16, 16],
        "gmacs": {"published": 3.5 if setting.after_blocks else 4.0},
        "backbone_gmacs": {"published": 0.5 if setting.after_blocks else 1.0},
        "images": 20,
        **numbers(sums),
        "miou_of_images": to_text(miou_of_images(areas)),
    }


ZERO, RATIO, NONE = (
    dataclasses.replace(BASE, **x) for x in ({"fill": "zero"}, {"keep_ratio": 0.7}, {"alignment": "none"})
)
ROWS = [row(DENSE, 0), row(DENSE, 1, 2), row(BASE, 2), row(BASE, 3, 2), row(ZERO, 4), row(RATIO, 5), row(NONE, 6)]


def test_tables(tmp_path):
    cells = summarise(ROWS)
    dense, base, zero = cells[:3]
    results = [one["miou"] for one in ROWS]
    assert base.accuracy is None and base.miou.mean == pytest.approx(np.mean(results[2:4]))
    assert base.miou.spread == pytest.approx(np.std(results[2:4], ddof=1))
    assert base.drop.mean == pytest.approx(np.mean(results[:2]) - np.mean(results[2:4]))
    assert zero.drop.mean == pytest.approx(results[0] - results[4]) and dense.drop is None
    paired = result_of_images(ROWS[0]) - result_of_images(ROWS[4])
    assert zero.drop.sampling_error == pytest.approx(paired.std() / np.sqrt(20))
    pair = compare(ROWS, zero, base)
    assert pair.difference.mean == pytest.approx(results[4] - results[2]) and pair.p_value is None

    tables = {table.name: table for table in arrange(cells, setting_fields(BASE))}
    assert list(tables) == ["alignment", "keep_ratio", "fill"]
    assert [cell.fill for cell in tables["fill"].cells] == [None, "frozen", "zero"]
    assert {cell.fill for cell in tables["alignment"].cells} == {None, "frozen"}
    text = markdown(tables.values(), ROWS, "about")
    assert "mIoU and drop" in text and "McNemar" not in text and "accuracy" not in text.lower()
    first, *_ = lines = list(csv.DictReader(io.StringIO(as_csv(tables.values()))))
    assert (first["gmacs_published"], first["backbone_gmacs_published"]) == ("4.0", "1.0")
    assert float(lines[-1]["miou"]) == pytest.approx(results[4]) and lines[-1]["fill"] == "zero"

    draw(cells, setting_fields(BASE), tmp_path / "a.png")
    draw([cell for cell in cells if cell is not zero], setting_fields(BASE), tmp_path / "b.png")
    np.testing.assert_array_equal(imread(tmp_path / "a.png"), imread(tmp_path / "b.png"))  # one fill per picture


def test_first_images(config):
    """A part of a source of label maps is one too; its batches hold whole photographs and their labels."""
    source = open_source(config.data, train=False)
    images = EvaluationImages(source, config.data, img_size=crop_size(config), batch_size=4, limit=6)
    batches = list(images)
    assert is_dense(images._source) and sorted(np.concatenate([b["index"] for b in batches])) == [*range(6)]
    assert batches[0]["image"].shape[1:] == (48, 48, 3) and batches[0]["label"].shape[1:] == (64, 64)
    assert list(images)[0]["image"] is batches[0]["image"]


def test_how_a_fill_is_fine_tuned(config):
    tuned = config_of(config, "runs/a", ZERO, Finetune(7), seed=5)
    assert tuned.model == dataclasses.replace(config.model, fill="zero") and tuned.pruning.after_blocks == (1,)
    assert config_of(config, "runs/a", DENSE, Finetune(7), seed=5).model == config.model
    finetuned = {"steps": 7, "learning_rate": 0.1}
    names = {run_name(1, {**setting_fields(setting), "finetuned": finetuned}, 0) for setting in (BASE, ZERO)}
    assert len(names) == 2
    assert common_settings(config, BASE, None, True)["base"]["fill"] == "frozen"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, config):
    """Weights large enough that pruning changes what is predicted."""
    folder, found = tmp_path_factory.mktemp("segmenters"), []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)

        def values(path, array, rng=rng):
            drawn = rng.normal(size=array.shape)
            return (np.abs(drawn) + 0.5 if "var" in str(path[-1]) else drawn / 3).astype(array.dtype)

        run = RunDirectory(folder / f"seed{seed}")
        run.claim(dataclasses.replace(config, seed=seed))
        save_weights(
            run,
            jax.tree_util.tree_map_with_path(values, weights_of(build_abstract_model(config.model))),
            which=("best",),
        )
        found.append(run.path)
    return found


@pytest.mark.slow
def test_numbers_are_those_of_evaluate(quick_programs, config, checkpoints, tmp_path):
    """2 x 2 windows; settings of shared programs against models built with the setting."""
    base, out, said = base_pruning(config), tmp_path / "out", []
    grid = make_grid(base, tables=("score", "fill"), scores=("clip", "l2"), fills=("frozen", "zero"))
    rows = run_ablation(config, checkpoints, grid, out, base=base, limit_images=24, say=said.append)
    assert len(rows) == 2 * 4 and "miou_vs_gflops.png" in {file.name for file in out.iterdir()}
    assert rows[0]["backbone_gmacs"]["published"] < rows[0]["gmacs"]["published"]
    source = EvaluationImages(
        open_source(config.data, train=False), config.data, img_size=(32, 32), batch_size=8, limit=24
    )._source
    for setting, seed in ((dataclasses.replace(base, fill="zero"), 1), (dataclasses.replace(base, score="l2"), 0)):
        model = build_abstract_model(dataclasses.replace(config.model, fill=setting.fill), setting)
        run = RunDirectory(checkpoints[seed])
        model = fill(model, read_weights(run, "best"))
        want = evaluate_segmenter(model, source, config.data, crop_size=crop_size(config), batch_size=8)
        (found,) = (r for r in rows if r["seed"] == seed and setting_fields(setting).items() <= r.items())
        for name in ("miou", "mean_accuracy", "pixel_accuracy"):
            assert found[name] == pytest.approx(want[name], abs=1e-9)
        assert result_of_images(found).mean() == pytest.approx(found["miou"], abs=1e-12)
    assert len({row["miou"] for row in rows}) == len(rows)
    said.clear()
    assert run_ablation(config, checkpoints, grid, out, base=base, limit_images=24, say=said.append) == rows
    assert len(said) == 1
    assert json.loads((out / "results.json").read_text())["cells"][1]["miou"]["mean"] > 0

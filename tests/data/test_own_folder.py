"""An image folder that says by itself what a run needs: classes, splits, batch sizes."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from top_jax.config import DataConfig, RunConfig
from top_jax.data import infer, open_source
from top_jax.errors import InputError

CONFIG = RunConfig(batch_size=32, data=DataConfig(source="image_folder", infer=True))


def fill(folder, classes, images):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(images):
            Image.fromarray(np.full((6, 6, 3), i, np.uint8)).save(folder / name / f"{i}.png")


def inferred(folder, config=CONFIG):
    return infer(dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=str(folder))))


def names(config, train):
    source = open_source(config.data, train=train)
    return {source.describe(i) for i in range(len(source))}, source


def test_one_folder_is_split(tmp_path):
    fill(tmp_path, ["dog", "cat"], 10)
    config = inferred(tmp_path)
    assert (config.model.num_classes, config.batch_size, config.data.eval_share, config.data.infer) == (
        2,
        4,
        0.2,
        False,
    )
    (train, source), (evaluated, other) = names(config, True), names(config, False)
    assert source.class_names == other.class_names == ("cat", "dog")
    assert np.bincount(source.labels).tolist() == [8, 8] and np.bincount(other.labels).tolist() == [2, 2]
    assert len(train | evaluated) == 20 and not train & evaluated
    assert infer(config) is config
    assert names(dataclasses.replace(config, seed=5), False)[0] == evaluated


def test_a_new_image_moves_few_others(tmp_path):
    fill(tmp_path, ["cat", "dog"], 20)
    before = names(inferred(tmp_path), False)[0]
    Image.new("RGB", (6, 6)).save(tmp_path / "cat" / "new.png")
    assert len(before ^ names(inferred(tmp_path), False)[0]) <= 2


@pytest.mark.parametrize("evaluation", ["val", "validation", "test"])
def test_splits_that_are_there(tmp_path, evaluation):
    fill(tmp_path / "train", ["cat", "dog"], 64)
    fill(tmp_path / evaluation, ["cat", "dog"], 1)
    config = inferred(tmp_path)
    assert (config.data.train_split, config.data.eval_split, config.data.eval_share) == ("train", evaluation, None)
    assert (config.model.num_classes, config.batch_size) == (2, 32)
    assert len(names(config, True)[0]) == 128 and len(names(config, False)[0]) == 2


def test_only_a_train_folder(tmp_path):
    fill(tmp_path / "train", ["cat", "dog", "train"], 2)
    config = inferred(tmp_path)
    assert config.model.num_classes == 3 and config.batch_size == 1
    assert len(names(config, True)[0]) == len(names(config, False)[0]) == 3


def test_what_cannot_be_inferred(tmp_path):
    with pytest.raises(InputError, match="data_dir=FOLDER"):
        infer(CONFIG)
    with pytest.raises(InputError, match="nowhere does not exist.*FOLDER/<class>"):
        inferred(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no class folder"):
        inferred(tmp_path)
    fill(tmp_path, ["cat"], 1)
    with pytest.raises(InputError, match="cat"):
        inferred(tmp_path)
    with pytest.raises(InputError, match="infer=True.*image_folder"):
        DataConfig(infer=True)
    with pytest.raises(InputError, match=r"eval_share=1\.0"):
        DataConfig(source="image_folder", eval_share=1.0)
    with pytest.raises(InputError, match="two names"):
        same = DataConfig(source="image_folder", data_dir=str(tmp_path), eval_share=0.5, eval_split="train")
        open_source(same, train=True)

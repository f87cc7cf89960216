"""The scans that are measured: the sizes of the published models."""

import numpy as np
import pytest

from top_jax.benchmark.cases import MODELS, VIM_SMALL, ScanCase, make_arrays, model_case
from top_jax.models.traversals import walks


def test_lengths_are_those_of_the_schedules():
    lengths = {model.name: (model.tokens, *model.pruned_lengths()) for model in MODELS}
    assert lengths == {
        "ViM-S": (197, 158, 127, 102),
        "ViM-T": (197, 168, 143),
        "ViM-B": (197, 158, 127, 102),
        "PlainMamba-L1": (196, 138, 97, 68),
        "PlainMamba-L3": (196, 138, 97, 68),
    }
    assert {model.name: model.width for model in MODELS} == {
        "ViM-S": 768, "ViM-T": 384, "ViM-B": 1536, "PlainMamba-L1": 384, "PlainMamba-L3": 896,
    }  # fmt: skip


def test_widths_are_those_of_the_models():
    from top_jax.models import model_config

    names = {"ViM-T": "vim_tiny", "ViM-S": "vim_small", "ViM-B": "vim_base"}
    for model in MODELS:
        if model.name in names:
            config = model_config(names[model.name])
            assert (config.inner_dim, config.depth, config.num_patches + 1) == (model.width, model.depth, model.tokens)
            assert config.d_state == model_case(model, "float32").states


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_arrays(directions):
    case = ScanCase("x", 7, 5, 3, directions=directions, dtype="bfloat16", batch=2, decay=True)
    arrays, other = make_arrays(case, 0), make_arrays(case, 1)
    for name, array in arrays.items():
        if name not in ("order", "positions"):
            assert not (np.asarray(array, np.float32) == 0).any(), name
            assert (np.asarray(array) != np.asarray(other[name])).any(), name
    assert (np.diff(np.asarray(arrays["positions"]), axis=-1) > 0).all()
    assert (np.asarray(arrays["A"]) < 0).all()
    if directions == 4:
        assert (np.sort(np.asarray(arrays["order"]), axis=-1) == np.arange(7)).all()
        assert len(arrays["u"]) == len(arrays["delta"]) == 1 and len(arrays["B"]) == 4


def test_dense_orders_are_the_traversals():
    case = model_case(MODELS[-1], "bfloat16")
    orders = np.asarray(make_arrays(ScanCase("x", case.length, 1, 1, directions=4, batch=1), 0)["order"])
    assert (orders[:, 0] == walks((14, 14))).all()


def test_label():
    assert model_case(VIM_SMALL, "bfloat16", length=102, decay=True).label() == "ViM-S L102 bfloat16 decay"

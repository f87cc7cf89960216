"""The scans that are measured: the sizes of the published models."""

import numpy as np
import pytest

from top_jax.benchmark.scans import SCANNED, VIM_SMALL, ScanCase, make_arrays
from top_jax.models.traversals import walks


def test_sizes_are_those_of_the_published_models():
    lengths = {model.label: model.lengths() for model in SCANNED}
    assert lengths == {
        "ViM-S": (197, 158, 127, 102),
        "ViM-T": (197, 168, 143),
        "ViM-B": (197, 158, 127, 102),
        "PlainMamba-L1": (196, 138, 97, 68),
        "PlainMamba-L3": (196, 138, 97, 68),
    }
    cases = [model.scan("bfloat16") for model in SCANNED]
    assert [(case.name, case.width, case.directions) for case in cases] == [
        ("ViM-S", 768, 1), ("ViM-T", 384, 1), ("ViM-B", 1536, 1), ("PlainMamba-L1", 384, 4), ("PlainMamba-L3", 896, 4),
    ]  # fmt: skip
    assert {(case.states, case.batch) for case in cases} == {(16, 128)}
    assert [case.gated for case in cases] == [False] * 3 + [True] * 2


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
    case = SCANNED[-1].scan("bfloat16")
    orders = np.asarray(make_arrays(ScanCase("x", case.length, 1, 1, directions=4, batch=1), 0)["order"])
    assert (orders[:, 0] == walks((14, 14))).all()


def test_label():
    assert VIM_SMALL.scan("bfloat16", length=102, decay=True).label() == "ViM-S L102 bfloat16 decay"

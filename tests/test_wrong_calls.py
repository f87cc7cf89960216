"""Wrong calls of the library: each is an InputError of ours that names what came; none is a traceback, none silent."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import top_jax
from top_jax.config import RunConfig, make_config
from top_jax.errors import InputError
from top_jax.models import abstract_model, model_config, to_grid
from top_jax.pruning import Evit, Merging, Pruning, make_reduction
from top_jax.training import load_checkpoint, train

SMALL = dict(num_classes=3, img_size=16, patch_size=8, embed_dim=24, depth=2)
FAMILIES = {"vim_tiny": {}, "plain_mamba_l1": {}, "deit_tiny": {}}
NAN, INF = float("nan"), float("inf")
HUGE = 10**400
PIXELS = np.zeros((9, 9, 3), np.uint8)
SHORT = 60  # characters of a value that a message repeats


class Row(NamedTuple):
    """A wrong call: its name, the call, what its message must match, and how it must show the value."""

    name: str
    call: Callable[[], Any]
    key: str
    shown: str = ""


def rows_of(what: str, call: Callable[..., Any], wrong: dict[str, list[Any]], **rest: Any) -> list[Row]:
    """One row for each wrong value of each keyword; the error must name the keyword and show the value."""
    return [
        Row(
            f"{what}({name}={type(value).__name__} #{place})",
            functools.partial(call, **{**rest, name: value}),
            name,
            shown(value),
        )
        for name, values in wrong.items()
        for place, value in enumerate(values)
    ]


def shown(value: Any) -> str:
    """Returns how a message must show a value, or an item of it; what is long by its type, dtype, shape or place."""
    if getattr(value, "shape", ()) != ():
        return f"{re.escape(str(value.dtype))}|{re.escape(str(tuple(value.shape)))}|image [0-9]|=.1.0, 1.0."
    texts = [repr(value)]
    if isinstance(value, str) and value:
        texts = [repr(value)[1:-1]]
    elif isinstance(value, dict):
        texts += [*map(repr, value.values()), *map(str, value)]
    elif isinstance(value, tuple | list | set):
        texts += map(repr, value)
    if len(texts[0]) > SHORT or "\n" in texts[0]:
        texts = [type(value).__name__, texts[0][:SHORT]]
    return "|".join(map(re.escape, texts))


@functools.cache
def small_vim(train: bool = False) -> Any:
    """A model whose weights are zero: nothing is compiled to draw them."""
    graphdef, state = nnx.split(abstract_model("vim_tiny", **SMALL, drop_path=0.1))
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), state))
    if train:
        model.train()
    return model


COUNTS = [0, -1, 1.5, "8", None, True, 1j, HUGE, np.ones(2), (8,)]
FLAGS = ["yes", 1, None, 0.0, np.ones(2)]
SHARES = [0, -0.1, 1.1, NAN, INF, "0.5", None, True, 0.5j]
SIDES = [0, -8, True, 16.0, "16", (), (16, 16, 16), (16, 0), (16, "16"), (16, 16.0), 10**10, np.ones((2, 2)), {16, 32}]


def models() -> list[Row]:
    every = {
        "num_classes": COUNTS[1:],  # 0: no head
        **{name: COUNTS for name in ("patch_size", "embed_dim", "depth")},
        "img_size": [*SIDES, None],
        "drop_path": [-0.1, 1, NAN, "0.1", None, 0.1j, True],
        "dtype": ["foo", "int32", "float64", "complex64", None, 3, True, ("float32",)],
        "remat": FLAGS,
        "pruning": ["top", 0.7, Pruning, (5, 10), True],
        "rngs": [0, jax.random.key(0), jax.random.PRNGKey(0), "0", nnx.Rngs(), nnx.Rngs(dropout=0)],
    }
    found = []
    for name in FAMILIES:
        for key, values in every.items():  # create_model checks all before it draws a weight
            sizes = {k: v for k, v in SMALL.items() if k != key}
            found += rows_of(name, functools.partial(top_jax.create_model, name), {key: values}, **sizes)
    mamba = {
        "stride": [0, 1.5, "8", True],
        "d_state": COUNTS,
        "expand": COUNTS,
        "d_conv": COUNTS,
        "implementation": ["cuda", None, 3, ["xla"], np.ones(2)],
    }
    found += rows_of("vim_tiny", functools.partial(model_config, "vim_tiny"), mamba)
    plain = {
        "num_convs_patch_embed": [-1, 1.5, "1", None, True],
        "layers_with_dwconv": [0, "0", (99,), (-1,), (0.0,), (True,), None, {0: 1}],
        "reorder_parameters": FLAGS,
        "fuse": [1],
    }
    found += rows_of("plain_mamba_l1", functools.partial(model_config, "plain_mamba_l1"), plain)
    heads = {
        "num_heads": [0, -1, 5, 1.5, "3", None, True],
        "mlp_ratio": [0, -1, NAN, INF, "4", None, True, 1e300],
    }
    found.append(Row("deit(stride=8)", functools.partial(model_config, "deit_tiny", stride=8), "stride"))
    found += rows_of("deit_tiny", functools.partial(model_config, "deit_tiny"), heads)
    for name in ("vim_huge", "", None, 3, ["vim_tiny"], np.ones(2), b"vim_tiny"):
        found.append(
            Row(f"create_model({name!r})", functools.partial(top_jax.create_model, name), "model", shown(name))
        )
    return found


def reductions() -> list[Row]:
    blocks = [
        0,
        -1,
        1.5,
        "5",
        b"\x05",
        None,
        True,
        (5, 3),
        (5, 5),
        (0,),
        (1.5,),
        ("5",),
        (True,),
        {5: 1},
        5j,
        jnp.ones(2, jnp.int32),
        np.ones((1, 1), int),
        np.array(5.0),
    ]
    ratios = [*SHARES, (0.5, 0.5), ("0.5",), (NAN,), np.ones(2), jnp.ones(1), {}, (0.5j,)]
    every = {"after_blocks": blocks, "keep_ratio": ratios}
    scored = {
        "score": ["best", None, 3, ["clip"], np.ones(2)],
        "order": ["best", None, 1],
        "seed": [-1, 2**32, 1.5, "0", None, True, jax.random.key(0), HUGE],
    }
    alignment = {"alignment": ["held", None, 1, ("hold",), np.ones(2)]}
    found = []
    for kind, wrong in (
        (Pruning, every | scored | alignment),
        (Evit, every | scored | {"fuse": FLAGS}),
        (Merging, every | alignment),
    ):
        for key, values in wrong.items():
            found += rows_of(
                kind.__name__, kind, {key: values}, **({} if key == "after_blocks" else {"after_blocks": (1,)})
            )
    for method in ("tome", None, ["top"], 3):
        call = functools.partial(make_reduction, method)
        found.append(Row(f"make_reduction({method!r})", call, "pruning method", shown(method)))
    return found


def forward() -> list[Row]:
    model, training = small_vim(), small_vim(train=True)
    shapes = abstract_model("vim_tiny", **SMALL)
    images = np.zeros((2, 16, 16, 3), np.float32)
    wrong = [
        None,
        [[0.0]],
        "photo.jpg",
        Image.new("RGB", (16, 16)),
        1.0,
        images[0],
        images[:0],
        images.astype(np.uint8),
        images.astype(np.complex64),
        images.astype(bool),
        np.moveaxis(images, -1, 1),
        images[..., :1],
        images[:, :8],
        jax.ShapeDtypeStruct(images.shape, "float32"),
    ]
    found = [Row(f"model(#{place})", functools.partial(model, value), "images") for place, value in enumerate(wrong)]
    keys = [
        0,
        jax.random.key(0),
        jax.random.PRNGKey(0),
        jax.random.split(jax.random.key(0), 3),
        np.zeros((2, 2), np.float32),
        [1, 2],
        "keys",
    ]
    found += rows_of("model", functools.partial(model, images), {"keys": keys})
    stages = [0, 2, None, "1", (0,), (3,), (1.0,), (True,), (None,), {1: 1}, jnp.ones(1), np.ones(1)]
    found += rows_of("features", functools.partial(model.features, images), {"stages": stages, "watch": [1, "print"]})
    found.append(Row("model of shapes", functools.partial(shapes, images), "abstract_model"))
    found.append(Row("train mode without keys", lambda: jax.eval_shape(lambda: training(images)), "keys"))
    features = jax.eval_shape(model.features, images)
    found += [
        Row(f"to_grid(#{place})", functools.partial(to_grid, value), "features")
        for place, value in enumerate((None, images, [features], 3))
    ]
    found += rows_of("to_grid", functools.partial(to_grid, features), {"fill": ["mean", None, 0, ["zero"], np.ones(2)]})
    return found


def scans() -> list[Row]:
    batch, length, width, states = 2, 4, 3, 5
    good = dict(
        u=np.ones((batch, length, width)),
        delta=np.ones((batch, length, width)),
        A=-np.ones((width, states)),
        B=np.ones((batch, length, states)),
        C=np.ones((batch, length, states)),
        D=np.ones(width),
        z=np.ones((batch, length, width)),
        delta_bias=np.ones(width),
    )
    good = {name: array.astype(np.float32) for name, array in good.items()}
    wrong: dict[str, list[Any]] = {}
    for name, array in good.items():
        optional = name in ("D", "z", "delta_bias")
        wrong[name] = [
            array.tolist(),
            "x",
            1.0,
            array.astype(np.float64),
            array.astype(np.complex64),
            array.astype(np.int32),
            array[..., None],
            jax.ShapeDtypeStruct(array.shape, "float32"),
            *([] if optional else [None]),
        ]
    places = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    wrong |= {
        "alignment": ["held", None, 1, np.ones(2)],
        "reverse": ["yes", 1, None, [True]],
        "implementation": ["cuda", None, np.ones(2)],
        "check_order": FLAGS,
        "positions": [
            places[0],
            places[:, ::-1],
            places.astype(np.float32),
            places.astype(np.int8),
            places.tolist(),
            3,
            "x",
        ],
    }
    found = rows_of("selective_scan", top_jax.ops.selective_scan, {k: v for k, v in wrong.items()}, **good)
    several = {name: array if name == "z" else array[None] for name, array in good.items()}
    more = {
        "reverse": ["yes", True, (), (1,), ("no",), None, np.array([True])],
        "order": [places, places[None] + 1, places.tolist(), 0],
        "reorder_parameters": FLAGS,
        "score": ["best", 1, ["clip"]],
        "blocks": [1, "auto"],
        "alignment": ["decay", 0],
        "u": [None, [1.0], several["u"][0]],
        "A": [None, several["A"][0]],
    }
    for key, values in more.items():
        rest = {**several, "reverse": (False,)}
        found += rows_of(
            "directional_scan",
            top_jax.ops.directional_scan,
            {key: values},
            **{k: v for k, v in rest.items() if k != key},
        )
    return found


def images_and_files() -> list[Row]:
    closed = Image.open(io.BytesIO(png()))
    closed.close()
    wrong = [
        None,
        3,
        1.5,
        "",
        "nowhere.jpg",
        "a\0b",
        ".",
        Path("nowhere"),
        b"",
        b"no image",
        png()[:40],
        PIXELS.astype(np.float32),
        PIXELS[0],
        PIXELS[:0],
        PIXELS[..., :1],
        np.moveaxis(PIXELS, -1, 0),
        PIXELS.tolist(),
        jnp.zeros((9, 9, 3), jnp.uint8),
        Image.new("RGB", (0, 5)),
        Image.new("F", (5, 5)),
        closed,
        io.BytesIO(png()),
        memoryview(png()),
        ["a.png"],
        np.moveaxis(PIXELS, -1, 0)[:1],
        Image.new("I", (5, 5), -1),
    ]
    found = [
        Row(f"preprocess(#{place})", functools.partial(top_jax.preprocess, value), "image|pixels")
        for place, value in enumerate(wrong)
    ]
    numbers = [None, 0.5, "abc", (1, 2), (1, 2, 3, 4), (1, 2, NAN), (1, 2, INF), (1, 2, "3"), (1, 2, 3j), {1, 2, 3}]
    settings = {
        "img_size": [*SIDES, None],
        "eval_crop": [*SHARES, 2, 1e-9],
        "mean": numbers,
        "std": [*numbers, 0, (0, 1, 1), (1, 1, -1)],
        "exif_rotate": FLAGS,
    }
    found += rows_of("preprocess", functools.partial(top_jax.preprocess, PIXELS), settings)
    paths = [None, 3, "", b"run", "a\0b", ["run"], "nowhere"]
    found += [
        Row(f"load_checkpoint({path!r})", functools.partial(load_checkpoint, path), "path|workdir|nowhere", shown(path))
        for path in paths
    ]
    found += [
        Row(
            f"load_torch_checkpoint({path!r})",
            functools.partial(top_jax.load_torch_checkpoint, path, "vim_tiny", **SMALL),
            "path|nowhere",
            shown(path),
        )
        for path in paths
    ]
    torch = {
        "ema": FLAGS,
        "pruning": [0.7, "top"],
        "checkpoint_img_size": [0, "16", 1.5, True],
        "name": ["vim", 3],
        "depth": [0, "2"],
    }
    call = functools.partial(top_jax.load_torch_checkpoint, "nowhere.pth", "vim_tiny", height=3)
    found.append(Row("load_torch_checkpoint(height=3)", call, "height"))
    for key, values in torch.items():
        found += rows_of(
            "load_torch_checkpoint",
            functools.partial(top_jax.load_torch_checkpoint, "nowhere.pth"),
            {key: values},
            **({} if key == "name" else {"name": "vim_tiny"}),
            **({} if key == "depth" else {"depth": 1}),
        )
    found = [row._replace(key="model") if "(name=" in row.name else row for row in found]
    model = small_vim()
    found += [
        Row(
            f"save_torch_checkpoint(#{place})",
            functools.partial(top_jax.save_torch_checkpoint, value, "nowhere/a.safetensors"),
            "model",
        )
        for place, value in enumerate((None, {}, "vim_tiny", abstract_model("vim_tiny", **SMALL)))
    ]
    found += rows_of(
        "save_torch_checkpoint",
        functools.partial(top_jax.save_torch_checkpoint, model),
        {"path": [None, 3, "", b"a.pth", "a\0.pth"]},
    )
    found += rows_of(
        "save_torch_checkpoint",
        functools.partial(top_jax.save_torch_checkpoint, model, "nowhere/a.safetensors"),
        {"overwrite": FLAGS, "class_names": ["abc", (1, 2, 3), ("a", "b", None)]},
    )
    return found


def runs() -> list[Row]:
    found = [
        Row(f"train(#{place})", functools.partial(train, value, "nowhere"), "config")
        for place, value in enumerate((None, {}, make_config(), "a.py", RunConfig))
    ]
    found += [
        Row(f"train(workdir={path!r})", functools.partial(train, RunConfig(), path), "workdir", shown(path))
        for path in (None, 3, "", b"run", "gs://bucket")
    ]
    sections = {
        "batch_size": [0, "8", 1.5, True, [8]],
        "model": [5, "vim_tiny", None, {"name": 3}, {"width": 1}, {1: 2, "a": 3}],
        "data": [{"mean": 0.5}, {"mean": "abc"}, {"std": (0, 1, 1)}],
        "pruning": [{"keep_ratio": "half"}, {"seed": "0"}],
        "seed": [-1, 1.0, "0"],
        "epochs": ["30", 0, True],
    }
    found.append(Row("make_config(epoch=3)", functools.partial(make_config, epoch=3), "config.epoch"))
    found += rows_of("make_config", make_config, sections)
    return found + rows_of("RunConfig", RunConfig, {"batch_size": ["8", 0, 1j], "epochs": ["30", 0], "seed": ["0", -1]})


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


TABLES = (models, reductions, forward, scans, images_and_files, runs)


def test_the_tables_are_long():
    assert sum(len(table()) for table in TABLES) >= 800


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.usefixtures("without_type_checks")
def test_wrong_calls(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = []
    rows = table()
    for name, call, key, value in rows:
        try:
            result = call()
        except InputError as error:  # which only top_jax raises
            line, notes = str(error), getattr(error, "__notes__", [])
            if "\n" in line or notes or not (re.search(key, line) and re.search(value, line)):
                wrong.append(f"{name}: does not name {key} and show {value} on one line: {error} {notes}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:120]}")
        else:
            wrong.append(f"{name}: accepted: {type(result).__name__}")
    assert not wrong, f"{len(wrong)} of {len(rows)}:\n" + "\n".join(wrong)
    assert not list(tmp_path.iterdir())  # nothing half done

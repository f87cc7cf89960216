"""Checkpoints: every bit comes back, `best` is the best, and what does not fit is refused by name."""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.tree_util import keystr, tree_leaves_with_path
from small_models import filled

import top_jax
from top_jax.build import build_abstract_model
from top_jax.config import ModelConfig, OptimizerConfig, PruningConfig, RunConfig
from top_jax.errors import InputError, RunError
from top_jax.models.layers import BatchNorm, DropPath
from top_jax.models.weights import split_weights, statistics_of, weights_of
from top_jax.training import saved_weights
from top_jax.training.checkpoints import Checkpoints
from top_jax.training.run_directory import RunDirectory
from top_jax.training.saved_weights import find_weights, initial_weights
from top_jax.training.steps import create_state
from top_jax.training.weights import load_checkpoint, read_weights, save_weights

MODEL = ModelConfig(num_classes=3, img_size=(8,), patch_size=4, embed_dim=16, depth=2, d_state=4)
WITH_STATISTICS = dataclasses.replace(MODEL, name="plain_mamba_l1", layers_with_dwconv=(0,))
DATA_STATE = {"batches": 5, "evaluated": 1}


def make_state(step=1, *, with_ema=True, scale=1.0):
    w = np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32) * np.float32(scale)
    params = {"a": {"w": jnp.asarray(w)}, "b": jnp.asarray(np.array([1e-42, -0.0, 3e38], np.float32))}
    state, opt_state = updated_state(params, with_ema=with_ema)
    state = dataclasses.replace(state, step=jnp.asarray(step, jnp.int32), opt_state=opt_state)
    return state if state.ema is None else dataclasses.replace(state, ema=scaled(0.5, params))


@functools.partial(jax.jit, static_argnames="with_ema")
def updated_state(params, *, with_ema):
    optimizer = optax.adamw(1e-3)
    state = create_state(params, {}, optimizer, seed=7, with_ema=with_ema)
    return state, optimizer.update(params, state.opt_state, params)[1]


@functools.partial(jax.jit, static_argnames="with_ema")
def first_state(params, stats, *, with_ema):
    """One program instead of one for every shape."""
    return create_state(params, stats, optax.sgd(1.0), seed=0, with_ema=with_ema)


def scaled(factor, weights):
    """On the host: JAX would compile a product for every shape."""
    return jax.tree.map(lambda a: jax.device_put(np.asarray(a) * np.asarray(factor, a.dtype)), weights)


def assert_bit_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("with_ema", [True, False])
def test_every_bit_comes_back(tmp_path, with_ema):
    state = make_state(3, with_ema=with_ema)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state) is None and checkpoints.latest_step() is None
        checkpoints.save(state, DATA_STATE)
        checkpoints.wait()
    like = make_state(1, with_ema=with_ema, scale=0.0)
    with Checkpoints(tmp_path) as checkpoints:
        restored, data_state = checkpoints.restore(like)
    assert_bit_equal(restored, state)
    assert data_state == DATA_STATE
    assert (restored.ema is None) == (not with_ema)


def test_a_step_may_go_on_while_its_state_is_written(tmp_path):
    """The training step donates its state, whose buffers a save in the background may still read."""
    optimizer = optax.sgd(1.0)
    params = {f"w{i}": jnp.full((1 << 20,), float(i)) for i in range(8)}
    state = create_state(params, {}, optimizer, seed=0, with_ema=False)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(dataclasses.replace(state, step=jnp.asarray(1, jnp.int32)), DATA_STATE)
        for _ in range(3):
            params = overwrite(params)
        jax.block_until_ready(params)
        checkpoints.wait()
        like = create_state({name: jnp.zeros(1 << 20) for name in params}, {}, optimizer, seed=0, with_ema=False)
        restored, _ = checkpoints.restore(like)
    for i in range(8):
        assert (np.asarray(restored.params[f"w{i}"]) == i).all()


def test_no_room(tmp_path, monkeypatch):
    """Looked for before anything is written."""
    state = make_state(5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(4), DATA_STATE)
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_900_000))
        with pytest.raises(RunError, match="needs 2 MB .* 2 MB left; .* step 4 is kept"):
            checkpoints.save(state, DATA_STATE)
        with pytest.raises(RunError, match="the disk is full"):
            checkpoints.save_if_best(state, 0.5)
    assert [path.name for path in (tmp_path / "latest").iterdir()] == ["4"] and best_steps(tmp_path) == []


OUT_OF_MEMORY = [MemoryError("no memory"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes")]


@pytest.mark.slow
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_no_damage(tmp_path, monkeypatch, error):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step), DATA_STATE)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "restore", raises(error))
            with pytest.raises(type(error)) as caught:
                checkpoints.restore(make_state())
        assert caught.value is error
        assert latest_steps(tmp_path) == ["1", "2"] and not (tmp_path / "damaged").exists()
        assert_bit_equal(checkpoints.restore(make_state())[0], make_state(2))


def raises(error):
    def raise_it(*arguments, **options):
        raise error

    return raise_it


def latest_steps(path):
    return sorted(folder.name for folder in (path / "latest").iterdir())


OTHER_LAYOUTS = {
    "shape": (lambda w: jnp.zeros((4, 4)), r"weights\.params\.a\.w \(float32\[4, 3\] there, float32\[4, 4\] here\)"),
    "dtype": (
        lambda w: w.astype(jnp.float16),
        r"weights\.params\.a\.w \(float32\[4, 3\] there, float16\[4, 3\] here\)",
    ),
    "more": (lambda w: {"x": w}, r"weights\.params\.a\.w\.x \(absent there, float32\[4, 3\] here\)"),
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_another_layout_is_no_damage(tmp_path, name):
    """Nor is it taken for the run's: it stays where it is, and the first difference is named."""
    change, difference = OTHER_LAYOUTS[name]
    state = make_state(with_ema=False)
    params = {**state.params, "a": {"w": change(state.params["a"]["w"])}}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step, with_ema=False), DATA_STATE)
        with pytest.raises(InputError, match=f"latest/2 .*{difference}"):
            checkpoints.restore(dataclasses.replace(state, params=params))
        with pytest.raises(InputError, match=r"weights\.ema\.a\.w \(absent there"):
            checkpoints.restore(make_state(with_ema=True))
        with pytest.raises(InputError, match=r"progress\.opt_state\..* \(.* absent here\)"):
            checkpoints.restore(dataclasses.replace(state, opt_state=()))
        assert latest_steps(tmp_path) == ["1", "2"] and not (tmp_path / "damaged").exists()
        assert_bit_equal(checkpoints.restore(state)[0], make_state(2, with_ema=False))


def test_numbered_blocks_of_another_layout(tmp_path):
    """Twelve of them: their order, by which the seal is read, is that of numbers, not of names."""

    def state_of(width):
        params = {"blocks": {i: jnp.full((width,), float(i)) for i in range(12)}}
        return create_state(params, {}, optax.adamw(1e-3), seed=0, with_ema=False)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(dataclasses.replace(state_of(3), step=jnp.asarray(1, jnp.int32)), DATA_STATE)
        with pytest.raises(InputError, match=r"weights\.params\.blocks\.0 \(float32\[3\] there, float32\[4\] here\)"):
            checkpoints.restore(state_of(4))
    assert latest_steps(tmp_path) == ["1"]


def test_latest_keeps_two(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step), DATA_STATE)
        checkpoints.save(make_state(3, scale=9.0), DATA_STATE)  # a step is saved once
        checkpoints.wait()
        assert sorted(path.name for path in (tmp_path / "latest").iterdir()) == ["2", "3"]
        assert_bit_equal(checkpoints.restore(make_state())[0], make_state(3))


def best_steps(tmp_path):
    return sorted(path.name for path in (tmp_path / "best").iterdir())


def test_best(tmp_path):
    """Only a higher accuracy replaces it, in this start or a later one."""
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_score() is None
        for step, accuracy in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6)):
            checkpoints.save_if_best(make_state(step), accuracy)
        checkpoints.wait()
        assert checkpoints.best_score() == 0.7 and best_steps(tmp_path) == ["2"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_if_best(make_state(5), 0.65)
        assert checkpoints.best_score() == 0.7
        checkpoints.save_if_best(make_state(6), 0.8)
        assert checkpoints.best_score() == 0.8
    assert best_steps(tmp_path) == ["6"]


@pytest.mark.parametrize("step", [4, 6])
def test_best_of_a_step_that_a_killed_start_had_passed(tmp_path, step):
    """Numbers may differ a little between machines: the better one is kept, whichever step it is of."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_if_best(make_state(6), 0.5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_if_best(make_state(step), 0.9)
        assert checkpoints.best_score() == 0.9
    assert best_steps(tmp_path) == [str(step)]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Makes a run directory as train.py leaves it; averaged weights are half of the weights, `latest` twice `best`.

    Equal checkpoints are saved once and copied. Returns all weights of `best`.
    """

    @functools.cache
    def saved(which, ema_decay, model):
        path = tmp_path_factory.mktemp("checkpoints")
        built = filled(build_abstract_model(model), scale=0.3)
        best = weights_of(built)
        with Checkpoints(path) as checkpoints:
            for name in which:
                weights = scaled(2, best) if name == "latest" else best
                params, stats = split_weights(weights, like=statistics_of(built))
                state = first_state(params, stats, with_ema=ema_decay is not None)
                if state.ema is not None:
                    state = dataclasses.replace(state, ema=scaled(0.5, weights))
                if name == "latest":
                    checkpoints.save(dataclasses.replace(state, step=jnp.asarray(4, jnp.int32)), DATA_STATE)
                else:
                    checkpoints.save_if_best(dataclasses.replace(state, step=jnp.asarray(3, jnp.int32)), 0.5)
        return path, best

    def make(path, *, which=("latest", "best"), ema_decay=None, model=MODEL, **settings):
        run = RunDirectory(path)
        run.claim(RunConfig(model=model, optimizer=OptimizerConfig(ema_decay=ema_decay), **settings))
        checkpoints, best = saved(which, ema_decay, model)
        shutil.copytree(checkpoints, run.checkpoints)
        return best

    return make


@pytest.mark.parametrize("model", [MODEL, pytest.param(WITH_STATISTICS, marks=pytest.mark.slow)])
def test_load_checkpoint(model, tmp_path, make_run):
    """Every weight, statistics included."""
    best = make_run(tmp_path, ema_decay=0.9, model=model)
    assert_bit_equal(weights_of(top_jax.load_checkpoint(tmp_path)), scaled(0.5, best))  # averaged
    assert_bit_equal(weights_of(load_checkpoint(tmp_path, ema=False)), best)
    assert_bit_equal(weights_of(load_checkpoint(tmp_path, "latest")), best)
    loaded = load_checkpoint(str(tmp_path), which="latest", ema=False)
    assert_bit_equal(weights_of(loaded), scaled(2, best))
    assert all(module.deterministic for _, module in nnx.iter_modules(loaded) if isinstance(module, DropPath))
    norms = [module for _, module in nnx.iter_modules(loaded) if isinstance(module, BatchNorm)]
    assert len(norms) == (0 if model is MODEL else 3) and all(norm.use_running_average for norm in norms)
    assert jax.eval_shape(loaded, jnp.zeros((1, 8, 8, 3))).shape == (1, 3)


def test_load_checkpoint_has_the_runs_pruning(tmp_path, make_run):
    make_run(tmp_path, pruning=PruningConfig(after_blocks=(1,), keep_ratio=(0.5,), alignment="decay"))
    pruning = load_checkpoint(tmp_path).reduction
    assert pruning.after_blocks == (1,) and pruning.ratios == (0.5,) and pruning.alignment == "decay"


def test_load_checkpoint_refuses(tmp_path, make_run):
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    make_run(tmp_path / "run", which=("latest",))
    with pytest.raises(InputError, match="config.json is a file.*load_torch_checkpoint"):
        load_checkpoint(tmp_path / "run" / "config.json")
    with pytest.raises(InputError, match="run is a run directory.*load_checkpoint"):
        top_jax.load_torch_checkpoint(tmp_path / "run")
    with pytest.raises(InputError, match="which='newest'"):
        load_checkpoint(tmp_path / "run", "newest")
    with pytest.raises(InputError, match="no 'best' checkpoint"):
        load_checkpoint(tmp_path / "run", "best")
    with pytest.raises(InputError, match="ema=False, --noema"):
        load_checkpoint(tmp_path / "run", "latest", ema=True)
    assert not (tmp_path / "nowhere").exists() and not list((tmp_path / "run").glob("checkpoints/best/*"))
    (tmp_path / "run" / "checkpoints" / "best").rmdir()
    with pytest.raises(InputError, match="no 'best' checkpoint"):
        load_checkpoint(tmp_path / "run", "best")
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()
    (tmp_path / "run" / "config.json").write_text('{"seed"')
    with pytest.raises(InputError, match=r"config\.json"):
        load_checkpoint(tmp_path / "run", "latest")


@pytest.mark.slow
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("which", ["best", "latest"])
def test_load_checkpoint_without_memory(tmp_path, monkeypatch, error, which, make_run):
    make_run(tmp_path)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", raises(error))
    with pytest.raises(type(error)) as caught:
        load_checkpoint(tmp_path, which)
    assert caught.value is error


def test_load_checkpoint_of_another_layout(tmp_path, make_run):
    """A config.json that is not the checkpoint's: no damage, and no advice to delete anything."""
    make_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["d_state"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    for which, step in (("best", 3), ("latest", 4)):
        with pytest.raises(
            InputError, match=rf"{which}/{step} .*A_log \(float32\[32, 4\] there, float32\[32, 8\] here"
        ):
            load_checkpoint(tmp_path, which)


@pytest.mark.parametrize("model", [MODEL, WITH_STATISTICS])
def test_converted_weights_are_best_and_latest(model, tmp_path):
    weights = weights_of(filled(build_abstract_model(model), scale=0.3))
    run = RunDirectory(tmp_path)
    run.claim(RunConfig(model=model))
    save_weights(run, weights)
    for which in ("best", "latest"):
        assert_bit_equal(read_weights(run, which), weights)


@pytest.mark.parametrize("model", [MODEL, WITH_STATISTICS])
def test_init_from_a_dense_run(model, tmp_path, make_run):
    """Pruning has no weights: the dense ones, best and averaged, are the pruned run's first."""
    dense = make_run(tmp_path, ema_decay=0.9, model=model)
    pruning = PruningConfig(after_blocks=(1,), keep_ratio=(0.5,))
    weights = initial_weights(RunConfig(model=model, pruning=pruning, init_from=str(tmp_path)))
    assert_bit_equal(weights, scaled(0.5, dense))


def test_without_statistics_the_files_are_as_ever(tmp_path, make_run):
    """Releases before BatchNorm wrote and read the parameters and nothing else."""
    make_run(tmp_path)
    params = nnx.to_pure_dict(nnx.state(build_abstract_model(MODEL), nnx.Param))
    for which, step in (("best", 3), ("latest", 4)):
        with ocp.StandardCheckpointer() as reader:
            found = reader.restore(tmp_path / "checkpoints" / which / str(step) / "weights")
        paths = [
            {keystr(path, simple=True, separator=".") for path, _ in tree_leaves_with_path(tree)}
            for tree in (found, {"params": params})
        ]
        assert paths[0] == paths[1]


def test_random_weights_follow_the_seed():
    first, again, other = (initial_weights(RunConfig(model=MODEL, seed=seed)) for seed in (1, 1, 2))
    assert_bit_equal(first, again)
    assert (np.asarray(first["head"]["kernel"]) != np.asarray(other["head"]["kernel"])).any()


def test_init_from_what_does_not_fit(tmp_path, make_run):
    make_run(tmp_path)

    def start(**changes):
        return find_weights(tmp_path).for_model(dataclasses.replace(MODEL, **changes))

    with pytest.raises(InputError, match="3 classes.* 10"):
        start(num_classes=10)
    with pytest.raises(InputError, match=r"blocks\.2\..*\(absent there, float32.* here\)"):
        start(depth=3)
    with pytest.raises(InputError, match=r"backward\.A_log \(float32\[32, 4\] there, float32\[32, 8\] here"):
        start(d_state=8)
    with pytest.raises(InputError, match="nowhere"):
        find_weights(tmp_path / "nowhere").for_model(MODEL)
    start(drop_path=0.3, dtype="bfloat16")  # no parameter of another shape


@pytest.mark.parametrize(
    "changes, value", [({"img_size": (4, 16)}, "1 x 4"), ({"stride": 2, "img_size": (6,)}, "stride 2")]
)
def test_init_from_another_grid_of_as_many_patches(tmp_path, monkeypatch, changes, value):
    run, texts = RunDirectory(tmp_path), []
    model = dataclasses.replace(MODEL, img_size=(8,), patch_size=4)
    run.claim(RunConfig(model=model))
    save_weights(run, weights_of(filled(build_abstract_model(model), scale=0.3)))

    def warning(text, *values):
        if "positions" in text:  # Orbax warns too
            texts.append(text % values)

    monkeypatch.setattr(saved_weights.logging, "warning", warning)
    find_weights(tmp_path).for_model(model)
    assert not texts
    find_weights(tmp_path).for_model(dataclasses.replace(model, **changes))
    (text,) = texts
    assert "2 x 2" in text and "stride 4" in text and value in text


@pytest.mark.torch
def test_init_from_an_official_file(tmp_path, micro):
    import torch

    classes = micro.config["num_classes"]
    content = {name: torch.tensor(value) for name, value in micro.weights.items()}
    torch.save({"model": content}, tmp_path / "vim.pth")
    size = micro.config["img_size"]
    model = ModelConfig(**{**micro.config, "img_size": (size,) if isinstance(size, int) else size})
    pruning = PruningConfig(after_blocks=(1,), keep_ratio=(0.5,))
    params = initial_weights(RunConfig(model=model, pruning=pruning, init_from=str(tmp_path / "vim.pth")))
    np.testing.assert_array_equal(params["head"]["kernel"], micro.weights["head.weight"].T)
    with pytest.raises(InputError, match=rf"head\.weight \({classes}, .*\) instead of \({classes + 1}, "):
        find_weights(tmp_path / "vim.pth").for_model(dataclasses.replace(model, num_classes=classes + 1))


def test_claim_refuses_another_runs_directory(tmp_path, make_run):
    config = RunConfig(model=MODEL)
    make_run(tmp_path)
    RunDirectory(tmp_path).claim(config)  # its own
    free = dataclasses.replace(config, log_every=7, data=dataclasses.replace(config.data, num_workers=3))
    RunDirectory(tmp_path).claim(free)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(InputError, match=r"seed 0 there, 1 here"):
        RunDirectory(tmp_path).claim(dataclasses.replace(config, seed=1))
    assert (tmp_path / "config.json").read_text() == before
    assert json.loads(before)["log_every"] == 7


def test_claim_recognises_a_run_however_it_is_spelled(tmp_path, make_run):
    """Older releases wrote out what is now left to the model and to the pruning method."""
    pruning = PruningConfig(after_blocks=(1,), keep_ratio=(0.5,))
    config = RunConfig(model=MODEL, pruning=pruning)
    make_run(tmp_path, pruning=pruning)
    content = config.to_dict()
    model = ("name", "num_classes", "img_size", "patch_size", "stride", "embed_dim", "depth", "d_state")
    content["model"] = {key: content["model"][key] for key in model} | {"dtype": "float32", "implementation": "auto"}
    spelled = {"score": "clip", "alignment": "hold", "order": "position", "seed": 0}
    content["pruning"] = {"after_blocks": [1], "keep_ratio": [0.5], **spelled}
    RunDirectory(tmp_path).write_json("config.json", content)
    RunDirectory(tmp_path).claim(config)
    other = dataclasses.replace(config, pruning=dataclasses.replace(pruning, alignment="decay"))
    with pytest.raises(InputError, match=r"pruning\.alignment 'hold' there, 'decay' here"):
        RunDirectory(tmp_path).claim(other)
    with pytest.raises(InputError, match=r"\(model\.implementation 'auto' there, 'xla' here\)"):
        RunDirectory(tmp_path).claim(
            dataclasses.replace(config, model=dataclasses.replace(MODEL, implementation="xla"))
        )


def test_environment_is_written(tmp_path):
    RunDirectory(tmp_path).claim(RunConfig())
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content["top_jax"] == top_jax.__version__ and content["packages"]["jax"] == jax.__version__
    assert content["devices"] and len(content["git"].removesuffix("-dirty")) == 40


def test_lock(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.lock():
        with pytest.raises(InputError, match="in use by another process"), RunDirectory(run.path).lock():
            pass
    with RunDirectory(run.path).lock():
        pass

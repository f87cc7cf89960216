"""RunConfig: what it refuses, and that nothing is lost on the way through ml_collections and JSON."""

import dataclasses
import inspect
import json
import re
import typing

import pytest
from ml_collections import config_dict

import top_jax.config as config_module
from top_jax.build import build_sizes
from top_jax.config import (
    OF_SEGMENTERS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PruningConfig,
    RunConfig,
    _without_none,
    make_config,
)
from top_jax.errors import InputError
from top_jax.models import MODELS
from top_jax.models.vim import VimConfig

SECTIONS = {"model": ModelConfig, "pruning": PruningConfig, "data": DataConfig, "optimizer": OptimizerConfig}


@pytest.mark.parametrize("section", [None, *SECTIONS])
@pytest.mark.parametrize("build", [RunConfig.from_config_dict, lambda settings: make_config(**settings)])
def test_unknown_key(section, build):
    settings = {"speling": 1} if section is None else {section: {"speling": 1}}
    path = "speling" if section is None else f"{section}.speling"
    with pytest.raises(InputError, match=rf"config\.{path}\b") as caught:
        build(settings)
    fields = dataclasses.fields(SECTIONS.get(section, RunConfig))
    assert all(field.name in str(caught.value) for field in fields)


@pytest.mark.parametrize(
    ("settings", "given", "needed"),
    [
        ({"batch_size": 16.0}, "batch_size=16.0", "int"),
        ({"batch_size": True}, "batch_size=True", "int"),
        ({"batch_size": None}, "batch_size=None", "int"),
        ({"epochs": "30"}, "epochs='30'", "float"),
        ({"model": {"dtype": 32}}, "model.dtype=32", "str"),
        ({"model": {"remat": 1}}, "model.remat=1", "bool"),
        ({"model": {"img_size": "224"}}, "model.img_size[0]='224'", "int"),
        ({"model": {"img_size": (224, 2.5)}}, "model.img_size[1]=2.5", "int"),
        ({"model": {"reorder_parameters": 1}}, "model.reorder_parameters=1", "bool"),
        ({"pruning": {"after_blocks": (5, "10")}}, "pruning.after_blocks[1]='10'", "int"),
        ({"optimizer": {"clip_norm": "1"}}, "optimizer.clip_norm='1'", "float"),
        ({"model": "vim_tiny"}, "model='vim_tiny'", "dict"),
    ],
)
def test_wrong_type(settings, given, needed):
    with pytest.raises(InputError, match=rf"^config\.{re.escape(given)} .*\b{needed}\b"):
        RunConfig.from_config_dict(settings)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("batch_size", 0),
        ("eval_batch_size", 0),
        ("total_steps", 0),
        ("log_every", 0),
        ("checkpoint_every", -1),
        ("epochs", 0.0),
        ("eval_every_epochs", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
        ("model.dtype", "bf16"),
        ("data.prefetch", -1),
        ("data.num_workers", -1),
        ("data.num_workers", 10**6),
        ("data.num_threads", 10**6),
        ("data.on_corrupt", "ignore"),
        ("data.min_area", 0.0),
        ("data.eval_crop", 1.5),
        ("data.shift", -1),
        ("data.scale", (10**8, 64)),
        ("data.scale_range", (2.0, 1.0)),
        ("data.scale_range", (0.0001, 0.0001)),
        ("data.size_divisor", 10**5),
        ("data.mean", (0.5,)),
        ("data.std", (0.2, 0.0, 0.2)),
        ("optimizer.accumulate", 0),
        ("optimizer.learning_rate", -1e-3),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.label_smoothing", 1.0),
        ("optimizer.ema_decay", 1.0),
        ("optimizer.clip_norm", 0.0),
    ],
)
def test_out_of_range(path, value):
    section, _, name = path.rpartition(".")
    with pytest.raises(InputError, match=re.escape(f"config.{path}={value!r}")):
        RunConfig.from_config_dict({section: {name: value}} if section else {name: value})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vim_tiny", {"depth": 0}),
        ("vim_tiny", {"stride": 0}),
        ("vim_tiny", {"expand": 0}),
        ("vim_tiny", {"img_size": (32, 0)}),
        ("vim_tiny", {"img_size": ()}),
        ("vim_tiny", {"drop_path": 1.0}),
        ("plain_mamba_l1", {"num_convs_patch_embed": -1}),
        ("plain_mamba_l1", {"d_conv": 6}),
        ("deit_tiny", {"num_heads": 0}),
        ("deit_tiny", {"mlp_ratio": 0.0}),
    ],
)
def test_sizes_are_checked_by_the_model(name, settings):
    config = RunConfig.from_config_dict({"model": {"name": name, **settings}})
    ((key, value),) = settings.items()
    with pytest.raises(InputError, match=re.escape(f"{key}={value!r}")):
        build_sizes(config.model)


def test_model_has_the_settings_of_every_family():
    """And of the same types, but for what a config spells differently: a side for both, a dtype's name."""
    of_segmenters = {"head", *OF_SEGMENTERS}
    hints = typing.get_type_hints(ModelConfig).items()
    ours = {name: _without_none(hint) for name, hint in hints if name not in of_segmenters}
    families = [typing.get_type_hints(type(config)) for config in MODELS.values()]
    theirs = {name: hint for hints in families for name, hint in hints.items() if name.islower()}
    assert ours.keys() - {"name"} == theirs.keys()
    assert (ours.pop("img_size"), ours.pop("dtype")) == (tuple[int, ...], str)
    assert {name: theirs[name] for name in ours.keys() - {"name"}} == {k: v for k, v in ours.items() if k != "name"}


def test_every_size_can_be_set():
    config = make_config(model={"expand": 3, "d_conv": 2})
    config.model.depth = 2
    sizes = build_sizes(RunConfig.from_config_dict(config).model)
    assert isinstance(sizes, VimConfig) and (sizes.expand, sizes.d_conv, sizes.depth) == (3, 2, 2)
    deit = RunConfig.from_config_dict({"model": {"name": "deit_tiny", "mlp_ratio": 2}}).model
    assert dataclasses.asdict(build_sizes(deit))["mlp_ratio"] == 2.0


def test_every_key_is_explained():
    """One comment per key, on its line: --help will print them."""
    lines = inspect.getsource(config_module).splitlines()
    keys = [line for line in lines if re.match(r"    \w+: .* = ", line) and "Config()" not in line]
    explained = [line for line in keys if re.search(r"  # \S", line)]
    assert keys == explained
    settings = sum(
        len(dataclasses.fields(section))
        for section in typing.get_type_hints(RunConfig).values()
        if dataclasses.is_dataclass(section)
    )
    sections = sum(map(dataclasses.is_dataclass, typing.get_type_hints(RunConfig).values()))
    assert len(keys) == settings + len(dataclasses.fields(RunConfig)) - sections


def test_scalar_for_tuple():
    config = RunConfig.from_config_dict(
        {"model": {"img_size": 32}, "pruning": {"after_blocks": 2, "keep_ratio": 1}, "data": {"std": [1, 2, 3]}}
    )
    assert config.model.img_size == (32,) and config.pruning.after_blocks == (2,)
    assert config.pruning.keep_ratio == (1.0,) and isinstance(config.pruning.keep_ratio[0], float)
    assert config.data.std == (1.0, 2.0, 3.0)


def test_int_for_float():
    learning_rate = RunConfig.from_config_dict({"optimizer": {"learning_rate": 1}}).optimizer.learning_rate
    assert learning_rate == 1.0 and isinstance(learning_rate, float)


def test_placeholders():
    """An optional key can be set to its own type only, and reads as None until then."""
    config = make_config()
    assert config.model.img_size is None and config.init_from is None
    config.model.img_size = (32, 64)
    config.total_steps = 7
    config.optimizer.ema_decay = 0.9
    with pytest.raises(TypeError):
        config.init_from = 3
    built = RunConfig.from_config_dict(config)
    assert built.model.img_size == (32, 64) and built.total_steps == 7 and built.optimizer.ema_decay == 0.9
    assert dataclasses.replace(built, model=ModelConfig(), total_steps=None, optimizer=OptimizerConfig()) == RunConfig()


def test_make_config_holds_every_key():
    config = make_config(batch_size=4, model={"depth": 2})
    assert isinstance(config, config_dict.ConfigDict)
    assert set(config) == {field.name for field in dataclasses.fields(RunConfig)}
    for name, section in SECTIONS.items():
        assert set(config[name]) == {field.name for field in dataclasses.fields(section)}
    assert RunConfig.from_config_dict(config) == RunConfig(batch_size=4, model=ModelConfig(depth=2))


@pytest.mark.parametrize("as_written", [lambda content: content, lambda content: json.loads(json.dumps(content))])
def test_round_trip(as_written):
    config = RunConfig(
        total_steps=3,
        model=ModelConfig(img_size=(32, 64), drop_path=0.1, dtype="bfloat16"),
        pruning=PruningConfig(after_blocks=(2, 4), keep_ratio=(0.9, 0.7), score="l1", alignment="decay"),
        data=DataConfig(source="tfds", name="cifar10", std=(1.0, 2.0, 3.0), num_workers=None),
        optimizer=OptimizerConfig(ema_decay=0.5, clip_norm=1.0, reference_batch_size=512),
    )
    assert RunConfig.from_config_dict(as_written(config.to_dict())) == config


def test_overrides_name_what_is_set():
    assert ModelConfig(name="vim_small").overrides() == {
        "num_classes": 1000,
        "dtype": "float32",
        "remat": False,
    }
    plain_mamba = {"layers_with_dwconv": (), "reorder_parameters": False, "num_convs_patch_embed": 0}
    assert (
        ModelConfig(**plain_mamba, implementation="xla").overrides().items()
        >= (plain_mamba | {"implementation": "xla"}).items()
    )
    assert ModelConfig(img_size=(32,), depth=2).overrides().items() >= {"img_size": 32, "depth": 2}.items()
    assert ModelConfig(img_size=(32, 64)).overrides()["img_size"] == (32, 64)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_overrides_fit_every_model(name):
    """What is not set is not passed on: a DeiT has no scan, whose implementation it could choose."""
    assert build_sizes(ModelConfig(name=name)).num_classes == 1000


def test_config_of_an_older_release():
    """Its settings and no later ones; it named the implementation that is now left to the model."""
    later = ("num_heads", "num_convs_patch_embed", "layers_with_dwconv", "reorder_parameters")
    later += ("expand", "d_conv", "mlp_ratio")
    content = RunConfig().to_dict()
    content["model"] = {key: value for key, value in content["model"].items() if key not in later}
    older = RunConfig.from_config_dict(content | {"model": content["model"] | {"implementation": "auto"}})
    sizes = [build_sizes(config.model) for config in (older, RunConfig())]
    assert sizes[0] == sizes[1]


def test_what_a_config_leaves_unset_keeps_its_type():
    """An unset number is a typed placeholder, so that a flag can set it: --config.data.num_workers=2."""
    config = make_config(data=dict(num_workers=None))
    config.data.num_workers = 2
    assert RunConfig.from_config_dict(config).data.num_workers == 2
    with pytest.raises(TypeError):
        config.data.num_workers = "two"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (dict(distillation=dict(token_weight=1.0)), "config.distillation.token_weight=1.0"),
        (dict(pruning=dict(warmup_stages=3)), "config.pruning.warmup_stages=3"),
        (dict(batch_size=16, augment=dict(repeats=17)), "config.augment.repeats=17"),
        (dict(augment=dict(mixup=float("nan"))), "config.augment.mixup=nan"),
    ],
)
def test_what_would_have_no_effect(settings, key):
    with pytest.raises(InputError, match=re.escape(key)):
        RunConfig.from_config_dict(settings)

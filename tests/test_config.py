"""RunConfig: what it refuses, and that nothing is lost on the way through ml_collections and JSON."""

import dataclasses
import json

import pytest
from ml_collections import config_dict

from top_jax.config import DataConfig, ModelConfig, OptimizerConfig, PruningConfig, RunConfig, make_config
from top_jax.errors import InputError
from top_jax.models import MODELS, model_config

SECTIONS = {"model": ModelConfig, "pruning": PruningConfig, "data": DataConfig, "optimizer": OptimizerConfig}


@pytest.mark.parametrize("section", [None, *SECTIONS])
@pytest.mark.parametrize("build", [RunConfig.from_config_dict, lambda settings: make_config(**settings)])
def test_unknown_key(section, build):
    settings = {"speling": 1} if section is None else {section: {"speling": 1}}
    path = "speling" if section is None else f"{section}.speling"
    with pytest.raises(InputError, match=rf"unknown config key config\.{path}; the keys there are .*\b") as caught:
        build(settings)
    fields = dataclasses.fields(SECTIONS.get(section, RunConfig))
    assert all(field.name in str(caught.value) for field in fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 16.0}, "config.batch_size=16.0 has type float; it must be int."),
        ({"batch_size": True}, "config.batch_size=True has type bool; it must be int."),
        ({"batch_size": None}, "config.batch_size=None has type NoneType; it must be int."),
        ({"epochs": "30"}, "config.epochs='30' has type str; it must be float."),
        ({"model": {"dtype": 32}}, "config.model.dtype=32 has type int; it must be str."),
        ({"model": {"remat": 1}}, "config.model.remat=1 has type int; it must be bool."),
        ({"model": {"img_size": "224"}}, "config.model.img_size[0]='224' has type str; it must be int."),
        ({"model": {"img_size": (224, 2.5)}}, "config.model.img_size[1]=2.5 has type float; it must be int."),
        ({"model": {"reorder_parameters": 1}}, "config.model.reorder_parameters=1 has type int; it must be bool."),
        ({"pruning": {"after_blocks": (5, "10")}}, "config.pruning.after_blocks[1]='10' has type str; it must be int."),
        ({"optimizer": {"clip_norm": "1"}}, "config.optimizer.clip_norm='1' has type str; it must be float."),
        ({"model": "vim_tiny"}, "config.model='vim_tiny' is no section; it must be a dict of settings."),
    ],
)
def test_wrong_type(settings, message):
    with pytest.raises(InputError) as caught:
        RunConfig.from_config_dict(settings)
    assert str(caught.value) == message


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
        ("model.num_classes", 0),
        ("model.depth", 0),
        ("model.stride", 0),
        ("model.num_heads", 0),
        ("model.num_convs_patch_embed", -1),
        ("model.img_size", (32, 0)),
        ("model.img_size", ()),
        ("model.drop_path", 1.0),
        ("model.dtype", "bf16"),
        ("data.prefetch", -1),
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
    with pytest.raises(InputError, match=rf"^config\.{path}=.*; it must be "):
        RunConfig.from_config_dict({section: {name: value}} if section else {name: value})


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
    assert model_config(name, **ModelConfig(name=name).overrides()).num_classes == 1000


def test_config_of_an_older_release():
    """Its settings and no later ones; it named the implementation that is now left to the model."""
    later = ("num_heads", "num_convs_patch_embed", "layers_with_dwconv", "reorder_parameters")
    content = RunConfig().to_dict()
    content["model"] = {key: value for key, value in content["model"].items() if key not in later}
    older = RunConfig.from_config_dict(content | {"model": content["model"] | {"implementation": "auto"}})
    sizes = [model_config("vim_tiny", **config.model.overrides()) for config in (older, RunConfig())]
    assert sizes[0] == sizes[1]


def test_what_a_config_leaves_unset_keeps_its_type():
    """So that a flag can set it: --config.data.num_workers=2."""
    config = make_config(data=dict(num_workers=None))
    config.data.num_workers = 2
    assert RunConfig.from_config_dict(config).data.num_workers == 2
    with pytest.raises(TypeError):
        config.data.num_workers = "two"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(distillation=dict(token_weight=1.0)),
            r"distillation.token_weight=1.0 does nothing without config.d",
        ),
        (
            dict(pruning=dict(warmup_stages=3)),
            r"pruning.warmup_stages=3 does nothing without config.p",
        ),
        (dict(batch_size=16, augment=dict(repeats=17)), r"augment.repeats=17; it must be at most batch_size=16"),
        (dict(augment=dict(mixup=float("nan"))), r"augment.mixup=nan; it must be a number from 0"),
    ],
)
def test_what_would_do_nothing(settings, message):
    with pytest.raises(InputError, match=message):
        RunConfig.from_config_dict(settings)

"""What a run is made of: one frozen dataclass per concern, and the only place that reads a ConfigDict.

`ml_collections` stops at the door. A file in `configs/` returns `make_config(...)`, the defaults below with its
own settings, and `RunConfig.from_config_dict` turns the result back into dataclasses. An unknown key, a
wrong type or a value out of range is an `InputError`. `None` means "not set" and is what a
`config_dict.placeholder` holds.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final

from ml_collections import config_dict

from top_jax.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DTYPES: Final = ("float32", "bfloat16")


def _check(node: Any, section: str, names: tuple[str, ...], holds: Callable[[Any], Any], needed: str) -> None:
    """Raises InputError, naming the key, unless `holds(value)` for each of the fields that is set."""
    for name in names:
        value = getattr(node, name)
        # `not holds` rather than a test for what is wrong: nan fits nowhere.
        if value is not None and not holds(value):
            raise InputError(f"config.{section}{'.' if section else ''}{name}={value!r}; it must be {needed}.")


def _check_unset(node: Any, section: str, names: tuple[str, ...], needed: str) -> None:
    """Raises InputError for a setting that would do nothing without another one."""
    defaults = {field.name: field.default for field in dataclasses.fields(node)}
    for name in names:
        if (value := getattr(node, name)) != defaults[name]:
            raise InputError(f"config.{section}.{name}={value!r} does nothing without {needed}; set it, or drop this.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is built: `top_jax.create_model(name, num_classes=..., **overrides)`.

    Every field but `name` and `num_classes` overrides a size of the named model; None keeps the model's own.
    """

    name: str = "vim_tiny"  # a name in top_jax.models.registry
    num_classes: int = 1000
    img_size: tuple[int, ...] | None = None  # (side,) or (height, width), pixels
    patch_size: int | None = None
    stride: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    d_state: int | None = None
    num_heads: int | None = None  # DeiT
    num_convs_patch_embed: int | None = None  # PlainMamba, as the next two
    layers_with_dwconv: tuple[int, ...] | None = None  # from 0
    reorder_parameters: bool | None = None
    drop_path: float | None = None
    dtype: str = "float32"  # computation; parameters, states, residuals and norms stay float32
    implementation: str | None = None  # of the selective scan: top_jax.ops.selective_scan
    remat: bool = False

    def __post_init__(self) -> None:
        sizes = ("num_classes", "patch_size", "stride", "embed_dim", "depth", "d_state", "num_heads")
        _check(self, "model", sizes, lambda size: size >= 1, "at least 1")
        _check(self, "model", ("num_convs_patch_embed",), lambda count: count >= 0, "at least 0")
        _check(self, "model", ("img_size",), lambda size: size and min(size) >= 1, "sides of at least 1 pixel")
        _check(self, "model", ("drop_path",), lambda rate: 0 <= rate < 1, "in [0, 1)")
        _check(self, "model", ("dtype",), lambda dtype: dtype in DTYPES, f"one of {', '.join(DTYPES)}")

    def overrides(self) -> dict[str, Any]:
        """The keyword arguments for `top_jax.create_model` beside the name."""
        chosen = {k: v for k, v in dataclasses.asdict(self).items() if k != "name" and v is not None}
        if self.img_size is not None:
            chosen["img_size"] = self.img_size[0] if len(self.img_size) == 1 else self.img_size
        return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Arguments of `top_jax.pruning.make_reduction`; no `after_blocks` is the dense model.

    None keeps the method's own value; a setting that the method does not have is an error.
    """

    method: str = "top"  # "top" (and its ablations), "evit" or "merge": top_jax.pruning.METHODS
    after_blocks: tuple[int, ...] = ()  # 1-based: 5 prunes after the fifth block
    keep_ratio: tuple[float, ...] = ()  # one for all prunes, or one per prune
    score: str | None = None
    alignment: str | None = None
    order: str | None = None
    fuse: bool | None = None
    seed: int | None = None  # of the control score "random"
    warmup_epochs: float = 0.0  # training goes from the dense model to keep_ratio over so many epochs
    warmup_stages: int = 4  # in so many steps of equal length, each a program of its own

    def __post_init__(self) -> None:
        _check(self, "pruning", ("warmup_epochs",), lambda epochs: epochs >= 0, "at least 0")
        _check(self, "pruning", ("warmup_stages",), lambda stages: stages >= 1, "at least 1")
        if not self.warmup_epochs:
            _check_unset(self, "pruning", ("warmup_stages",), "config.pruning.warmup_epochs")

    def settings(self) -> dict[str, Any]:
        """The keyword arguments for `make_reduction`; a single keep ratio stands for all prunes."""
        of_training = ("warmup_epochs", "warmup_stages")
        chosen = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k not in of_training}
        if len(self.keep_ratio) == 1:
            chosen["keep_ratio"] = self.keep_ratio[0]
        return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they become model input."""

    source: str = "digits"  # "digits" (bundled), "tfds" (name, data_dir), "image_folder" or "packed" (data_dir)
    name: str | None = None  # TFDS name, e.g. "imagenet2012" or "imagenet2012:5.1.0"
    data_dir: str | None = None  # of "packed", the .npz file
    train_split: str = "train"
    eval_split: str = "test"
    train_transform: str = "random_resized_crop"  # or "shift_crop"
    min_area: float = 0.08  # random_resized_crop: smallest share of the image
    shift: int = 4  # shift_crop: largest move in pixels of the model's input
    eval_crop: float = 0.875  # evaluation resizes the shorter side to img_size / eval_crop, then crops the centre
    mean: tuple[float, ...] = IMAGENET_MEAN  # of pixels scaled to 0..1
    std: tuple[float, ...] = IMAGENET_STD
    on_corrupt: str = "skip"  # an unreadable image: "skip" (named, counted, weight 0) or "raise"
    num_workers: int | None = 0  # decoding processes; 0: threads of this process; None: one per core, at most 16
    num_threads: int = 2  # decoding threads of each process
    prefetch: int = 2  # batches kept ready on the device

    def __post_init__(self) -> None:
        _check(self, "data", ("prefetch",), lambda batches: batches >= 0, "at least 0")
        _check(self, "data", ("mean", "std"), lambda values: len(values) == 3, "three numbers, one per channel")
        _check(self, "data", ("std",), lambda values: min(values) > 0, "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images, in the order in which they are made.

    The crop (`data.train_transform`) comes first. RandAugment and colour jitter follow in the decoding processes; flip,
    erasing and mixing on the device, inside the training step.
    """

    repeats: int = 1  # repeated augmentation: each image so often in a row, in an epoch of 1 / repeats of the images
    rand_augment: str | None = None  # timm's notation, such as "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.0  # brightness, contrast and saturation by factors in 1 - this .. 1 + this
    flip: bool = True  # left to right, half of the time
    erasing: float = 0.0  # probability that a rectangle becomes noise
    mixup: float = 0.0  # alpha of the Beta distribution of the share of the other image; 0: no mixup
    cutmix: float = 0.0  # the same of a rectangle of the other image; 0: no cutmix
    mix_probability: float = 1.0  # that a batch is mixed at all
    switch_probability: float = 0.5  # of cutmix rather than mixup, where both are on

    def __post_init__(self) -> None:
        _check(self, "augment", ("repeats",), lambda count: count >= 1, "at least 1")
        _check(self, "augment", ("color_jitter",), lambda factor: 0 <= factor <= 1, "in [0, 1]")
        _check(self, "augment", ("mixup", "cutmix"), lambda alpha: 0 <= alpha < math.inf, "a number from 0")
        shares = ("erasing", "mix_probability", "switch_probability")
        _check(self, "augment", shares, lambda share: 0 <= share <= 1, "in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Learning from the dense model while tokens are dropped: loss = (1 - weight) CE + weight KL + token_weight MSE."""

    teacher: str | None = None  # a run directory or an official file of the dense model; None: no distillation
    weight: float = 0.5  # of the divergence from the teacher's softened prediction
    temperature: float = 1.0  # softens both predictions; the divergence is scaled by its square
    token_weight: float = 0.0  # of the squared difference of token features, at the positions that are kept

    def __post_init__(self) -> None:
        _check(self, "distillation", ("weight",), lambda share: 0 <= share <= 1, "in [0, 1]")
        _check(self, "distillation", ("temperature",), lambda value: 0 < value < math.inf, "a number above 0")
        _check(self, "distillation", ("token_weight",), lambda weight: 0 <= weight < math.inf, "a number from 0")
        if self.teacher is None:
            settings = ("weight", "temperature", "token_weight")
            _check_unset(self, "distillation", settings, "config.distillation.teacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay, as `top_jax.training.optimizer` builds it."""

    learning_rate: float = 1e-3  # at the peak, for a batch of `reference_batch_size`
    reference_batch_size: int | None = None  # set: the rates are scaled by batch_size / reference_batch_size
    min_learning_rate: float = 1e-5  # after the cosine; never scaled
    warmup_learning_rate: float = 1e-6  # at step 0; never scaled
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float | None = None  # global norm of the gradient
    label_smoothing: float = 0.1
    ema_decay: float | None = None  # set: an exponential moving average of the weights is kept
    accumulate: int = 1  # micro-batches a step; batch_size counts all of them

    def __post_init__(self) -> None:
        _check(self, "optimizer", ("reference_batch_size", "accumulate"), lambda count: count >= 1, "at least 1")
        rates = ("learning_rate", "min_learning_rate", "warmup_learning_rate", "warmup_epochs", "weight_decay")
        _check(self, "optimizer", rates, lambda value: value >= 0, "at least 0")
        _check(self, "optimizer", ("b1", "b2", "ema_decay"), lambda decay: 0 <= decay < 1, "in [0, 1)")
        _check(self, "optimizer", ("clip_norm",), lambda norm: norm > 0, "above 0")
        _check(self, "optimizer", ("label_smoothing",), lambda share: 0 <= share < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: everything that decides its numbers, and how it reports."""

    seed: int = 0
    batch_size: int = 128  # images a step, over all devices and micro-batches
    eval_batch_size: int | None = None  # None: batch_size
    epochs: float = 30.0
    total_steps: int | None = None  # set: used instead of epochs
    init_from: str | None = None  # a run directory or an official file: start from its (dense) weights
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every_epochs: float = 1.0
    checkpoint_every: int = 1000  # steps between checkpoints beside those at evaluations
    max_rollbacks: int = 5  # batches that gave a number that is not finite and were left out, before the run gives up
    fsdp: int = 1  # devices that share one copy of the weights, each holding a part
    model: ModelConfig = ModelConfig()
    pruning: PruningConfig = PruningConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        counts = ("batch_size", "eval_batch_size", "total_steps", "log_every", "checkpoint_every", "fsdp")
        _check(self, "", counts, lambda count: count >= 1, "at least 1")
        _check(self, "", ("max_rollbacks",), lambda count: count >= 0, "at least 0")
        fits = f"at most batch_size={self.batch_size}: the copies of an image stand in one batch"
        _check(self.augment, "augment", ("repeats",), lambda count: count <= self.batch_size, fits)
        _check(self, "", ("epochs", "eval_every_epochs"), lambda epochs: epochs > 0, "above 0")
        _check(self, "", ("seed",), lambda seed: 0 <= seed < 2**32, "in 0 .. 2**32 - 1")

    @classmethod
    def from_config_dict(cls, config: Mapping[str, Any] | config_dict.ConfigDict) -> RunConfig:
        """Checks a ConfigDict (or plain dict) and freezes it.

        Raises:
            InputError: an unknown key, or a value of the wrong type or out of range, named by its dotted path.
        """
        return _build(cls, config, path="")

    def to_dict(self) -> dict[str, Any]:
        """A plain nested dict, as it is written to a run's config.json."""
        return dataclasses.asdict(self)


def make_config(**settings: Any) -> config_dict.ConfigDict:
    """A run's config: every default, with `settings` in their places.

    Args:
        **settings: fields of `RunConfig`; sections (`model`, `data`...) as dicts of the fields to set.

    Returns:
        A ConfigDict whose optional fields are typed placeholders.

    Raises:
        InputError: an unknown key.
    """
    return _to_config_dict(RunConfig.from_config_dict(settings))


def _to_config_dict(node: Any) -> config_dict.ConfigDict:
    hints = typing.get_type_hints(type(node))
    result = config_dict.ConfigDict()
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = _to_config_dict(value)
        elif value is None:
            result[field.name] = config_dict.placeholder(_plain_type(hints[field.name]))
        else:
            result[field.name] = value
    return result


def _build(cls: type, node: Any, path: str) -> Any:
    if not isinstance(node, (Mapping, config_dict.ConfigDict)):
        raise InputError(f"config.{path.rstrip('.')}={node!r} is no section; it must be a dict of settings.")
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(node) - known):
        where = f"config.{path}" if path else "config."
        raise InputError(f"unknown config key {where}{unknown[0]}; the keys there are {', '.join(sorted(known))}.")
    values = {}
    for name in node:
        value, hint = node[name], hints[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            values[name] = _build(hint, value, f"{path}{name}.")
        else:
            values[name] = _coerce(value, hint, f"{path}{name}")
    return cls(**values)


def _plain_type(hint: Any) -> type:
    """The container or scalar type behind `X | None` and `tuple[X, ...]`."""
    hint = _without_none(hint)
    return typing.get_origin(hint) or hint


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _coerce(value: Any, hint: Any, path: str) -> Any:
    if value is None and isinstance(hint, types.UnionType):
        return None
    wanted = _plain_type(hint)
    if wanted is tuple:
        values = value if isinstance(value, (list, tuple)) else (value,)  # one for all, such as img_size=224
        of = typing.get_args(_without_none(hint))[0]
        return tuple(_coerce(item, of, f"{path}[{place}]") for place, item in enumerate(values))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise InputError(f"config.{path}={value!r} has type {type(value).__name__}; it must be {wanted.__name__}.")
    return value

"""The config of a run: one frozen dataclass per section, and the only code that reads a ConfigDict.

A file in `configs/` returns `make_config(...)`: the defaults below with its own settings. `RunConfig.from_config_dict`
turns the result back into dataclasses; no other code sees `ml_collections`. An unknown key, a wrong type or a value out
of range is an `InputError`. None means "not set", which a ConfigDict holds as a `config_dict.placeholder`.

The comment beside each key is its documentation: what it is, its unit and the values allowed.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from top_jax.errors import InputError
from top_jax.optional import optional_package
from top_jax.values import LARGEST_SIDE

if TYPE_CHECKING:
    from ml_collections import config_dict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS: Final = 178_956_970  # per image; Pillow's own limit
MOST_PROCESSES: Final = 1024  # decoding processes, and threads in each
TRACKERS: Final = ("wandb",)
DTYPES: Final = ("float32", "bfloat16")
HEADS: Final = ("linear", "uper")
INFERENCE: Final = ("slide", "whole")
SCHEDULES: Final = ("cosine", "poly")
DECAY_RULES: Final = ("blocks", "official")


def _check(node: Any, section: str, names: tuple[str, ...], holds: Callable[[Any], Any], needed: str) -> None:
    """Raises InputError, naming the key, unless `holds(value)` for each of the fields that is set."""
    for name in names:
        value = getattr(node, name)
        # `not holds` instead of a test for bad values, because nan fails every comparison.
        try:
            fits = value is None or holds(value)
        except TypeError:  # a value of another type, in a section that was not built from a dict
            fits = False
        if not fits:
            raise InputError(f"config.{section}{'.' if section else ''}{name}={value!r}; it must be {needed}.")


def _check_values(node: Any, path: str) -> None:
    """Raises InputError, naming the key, for a number that is not finite or an empty text, in a dict or a tuple too."""
    if isinstance(node, dict):
        for key, value in node.items():
            _check_values(value, f"{path}.{key}")
    for value in node if isinstance(node, tuple) else (node,):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path}={node!r}; numbers must be finite.")
        if value == "":
            raise InputError(f"{path} is empty; give it a value, or leave it out (None).")


def _check_unset(node: Any, section: str, names: tuple[str, ...], needed: str) -> None:
    """Raises InputError for a setting that has no effect without another one."""
    defaults = {field.name: field.default for field in dataclasses.fields(node)}
    for name in names:
        if (value := getattr(node, name)) != defaults[name]:
            raise InputError(f"config.{section}.{name}={value!r} has no effect without {needed}; set it, or drop this.")


# Settings of ModelConfig that only a segmenter has, and of AugmentConfig that only a classifier has.
OF_SEGMENTERS: Final = ("variant", "channels", "aux_channels", "stages", "fill", "inference", "slide_stride")
OF_CLASSIFIERS: Final = ("rand_augment", "color_jitter", "erasing", "mixup", "cutmix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model: a name, and the sizes and settings that replace the named model's own.

    None keeps the model's own value. The families' own configs (`VimConfig`, `PlainMambaConfig`, `DeitConfig`) define
    these settings and check their values when the model is built; a setting that the family lacks is an error there.
    """

    name: str = "vim_tiny"  # model name: vim_tiny|small|base, plain_mamba_l1|l2|l3 or deit_tiny|small|base
    num_classes: int = 1000  # number of logits, at least 1
    img_size: tuple[int, ...] | None = None  # input size in pixels: (side,) or (height, width)
    patch_size: int | None = None  # side of a patch in pixels
    stride: int | None = None  # pixels between patches, by default patch_size; ViM and PlainMamba
    embed_dim: int | None = None  # width of the tokens (D)
    depth: int | None = None  # number of blocks
    d_state: int | None = None  # states per channel of the scan (N); ViM and PlainMamba
    expand: int | None = None  # inner width divided by embed_dim (E / D); ViM and PlainMamba
    d_conv: int | None = None  # ViM: taps of the causal convolution; PlainMamba: side of the 2-D one, odd
    num_heads: int | None = None  # attention heads, a divisor of embed_dim; DeiT
    mlp_ratio: float | None = None  # width of the MLP divided by embed_dim; DeiT
    num_convs_patch_embed: int | None = None  # 3x3 convolutions in the stem, from 0; PlainMamba
    layers_with_dwconv: tuple[int, ...] | None = None  # blocks, from 0, that end in a 3x3 convolution; PlainMamba
    reorder_parameters: bool | None = None  # True: delta, B and C follow each traversal as u does; PlainMamba
    drop_path: float | None = None  # drop-path rate of the last block, in [0, 1); it grows linearly over the blocks
    dtype: str = "float32"  # dtype of matrix products, float32 or bfloat16; parameters and states stay float32
    implementation: str | None = None  # auto, reference, xla, pallas, pallas_interpret or triton, for the scan
    remat: bool = False  # recompute each block in the backward pass: less memory, more time
    head: str = "linear"  # linear: a classifier; uper: a segmenter, with UPerNet's heads on the backbone
    variant: str | None = None  # segmenter, ViM: residual (default), official_tiny or official_small
    channels: int | None = None  # segmenter: width of the decode head, by default embed_dim (ViM) or 512 (PlainMamba)
    aux_channels: int = 256  # segmenter: width of the auxiliary head
    stages: tuple[int, ...] | None = None  # segmenter: four blocks, from 1, whose maps the heads read
    fill: str = "frozen"  # segmenter: fill of maps where tokens were dropped: frozen, nearest, carry or zero
    inference: str | None = None  # segmenter: slide (default of ViM) or whole (default of PlainMamba)
    slide_stride: int | None = None  # segmenter: pixels from one window to the next, by default 2/3 of img_size

    def __post_init__(self) -> None:
        _check(self, "model", ("num_classes",), lambda classes: classes >= 1, "at least 1")
        _check(self, "model", ("dtype",), lambda dtype: dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        _check(self, "model", ("head",), lambda head: head in HEADS, f"one of {', '.join(HEADS)}")
        _check(self, "model", ("inference",), lambda way: way in INFERENCE, f"one of {', '.join(INFERENCE)}")
        _check(self, "model", ("slide_stride",), lambda pixels: pixels >= 1, "at least 1")
        if not self.is_segmenter:
            _check_unset(self, "model", OF_SEGMENTERS, "config.model.head=uper")

    @property
    def is_segmenter(self) -> bool:
        """Whether the model labels every pixel, instead of the image."""
        return self.head != "linear"

    def overrides(self) -> dict[str, Any]:
        """Returns the keyword arguments of `top_jax.create_model`, for a segmenter its backbone's; without the name."""
        chosen = {k: v for k, v in dataclasses.asdict(self).items() if k != "name" and v is not None}
        chosen = {k: v for k, v in chosen.items() if k != "head" and k not in OF_SEGMENTERS}
        if self.img_size is not None and len(self.img_size) == 1:
            chosen["img_size"] = self.img_size[0]
        return chosen

    def segmenter(self) -> dict[str, Any]:
        """Returns the keyword arguments of `top_jax.create_segmenter` that `overrides` leaves out."""
        return {name: value for name in OF_SEGMENTERS if (value := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """The token reduction; without `after_blocks` the model is dense.

    None keeps the method's own value. A setting that the method lacks is an error when the reduction is built.
    """

    method: str = "top"  # top (ToP and its ablations), evit or merge
    after_blocks: tuple[int, ...] = ()  # blocks to reduce after, from 1: 5 means after the fifth block
    keep_ratio: tuple[float, ...] = ()  # share of the patch tokens kept, in (0, 1]: one, or one for each reduction
    score: str | None = None  # clip, noclip, l1, l2, delta, attention (DeiT), random or uniform
    alignment: str | None = None  # hold, decay or none: what a scan does at the positions of dropped tokens
    order: str | None = None  # order of the kept tokens: position, or score (best first)
    fuse: bool | None = None  # evit: fuse the dropped tokens into one token
    seed: int | None = None  # seed of the score random
    warmup_epochs: float = 0.0  # epochs over which training goes from the dense model to keep_ratio; 0: none
    warmup_stages: int = 4  # equal steps of that warm-up, at least 1; each compiles a program of its own

    def __post_init__(self) -> None:
        _check(self, "pruning", ("warmup_epochs",), lambda epochs: epochs >= 0, "at least 0")
        _check(self, "pruning", ("warmup_stages",), lambda stages: stages >= 1, "at least 1")
        if not self.warmup_epochs:
            _check_unset(self, "pruning", ("warmup_stages",), "config.pruning.warmup_epochs")

    def settings(self) -> dict[str, Any]:
        """Returns the keyword arguments of `top_jax.pruning.make_reduction`; one keep ratio becomes a number."""
        training_only = ("warmup_epochs", "warmup_stages")
        chosen = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k not in training_only}
        if len(self.keep_ratio) == 1:
            chosen["keep_ratio"] = self.keep_ratio[0]
        return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, and how they become model input."""

    # Labelled images: digits (bundled), tfds, hf, image_folder. Labelled pixels: digit_scenes (bundled), ade20k,
    # segmentation_folder. Either: packed.
    source: str = "digits"  # digits, digit_scenes, tfds, hf, image_folder, segmentation_folder, ade20k or packed
    name: str | None = None  # tfds, hf: name of the dataset, such as imagenet2012:5.1.0 (tfds) or cifar10 (hf)
    data_dir: str | None = None  # directory of the data, unless bundled; packed: its file; hf: its cache or its files
    train_split: str = "train"  # split to train on
    eval_split: str = "test"  # split to evaluate on
    eval_share: float | None = None  # image_folder, segmentation_folder without splits: this share is evaluated
    infer: bool = False  # image_folder, segmentation_folder: take classes, splits and batch sizes from the folder
    train_transform: str = "random_resized_crop"  # random_resized_crop or shift_crop
    min_area: float = 0.08  # random_resized_crop: smallest crop, as a share of the image's area
    shift: int = 4  # shift_crop: largest shift, in pixels of the model's input
    eval_crop: float = 0.875  # evaluation resizes the shorter side to img_size / eval_crop and crops the centre
    mean: tuple[float, ...] = IMAGENET_MEAN  # mean of each channel, for pixels scaled to 0..1
    std: tuple[float, ...] = IMAGENET_STD  # standard deviation of each channel, likewise; above 0
    scale: tuple[int, ...] = (2048, 512)  # segmentation: images are resized to fit (long side, short side), in pixels
    scale_range: tuple[float, ...] = (0.5, 2.0)  # segmentation: smallest and largest factor of that size in training
    crop_size: tuple[int, ...] | None = None  # segmentation: training crop, (side,) or (height, width); None: img_size
    max_class_share: float = 0.75  # segmentation: a crop with this share of one class is drawn again, up to 10 times
    num_classes: int | None = None  # segmentation_folder: classes; None: as many as data_dir/classes.txt has lines
    ignore_label: int = 255  # segmentation: value of the label images that is ignored
    reduce_zero_label: bool = False  # segmentation: in label images 0 is ignored, and 1 is the first class
    size_divisor: int = 1  # segmentation: evaluation stretches images to multiples of this many pixels
    on_corrupt: str = "skip"  # an unreadable image: skip (it is named, counted and gets weight 0) or raise
    exif_rotate: bool = False  # rotate images by their EXIF orientation; False: as stored, as in torchvision
    max_pixels: int = MAX_PIXELS  # an image with more pixels is unreadable, because it may not fit into memory
    num_workers: int | None = 0  # decoding processes; 0: threads of the main process; None: one per core, at most 16
    num_threads: int = 2  # decoding threads per process
    prefetch: int = 2  # batches kept ready on the device, from 0

    def __post_init__(self) -> None:
        _check(self, "data", ("eval_share",), lambda share: 0 < share < 1, "between 0 and 1")
        if self.source not in ("image_folder", "segmentation_folder"):
            _check_unset(self, "data", ("eval_share", "infer"), "config.data.source=image_folder")
        if self.source != "segmentation_folder":
            _check_unset(self, "data", ("num_classes",), "config.data.source=segmentation_folder")
        _check(self, "data", ("num_classes",), lambda classes: 1 <= classes <= 255, "in 1 .. 255")
        _check(self, "data", ("min_area", "eval_crop"), lambda share: 0 < share <= 1, "in (0, 1]")
        _check(self, "data", ("shift",), lambda pixels: 0 <= pixels <= LARGEST_SIDE, f"in 0 .. {LARGEST_SIDE}")
        _check(self, "data", ("on_corrupt",), lambda choice: choice in ("skip", "raise"), "skip or raise")
        lanes = ("num_workers", "num_threads")
        _check(self, "data", lanes, lambda count: 0 <= count <= MOST_PROCESSES, f"in 0 .. {MOST_PROCESSES}")
        _check(self, "data", ("prefetch",), lambda batches: batches >= 0, "at least 0")
        _check(self, "data", ("max_pixels",), lambda pixels: pixels >= 1, "at least 1")
        _check(self, "data", ("scale", "scale_range"), lambda values: len(values) == 2, "two numbers")
        _check(self, "data", ("scale", "scale_range"), lambda values: min(values) > 0, "above 0")
        _check(self, "data", ("scale",), lambda sides: max(sides) <= LARGEST_SIDE, f"at most {LARGEST_SIDE}")
        _check(self, "data", ("scale_range",), lambda factors: factors[0] <= factors[1], "the smaller factor first")
        one_pixel = f"at least 1 / {min(self.scale)}, which leaves one pixel of scale={self.scale}"
        _check(self, "data", ("scale_range",), lambda factors: min(self.scale) * factors[0] >= 1, one_pixel)
        in_sides = f"in 1 .. {LARGEST_SIDE}"
        _check(self, "data", ("max_class_share",), lambda share: 0 < share <= 1, "in (0, 1]")
        _check(self, "data", ("ignore_label",), lambda value: 0 <= value <= 255, "in 0 .. 255")
        _check(self, "data", ("size_divisor",), lambda pixels: 1 <= pixels <= LARGEST_SIDE, in_sides)
        _check(self, "data", ("mean", "std"), lambda values: len(values) == 3, "three numbers, one per channel")
        _check(self, "data", ("std",), lambda values: min(values) > 0, "above 0")

    @property
    def is_bundled(self) -> bool:
        """Whether the source comes with scikit-learn, and so has no `data_dir`."""
        return self.source in ("digits", "digit_scenes")

    def decoding(self) -> dict[str, Any]:
        """Returns the keyword arguments of `top_jax.data.transforms.decode`."""
        return {"exif_rotate": self.exif_rotate, "max_pixels": self.max_pixels}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random augmentation of the training images, in the order in which it is applied.

    The crop (`data.train_transform`) comes first. RandAugment and colour jitter follow in the decoding processes. Flip,
    erasing and mixing run on the device, inside the training step.
    """

    repeats: int = 1  # consecutive copies of each image, from 1; an epoch then sees 1 / repeats of the images
    rand_augment: str | None = None  # RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1; None: off
    color_jitter: float = 0.0  # brightness, contrast and saturation change by up to this share, in [0, 1]; 0: off
    flip: bool = True  # flip left to right with probability 0.5
    photometric: bool = False  # segmentation: mmseg's changes of brightness, contrast, saturation and hue
    erasing: float = 0.0  # probability that a rectangle is replaced by noise
    mixup: float = 0.0  # alpha of the Beta distribution of the mixing share; 0: no mixup
    cutmix: float = 0.0  # alpha of the Beta distribution of the rectangle's share; 0: no cutmix
    mix_probability: float = 1.0  # probability that a batch is mixed
    switch_probability: float = 0.5  # probability of cutmix instead of mixup, where both are on

    def __post_init__(self) -> None:
        _check(self, "augment", ("repeats",), lambda count: count >= 1, "at least 1")
        _check(self, "augment", ("color_jitter",), lambda factor: 0 <= factor <= 1, "in [0, 1]")
        _check(self, "augment", ("mixup", "cutmix"), lambda alpha: 0 <= alpha < math.inf, "a number from 0")
        shares = ("erasing", "mix_probability", "switch_probability")
        _check(self, "augment", shares, lambda share: 0 <= share <= 1, "in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Learning from the dense model while tokens are dropped: loss = (1 - weight) CE + weight KL + token_weight MSE."""

    teacher: str | None = None  # run directory, official file or name of the dense model; None: no distillation
    weight: float = 0.5  # weight of the KL divergence from the teacher's prediction, in [0, 1]
    temperature: float = 1.0  # softens both predictions, above 0; the divergence is multiplied by its square
    token_weight: float = 0.0  # weight of the squared difference of the kept tokens' features, from 0

    def __post_init__(self) -> None:
        _check(self, "distillation", ("weight",), lambda share: 0 <= share <= 1, "in [0, 1]")
        _check(self, "distillation", ("temperature",), lambda value: 0 < value < math.inf, "a number above 0")
        _check(self, "distillation", ("token_weight",), lambda weight: 0 <= weight < math.inf, "a number from 0")
        if self.teacher is None:
            settings = ("weight", "temperature", "token_weight")
            _check_unset(self, "distillation", settings, "config.distillation.teacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and decay, as `top_jax.training.optimizer` builds it."""

    learning_rate: float = 1e-3  # peak of the learning rate, for a batch of reference_batch_size images
    reference_batch_size: int | None = None  # if set, learning_rate is scaled by batch_size / reference_batch_size
    schedule: str = "cosine"  # decay after the warm-up: cosine, or poly (linear; mmseg's, power 1)
    min_learning_rate: float = 1e-5  # learning rate at the end; not scaled
    warmup_learning_rate: float = 1e-6  # learning rate at step 0; not scaled
    warmup_epochs: float = 5.0  # epochs of linear warm-up, from 0
    warmup_steps: int | None = None  # length of the warm-up in steps, instead of warmup_epochs
    weight_decay: float = 0.05  # AdamW's weight decay, from 0
    b1: float = 0.9  # AdamW's decay of the mean of the gradient, in [0, 1)
    b2: float = 0.999  # AdamW's decay of the mean of its square, in [0, 1)
    clip_norm: float | None = None  # largest global norm of the gradient, above 0; None: no clipping
    label_smoothing: float = 0.1  # share of each target spread over all classes, in [0, 1)
    ema_decay: float | None = None  # if set, keep a moving average of the weights, with this decay per step, in [0, 1)
    freeze_backbone: bool = False  # train only the classifier; the rest is frozen, in eval mode; no layer_decay
    layer_decay: float | None = None  # if set, rates fall by this factor per block from head to stem, in (0, 1]
    layer_decay_rule: str = "blocks"  # blocks; official: only the stem's rate falls, as in ViM's segmentation code
    aux_weight: float = 0.4  # segmentation: weight of the auxiliary head's loss, from 0
    accumulate: int = 1  # micro-batches per step, at least 1; batch_size counts all of them

    def __post_init__(self) -> None:
        _check(self, "optimizer", ("reference_batch_size", "accumulate"), lambda count: count >= 1, "at least 1")
        rates = ("learning_rate", "min_learning_rate", "warmup_learning_rate", "warmup_epochs", "weight_decay")
        _check(self, "optimizer", rates, lambda value: value >= 0, "at least 0")
        _check(self, "optimizer", ("b1", "b2", "ema_decay"), lambda decay: 0 <= decay < 1, "in [0, 1)")
        _check(self, "optimizer", ("clip_norm",), lambda norm: norm > 0, "above 0")
        _check(self, "optimizer", ("layer_decay",), lambda factor: 0 < factor <= 1, "in (0, 1]")
        _check(self, "optimizer", ("schedule",), lambda name: name in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        _check(self, "optimizer", ("layer_decay_rule",), lambda rule: rule in DECAY_RULES, "blocks or official")
        _check(self, "optimizer", ("aux_weight", "warmup_steps"), lambda value: value >= 0, "at least 0")
        if self.layer_decay is None:
            _check_unset(self, "optimizer", ("layer_decay_rule",), "config.optimizer.layer_decay")
        _check(self, "optimizer", ("label_smoothing",), lambda share: 0 <= share < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: everything that its numbers depend on, and how it reports."""

    seed: int = 0  # seed of the initial weights, the order of the data and the augmentation; 0 .. 2**32 - 1
    batch_size: int = 128  # images per step, over all devices and micro-batches
    eval_batch_size: int | None = None  # images per evaluation step; None: batch_size
    epochs: float = 30.0  # length of the run in epochs, above 0
    total_steps: int | None = None  # length of the run in steps, instead of epochs
    init_from: str | None = None  # weights to start from: run directory, official file or name; None: random
    init_head: str = "load"  # classifier of init_from: load its own, or new, a random one for other classes
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every_epochs: float = 1.0  # epochs between evaluations, above 0
    checkpoint_every: int = 1000  # steps between checkpoints; each evaluation saves one too
    max_rollbacks: int = 5  # batches with a loss that is not finite to skip before the run stops, from 0
    tracker: str | None = None  # also report to: wandb (Weights & Biases, the extra wandb)
    fsdp: int = 1  # devices that share one copy of the weights
    model: ModelConfig = ModelConfig()
    pruning: PruningConfig = PruningConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        _check_values(self.to_dict(), "config")
        counts = ("batch_size", "eval_batch_size", "total_steps", "log_every", "checkpoint_every", "fsdp")
        _check(self, "", counts, lambda count: count >= 1, "at least 1")
        _check(self, "", ("max_rollbacks",), lambda count: count >= 0, "at least 0")
        fits = f"at most batch_size={self.batch_size}, because the copies of an image share a batch"
        _check(self.augment, "augment", ("repeats",), lambda count: count <= self.batch_size, fits)
        _check(self, "", ("epochs", "eval_every_epochs"), lambda epochs: epochs > 0, "above 0")
        _check(self, "", ("tracker",), lambda name: name in TRACKERS, f"one of {', '.join(TRACKERS)}, or None")
        _check(self, "", ("init_head",), lambda head: head in ("load", "new"), "load or new")
        _check(self, "", ("seed",), lambda seed: 0 <= seed < 2**32, "in 0 .. 2**32 - 1")
        self._check_task()

    def _check_task(self) -> None:
        """Raises InputError for settings of a classifier in a segmentation run, and vice versa."""
        if not self.model.is_segmenter:
            segmenting = "config.model.head=uper (segmentation)"
            images = ("scale", "scale_range", "crop_size", "max_class_share", "size_divisor")
            labels = ("ignore_label", "reduce_zero_label")
            _check_unset(self.data, "data", images + labels, segmenting)
            _check_unset(self.augment, "augment", ("photometric",), segmenting)
            _check_unset(self.optimizer, "optimizer", ("aux_weight",), segmenting)
            return
        classifying = "config.model.head=linear (classification)"
        _check_unset(self.augment, "augment", OF_CLASSIFIERS, classifying)
        _check_unset(self.data, "data", ("train_transform", "min_area", "shift", "eval_crop"), classifying)
        _check_unset(self.distillation, "distillation", ("teacher",), classifying)
        _check(self.optimizer, "optimizer", ("label_smoothing",), lambda share: share == 0, "0 in a segmentation run")

    @classmethod
    def from_config_dict(cls, config: Mapping[str, Any] | config_dict.ConfigDict) -> RunConfig:
        """Returns the checked and frozen form of a ConfigDict or a plain dict.

        Raises:
            InputError: an unknown key, or a value of the wrong type or out of range; the message has its dotted path.
        """
        return _build(cls, config, path="")

    def to_dict(self) -> dict[str, Any]:
        """Returns a plain nested dict, as it is written to a run's config.json."""
        return dataclasses.asdict(self)


def make_config(**settings: Any) -> config_dict.ConfigDict:
    """Returns a run's config: the defaults, overridden by `settings`.

    Args:
        **settings: fields of `RunConfig`; sections (`model`, `data`, ...) as dicts of the fields to set.

    Returns:
        A ConfigDict whose optional fields are typed placeholders.

    Raises:
        InputError: an unknown key, or ml_collections (the extra `train`) is not installed.
    """
    return _to_config_dict(RunConfig.from_config_dict(settings))


def _to_config_dict(node: Any) -> config_dict.ConfigDict:
    config_dict = optional_package("ml_collections.config_dict", purpose="a config file")
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
    if not hasattr(node, "keys"):  # a Mapping, or a ConfigDict, whose package need not be installed
        raise InputError(f"config.{path.rstrip('.')}={node!r} is not a section; it must be a dict of settings.")
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(map(str, set(node) - known)):
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
    """Returns the container or scalar type behind `X | None` and `tuple[X, ...]`."""
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
        values = (
            value if isinstance(value, (list, tuple)) else (value,)
        )  # a single value is a tuple of one, such as img_size=224
        of = typing.get_args(_without_none(hint))[0]
        return tuple(_coerce(item, of, f"{path}[{place}]") for place, item in enumerate(values))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise InputError(f"config.{path}={value!r} has type {type(value).__name__}; it must be {wanted.__name__}.")
    return value

"""Saved weights (a run directory, a file) for the model of a config: runs start from them, commands evaluate them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from top_jax.build import build_abstract_model, build_model, build_sizes, segmenter_sizes
from top_jax.config import ModelConfig, RunConfig
from top_jax.convert import load_torch_checkpoint, load_torch_segmenter
from top_jax.convert.checkpoint_files import read_class_names, read_state_dict, weights_in_folder
from top_jax.convert.hub import is_name, is_pretrained, local_file
from top_jax.convert.inferred_sizes import of_segmenter
from top_jax.convert.position_embedding import resize_position_embedding
from top_jax.convert.segmenter_checkpoint import backbone_of_classifier
from top_jax.convert.torch_checkpoint import HEADS, other_classes
from top_jax.errors import InputError
from top_jax.models.backbone import checked_rngs
from top_jax.models.sizes import BackboneConfig
from top_jax.models.weights import Weights, is_of_classes, weights_of
from top_jax.training.class_names import IMAGENET_CLASSES, imagenet_synsets, in_order_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.seals import layout_difference
from top_jax.training.weights import abstract_weights, fill, keeps_teacher, read_teacher, read_weights, which_weights
from top_jax.values import one_of


@dataclasses.dataclass(frozen=True)
class SavedWeights(abc.ABC):
    """Weights that exist, found by `find_weights`: those of a run directory or of a file.

    Attributes:
        source: what the user gave: a path, or a name (`top_jax.convert.hub`).
        path: the run directory or the file on this machine.
        trained: the run's config; None for a file.
    """

    source: str | Path
    path: Path
    trained: RunConfig | None

    def for_model(
        self,
        config: ModelConfig,
        *,
        which: str = "best",
        ema: bool | None = None,
        class_names: Sequence[str] | None = None,
        head: str = "load",
        rngs: nnx.Rngs | None = None,
    ) -> Weights:
        """Reads the weights for a model. A position embedding of another grid is resized (bicubic), with a warning.

        Args:
            config: the model that they must fit.
            which: `best` or `latest`, of a run directory.
            ema: whether to take averaged weights; None takes them where a run kept them, and never from a file.
            class_names: classes of the data, in the order of its labels: the logits are put into this order, by the
                names that were saved with the weights. None keeps the saved order. A new classifier needs none.
            head: `load` takes the saved classifier, `new` starts a random one.
            rngs: source of a new classifier's weights, `nnx.Rngs(0)` by default.

        Raises:
            InputError: no such checkpoint in the run, or weights of another model, class count or classes.
            RunError: the checkpoint is damaged.
        """
        weights = self._read(config, which, ema, one_of("head", head, HEADS), checked_rngs(rngs))
        if class_names is None or head == "new":
            return weights
        return in_order_of(class_names, weights, kept=self.class_names(config.num_classes), origin=self.path)

    def for_backbone(self, config: ModelConfig, *, rngs: nnx.Rngs) -> Weights:
        """Returns a segmenter's weights: its backbone's are those of this classifier, the others random.

        Args:
            config: the segmenter.
            rngs: source of the random weights.

        Raises:
            InputError: the classifier has another backbone.
            RunError: the checkpoint is damaged.
        """
        there, classifier = self._classifier(config.name)
        weights = weights_of(build_model(config, rngs=rngs))
        backbone = backbone_of_classifier(classifier, there, build_sizes(config))
        if (different := layout_difference(backbone, weights["backbone"])) is not None:
            raise InputError(
                f"the classifier {self.source} does not fit the segmenter's backbone: {different}; use the model "
                "settings that it was trained with. Only img_size and num_classes may differ."
            )
        logging.warning(
            "%s is a classifier: its weights become those of the backbone; neck, heads and maps' norms start at "
            "random.",
            self.source,
        )
        return {**weights, "backbone": jax.tree.map(jax.numpy.asarray, backbone)}

    @abc.abstractmethod
    def is_segmenter(self) -> bool:
        """Returns whether the weights are a segmenter's. Raises InputError for a file that cannot be read."""

    @abc.abstractmethod
    def class_names(self, num_classes: int) -> tuple[str, ...] | None:
        """Returns the names of `num_classes` classes, in the order of the logits; None if they are not known."""

    @abc.abstractmethod
    def about(self, which: str, ema: bool | None) -> dict[str, Any]:
        """Returns which weights `for_model` takes, as JSON values."""

    @abc.abstractmethod
    def _read(self, config: ModelConfig, which: str, ema: bool | None, head: str, rngs: nnx.Rngs) -> Weights:
        """Reads the weights as `for_model` does, with the classes in their saved order."""

    @abc.abstractmethod
    def _classifier(self, name: str) -> tuple[BackboneConfig, Weights]:
        """Returns the sizes and the weights of a classifier, whose model has this name."""


@dataclasses.dataclass(frozen=True)
class _FileWeights(SavedWeights):
    """Weights of a file in an official format."""

    trained: None = None

    def is_segmenter(self) -> bool:
        return of_segmenter(read_state_dict(self.path))

    def class_names(self, num_classes: int) -> tuple[str, ...] | None:
        """A file of 1,000 classes without names is taken for an official one, whose classes are ImageNet's."""
        names = None if is_pretrained(self.source) else read_class_names(self.path)
        if names is None and num_classes == IMAGENET_CLASSES:
            return imagenet_synsets()
        return names if names is not None and len(names) == num_classes else None

    def about(self, which: str, ema: bool | None) -> dict[str, Any]:
        return {"ema": bool(ema)}

    def _read(self, config: ModelConfig, which: str, ema: bool | None, head: str, rngs: nnx.Rngs) -> Weights:
        sizes = build_sizes(config)  # every size is given, so that none is inferred
        settings = {field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
        if not config.is_segmenter:
            model = load_torch_checkpoint(self.source, config.name, ema=bool(ema), head=head, rngs=rngs, **settings)
            return weights_of(model)
        if ema:
            raise InputError(f"{self.source} is a segmenter's file, which has no averaged weights; drop --ema.")
        heads = segmenter_sizes(config)
        settings |= {name: getattr(heads, name) for name in ("num_classes", "channels", "aux_channels", "stages")}
        return weights_of(load_torch_segmenter(self.source, config.name, head=head, rngs=rngs, **settings))

    def _classifier(self, name: str) -> tuple[BackboneConfig, Weights]:
        model = load_torch_checkpoint(self.source, name)
        return model.config, weights_of(model)


@dataclasses.dataclass(frozen=True)
class _RunWeights(SavedWeights):
    """Weights of a run directory."""

    trained: RunConfig

    def is_segmenter(self) -> bool:
        return self.trained.model.is_segmenter

    def class_names(self, num_classes: int) -> tuple[str, ...] | None:
        names = RunDirectory(self.path).class_names()
        return names if names is not None and len(names) == num_classes else None

    def about(self, which: str, ema: bool | None) -> dict[str, Any]:
        return which_weights(RunDirectory(self.path), which, ema)

    def _read(self, config: ModelConfig, which: str, ema: bool | None, head: str, rngs: nnx.Rngs) -> Weights:
        self._check_same_model(config, head)
        weights = self._on_the_grid_of(config, read_weights(RunDirectory(self.path), which, ema))
        if head == "load":
            return weights
        with_its_classes = dataclasses.replace(config, num_classes=self.trained.model.num_classes)
        model = fill(build_abstract_model(with_its_classes), weights)
        model.reset_classifier(config.num_classes, rngs)
        return weights_of(model)

    def _classifier(self, name: str) -> tuple[BackboneConfig, Weights]:
        return build_sizes(self.trained.model), read_weights(RunDirectory(self.path))

    def _check_same_model(self, config: ModelConfig, head: str) -> None:
        """Raises InputError unless the weights fit the model, apart from what `for_model` changes."""
        trained = self.trained.model
        if trained.is_segmenter and not config.is_segmenter:
            raise InputError(
                f"checkpoint {self.path} is a segmenter's, and this model is a classifier; pass the config of a "
                "segmenter."
            )
        if config.is_segmenter and not trained.is_segmenter:
            raise InputError(
                f"checkpoint {self.path} is a classifier's, and this model is a segmenter; pass a segmenter's, or "
                f"train one from it with --config.init_from={self.path}."
            )
        if head == "load" and trained.num_classes != config.num_classes:
            advice = other_classes(trained.num_classes, config.num_classes)
            raise InputError(f"checkpoint {self.path} does not fit. {advice}")
        there, here = (_fixed_part(abstract_weights(model)) for model in (trained, config))
        if (different := layout_difference(there, here)) is not None:
            raise InputError(
                f"checkpoint {self.path} holds another model: {different}; use the model settings that it was trained "
                "with. Only img_size, stride and, with a new classifier, num_classes may differ."
            )

    def _on_the_grid_of(self, config: ModelConfig, weights: Weights) -> Weights:
        """Returns the weights with the position embedding on the model's grid; warns if grid or stride differ."""
        trained = self.trained.model
        if patches(trained) == patches(config):
            return weights
        there, here = build_sizes(trained), build_sizes(config)
        part = weights["backbone"] if config.is_segmenter else weights
        embedding = np.asarray(part["pos_embed"])
        logging.warning(
            "checkpoint %s was trained with %s, and this model has %s; its embedding of %d positions %s.",
            self.path,
            patches(trained),
            patches(config),
            embedding.shape[1],
            "is resized (bicubic)" if there.grid != here.grid else "is used unchanged",
        )
        resized = resize_position_embedding(embedding, there.grid, here.grid, class_token=here.CLASS_TOKEN)
        part = {**part, "pos_embed": jax.numpy.asarray(resized)}
        return {**weights, "backbone": part} if config.is_segmenter else part


def find_weights(source: str | Path, model: str | None = None) -> SavedWeights:
    """Finds weights without reading them; of a run only the config is read.

    Args:
        source: a run directory, an official .pth or .safetensors file, a Hugging Face folder with one, or a name
            (`top_jax.convert.hub`), whose file is downloaded.
        model: name of the model whose official weights the source `pretrained` means.

    Raises:
        InputError: the source does not exist or cannot be downloaded, or the run's config cannot be read.
    """
    path = local_file(source, model)
    path = weights_in_folder(path) or path
    if not path.exists():
        raise InputError(
            f"checkpoint {path} does not exist; pass a run directory or an official .pth or .safetensors file."
        )
    return _RunWeights(source, path, RunDirectory(path).read_config()) if path.is_dir() else _FileWeights(source, path)


def initial_weights(config: RunConfig, class_names: Sequence[str] | None = None) -> Weights:
    """Returns the run's first weights: those of `init_from`, or random ones from its seed.

    Pruning adds no parameters, so the dense model's weights fit the pruned one. A segmenter can start from a
    classifier, whose weights become those of its backbone; all else is then random.

    Args:
        config: the run's config.
        class_names: names of its data's classes, as for `SavedWeights.for_model`.

    Raises:
        InputError: as `find_weights` and `SavedWeights.for_model`.
        RunError: the checkpoint is damaged.
    """
    rngs = nnx.Rngs(config.seed)
    if config.init_from is None:
        return weights_of(build_model(config.model, rngs=rngs))
    saved = find_weights(config.init_from, config.model.name)
    if config.model.is_segmenter and not saved.is_segmenter():
        return saved.for_backbone(config.model, rngs=rngs)
    return saved.for_model(config.model, class_names=class_names, head=config.init_head, rngs=rngs)


def teacher_weights(run: RunDirectory, config: RunConfig, class_names: Sequence[str] | None = None) -> Weights | None:
    """Reads the teacher's weights: the run's own copy, or `distillation.teacher` where it has none yet.

    A run keeps a copy (`keep_teacher`), so that the teacher is the same at every start, even if the source is gone.

    Args:
        run: the run directory; where it holds a copy, its config must be this one (`RunDirectory.check_same_run`).
        config: the run's config.
        class_names: names of its data's classes, as for `SavedWeights.for_model`.

    Returns:
        Weights of the run's model without pruning, on the default device; None for a run without a teacher.

    Raises:
        InputError: no such source, or weights of another model or class count.
        RunError: the run's copy is damaged.
    """
    if config.distillation.teacher is None:
        return None
    if keeps_teacher(run):
        return read_teacher(run, config.model)
    try:
        saved = find_weights(config.distillation.teacher, config.model.name)
        return saved.for_model(config.model, class_names=class_names)
    except InputError as error:
        raise InputError(f"config.distillation.teacher, the run's model without pruning: {error}") from error


def is_run(source: str | Path) -> bool:
    """Returns whether weights are those of a run directory, not of a name, a file or another library's folder."""
    return not is_name(source) and Path(source).is_dir() and weights_in_folder(source) is None


def patches(config: ModelConfig) -> str:
    """Describes the grid and the stride of a model's patches, which the shapes of its weights do not show."""
    sizes = build_sizes(config)
    rows, columns = sizes.grid
    return f"a grid of {rows} x {columns} patches, stride {getattr(sizes, 'stride', sizes.patch_size)}"


def _fixed_part(weights: Weights) -> Weights:
    """Returns the weights whose shapes depend neither on the image size nor on the number of classes."""
    flat = flatten_dict(weights)
    fixed = [path for path in flat if path[-1] != "pos_embed" and not is_of_classes(path)]
    return unflatten_dict({path: flat[path] for path in fixed})

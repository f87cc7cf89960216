"""Runs a checkpoint on image files: class names with probabilities, pooled features, and the class of each pixel.

    for result in top_jax.predict("runs/my_images_photos", ["cat.jpg", "photos/"]):
        print(result.image, result.classes[0], result.probabilities[0])

It needs no extra.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from top_jax.build import as_classifier
from top_jax.config import DataConfig
from top_jax.convert import load_torch_checkpoint
from top_jax.data import prepare_image
from top_jax.data.sources.image_folder import files_in
from top_jax.data.transforms import DECODE_ERRORS, EXTENSIONS, decode, normalize, read_image, resize_center_crop
from top_jax.errors import InputError
from top_jax.evaluation.segmentation import make_predict
from top_jax.models import Backbone, Segmenter
from top_jax.models.weights import weights_of
from top_jax.training.saved_weights import find_weights
from top_jax.training.weights import load_checkpoint
from top_jax.values import path as path_of
from top_jax.values import refused, several, whole

logger = logging.getLogger(__name__)

DECODING_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
        image: the file.
        classes: names, most probable first.
        indices: their indices in the logits.
        probabilities: their probabilities, from the softmax over all classes.
    """

    image: str
    classes: tuple[str, ...]
    indices: tuple[int, ...]
    probabilities: tuple[float, ...]


class Classifier:
    """A checkpoint ready to be run on image files.

    Attributes:
        model: in eval mode, with the pruning of the run.
        class_names: in the order of the logits; `class 0` and so on where the checkpoint keeps none.
        data: how images are decoded, resized and normalised.
        unreadable: for each file so far that is not a readable image, the reason.
    """

    def __init__(self, model: Backbone, class_names: Sequence[str], data: DataConfig):
        self.model = model
        self.class_names = tuple(class_names)
        self.data = data
        self.unreadable: dict[str, str] = {}
        self._probabilities = jax.jit(lambda model, pixels: jax.nn.softmax(model(self._normalized(pixels))))
        self._pooled = jax.jit(lambda model, pixels: model.pool(model.features(self._normalized(pixels))))

    def predict(self, files: Sequence[str | Path], *, top_k: int = 5, batch_size: int = 32) -> Iterator[Prediction]:
        """Yields the prediction of each file, in order, without those that cannot be read (`unreadable`).

        Args:
            files: images; `image_files` lists those of folders.
            top_k: classes per image, at most as many as there are.
            batch_size: images per call of the model.
        """
        for names, probabilities in self._batches(self._probabilities, files, batch_size):
            best = np.argsort(-probabilities, axis=-1, kind="stable")[:, : whole("top_k", top_k)]
            for name, row, indices in zip(names, probabilities, best, strict=True):
                yield Prediction(
                    image=name,
                    classes=tuple(self.class_names[index] for index in indices),
                    indices=tuple(map(int, indices)),
                    probabilities=tuple(float(row[index]) for index in indices),
                )

    def features(self, files: Sequence[str | Path], *, batch_size: int = 32) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each readable file with its pooled features, float32 `[D]`; arguments as for `predict`."""
        for names, pooled in self._batches(self._pooled, files, batch_size):
            yield from zip(names, pooled, strict=True)

    def _batches(
        self, run: Callable[..., jax.Array], files: Sequence[str | Path], batch_size: int
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yields the names of each batch's readable files and the rows of `run` for them."""
        batch_size = min(whole("batch_size", batch_size), max(1, len(files)))
        height, width = self.model.config.img_size
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            for start in range(0, len(files), batch_size):
                batch = [str(file) for file in files[start : start + batch_size]]
                read = zip(batch, pool.map(self._read, batch), strict=True)
                readable = [(name, pixels) for name, pixels in read if pixels is not None]
                if not readable:
                    continue
                names = [name for name, _ in readable]
                rows = np.zeros((batch_size, height, width, 3), np.uint8)  # one shape: compiled once
                rows[: len(names)] = np.stack([pixels for _, pixels in readable])
                yield names, np.asarray(run(self.model, rows), np.float32)[: len(names)]

    def _read(self, file: str) -> np.ndarray | None:
        try:
            image = decode(Path(file).read_bytes(), **self.data.decoding())
        except DECODE_ERRORS as error:
            self.unreadable[file] = getattr(error, "strerror", None) or str(error)
            return None
        return np.asarray(resize_center_crop(image, self.model.config.img_size, eval_crop=self.data.eval_crop))

    def _normalized(self, pixels: Any) -> jax.Array:
        return normalize(pixels, self.data.mean, self.data.std)


def open_classifier(
    checkpoint: str | Path,
    model: str | None = None,
    *,
    which: str = "best",
    ema: bool | None = None,
    **overrides: Any,
) -> Classifier:
    """Loads a checkpoint to run on image files, with the class names that it keeps.

    Args:
        checkpoint: a run directory, which stores its model, pruning and preprocessing; an official file; or the name of
            one (`top_jax.convert.hub`).
        model: name of a file's model, as for `load_torch_checkpoint`; None for a run, and to infer it.
        which: `best` or `latest`, of a run.
        ema: whether to take the averaged weights; None takes them where a run kept them.
        **overrides: sizes of a file's model, as for `create_model`.

    Raises:
        InputError: no such checkpoint, or a file that does not fit its model.
        RunError: the checkpoint is damaged.
    """
    saved = find_weights(checkpoint, model)
    if saved.trained is None:
        loaded, data = load_torch_checkpoint(checkpoint, model, ema=bool(ema), **overrides), DataConfig()
    else:
        if model is not None or overrides:
            raise InputError(f"{checkpoint} is a run directory, which knows its model; drop model and its sizes.")
        loaded = load_checkpoint(saved.path, which=which, ema=ema)
        loaded, data = as_classifier(loaded, "classification", name=str(checkpoint)), saved.trained.data
    count = loaded.config.num_classes
    names = saved.class_names(count) or tuple(f"class {index}" for index in range(count))
    return Classifier(loaded, names, data)


def image_files(places: Sequence[str | Path]) -> list[str]:
    """Lists image files: for a folder, all files in it and below it; for a pattern such as `photos/*.jpg`, its matches.

    Raises:
        InputError: a file, folder or pattern gives no image.
    """
    found: list[str] = []
    for place in map(str, places):
        if os.path.isdir(place):
            inside = [os.path.join(place, file) for file in files_in(Path(place)) if file.lower().endswith(EXTENSIONS)]
        elif os.path.exists(place):
            inside = [place]
        else:
            inside = sorted(file for file in glob.glob(place, recursive=True) if os.path.isfile(file))
        if not inside:
            raise InputError(f"no image at {place}; pass files, folders, or patterns such as 'photos/*.jpg'.")
        found += inside
    return list(dict.fromkeys(found))


def predict(
    checkpoint: str | Path,
    images: str | Path | Sequence[str | Path],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    model: str | None = None,
    which: str = "best",
    ema: bool | None = None,
    **overrides: Any,
) -> list[Prediction]:
    """Classifies image files with a checkpoint: a run with its own pruning, or an official file.

    To classify repeatedly, keep `top_jax.inference.open_classifier(...)` and call its `predict`.

    Args:
        checkpoint: as for `open_classifier`, like model, which, ema and the overrides.
        images: files, folders (with all images below them) or patterns; one, or a sequence of them.
        top_k: classes per image.
        batch_size: images per call of the model.
        model: name of an official file's model.
        which: `best` or `latest`, of a run.
        ema: whether to take the averaged weights.
        **overrides: sizes of a file's model.

    Returns:
        One `Prediction` per readable image; a warning names each unreadable one.

    Raises:
        InputError: no such checkpoint or image, or none of the images can be read.
        RunError: the checkpoint is damaged.
    """
    if isinstance(images, str | os.PathLike):
        images = [images]
    places = several("images", images, "a path, or a sequence of paths")
    for place in places:
        if not isinstance(place, str | os.PathLike):
            raise refused("images", place, "a path, or a sequence of paths")
    if not places:
        raise refused("images", images, "at least one path")
    files = image_files([os.fspath(place) for place in places])
    classifier = open_classifier(checkpoint, model, which=which, ema=ema, **overrides)
    results = list(classifier.predict(files, top_k=top_k, batch_size=batch_size))
    check_readable(classifier, files)
    return results


def check_readable(classifier: Classifier, files: Sequence[str]) -> None:
    """Warns of each file that could not be read; raises InputError if none could."""
    if len(classifier.unreadable) == len(files):
        file, reason = next(iter(classifier.unreadable.items()))
        raise InputError(f"no image can be read ({len(files):,} tried), such as {file} ({reason}).")
    for file, reason in sorted(classifier.unreadable.items()):
        logger.warning("left out: %s cannot be read (%s)", file, reason)


def segment(model: Segmenter, image: str | Path | bytes | np.ndarray, *, data: DataConfig | None = None) -> np.ndarray:
    """Labels each pixel of a photograph, by slide or whole inference as the model was trained (`Segmenter.inference`).

    The photograph is resized to fit `data.scale` and normalised as evaluation does; the logits are resized to its own
    size. The model is compiled at the first call for slide inference, and for each new size for whole inference. To
    label many photographs, keep `top_jax.evaluation.segmentation.make_predict(model, data)`.

    Args:
        model: a segmenter with weights.
        image: a path, the bytes of an image file, or pixels, uint8 [H, W, 3].
        data: how the image is prepared; by default as in the run from which `load_checkpoint` read the model
            (`Segmenter.data`). Other models follow the official protocol: (2048, 512) for images of 512, in proportion
            for a ViM of another `img_size`; whole inference stretches to multiples of 32.

    Returns:
        int32 [H, W], the class of each pixel of the photograph.

    Raises:
        InputError: the model is not a segmenter, or the image cannot be read.
    """
    if not isinstance(model, Segmenter):
        raise refused(
            "model", model, "a segmenter, as load_checkpoint, load_torch_segmenter or create_segmenter returns it"
        )
    if model.is_abstract:
        raise InputError(
            "this model has only the shapes of its weights (abstract_segmenter); fill it first, or "
            "use create_segmenter."
        )
    if not isinstance(data, DataConfig | None):
        raise refused("data", data, "a top_jax.config.DataConfig, or None")
    data = model.data if data is None else data
    if data is None:
        slides = model.inference == "slide"
        side = min(model.config.backbone.img_size) if slides else 512
        data = DataConfig(scale=(4 * side, side), size_divisor=1 if slides else 32)
    if isinstance(image, str | os.PathLike):
        rgb = read_image(path_of("image", image), exif_rotate=data.exif_rotate)
    elif isinstance(image, bytes | np.ndarray):
        try:
            rgb = decode(image, **data.decoding())
        except DECODE_ERRORS as error:
            raise InputError(f"the image cannot be read ({error}).") from error
    else:
        raise refused("image", image, "a path, a file's bytes, or a NumPy array uint8[H, W, 3]")
    pixels = np.asarray(rgb)
    prepared = jax.numpy.asarray(prepare_image(pixels, data)[None])
    predict = make_predict(model)
    return np.asarray(predict(weights_of(model), prepared, (pixels.shape[0], pixels.shape[1])))[0]

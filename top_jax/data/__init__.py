"""Images to batches: sources (files, TFDS, Hugging Face, digits), transforms, the Grain pipeline, prefetch."""

from top_jax.data.examples import PADDING_INDEX
from top_jax.data.pipeline import Batch, Batches, DeviceBatch, eval_batches, prefetch_to_device, train_batches
from top_jax.data.segmentation import IGNORED, prepare_image
from top_jax.data.sources import DenseSource, Record, Source, check_classes, infer, is_dense, open_source
from top_jax.data.transforms import normalize, preprocess

__all__ = [
    "IGNORED",
    "PADDING_INDEX",
    "Batch",
    "Batches",
    "DenseSource",
    "DeviceBatch",
    "Record",
    "Source",
    "check_classes",
    "eval_batches",
    "infer",
    "is_dense",
    "normalize",
    "open_source",
    "prefetch_to_device",
    "prepare_image",
    "preprocess",
    "train_batches",
]

"""Images to batches: sources (files, TFDS, Hugging Face, digits), transforms, the Grain pipeline, prefetch."""

from top_jax.data.examples import PADDING_INDEX
from top_jax.data.pipeline import Batch, Batches, eval_batches, prefetch_to_device, train_batches
from top_jax.data.sources import Record, Source, check_classes, infer, open_source
from top_jax.data.transforms import normalize, preprocess

__all__ = [
    "PADDING_INDEX",
    "Batch",
    "Batches",
    "Record",
    "Source",
    "check_classes",
    "eval_batches",
    "infer",
    "normalize",
    "open_source",
    "prefetch_to_device",
    "preprocess",
    "train_batches",
]

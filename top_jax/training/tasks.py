"""The two tasks of a run, classification and segmentation: how each is evaluated, and its score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

from flax import nnx

from top_jax.config import DataConfig, ModelConfig
from top_jax.evaluation import accuracy, segmentation

EvalStep = Callable[[Any, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """Classification or segmentation.

    Attributes:
        score: name of the evaluation metric that decides which checkpoint is better.
        title: name of the score in text.
        shown: metrics of a step that are shown next to the progress bar.
        make_eval_step: builds the evaluation step from a model (shapes are enough) and the config's data section.
        summarize: computes an evaluation's numbers from the sums over its steps.
    """

    score: str
    title: str
    shown: tuple[str, ...]
    make_eval_step: Callable[[Any, DataConfig], EvalStep]
    summarize: Callable[[dict[str, Any]], dict[str, Any]]


CLASSIFICATION: Final = Task(
    score="accuracy",
    title="accuracy",
    shown=("loss", "accuracy"),
    make_eval_step=lambda model, data: accuracy.make_eval_step(nnx.graphdef(model), data),
    summarize=accuracy.accuracies,
)
SEGMENTATION: Final = Task(
    score="miou",
    title="mIoU",
    shown=("loss", "pixel_accuracy"),
    make_eval_step=lambda model, data: segmentation.make_eval_step(model),  # its batches are normalised already
    summarize=segmentation.numbers,
)


def task_of(config: ModelConfig) -> Task:
    """Returns the task of a model of these settings."""
    return SEGMENTATION if config.is_segmenter else CLASSIFICATION

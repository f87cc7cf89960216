"""What a model that loses tokens learns from the dense one.

The loss of an image is (1 - weight) CE + weight T^2 KL(teacher_T || student_T) + token_weight MSE(tokens).

Sources: the first two terms are DeiT's soft distillation (arXiv 2012.12877, section 4). That the teacher is the model
itself before pruning, and that tokens which are kept should stay what they were in it, is DynamicViT's (arXiv
2106.02034, section "Training and Inference"; raoyongming/DynamicViT, losses.py, `DistillDiffPruningLoss` with
mse_token), which weighs the terms 1, 0.5 and 0.5.

Ours: the class token counts as one more token; the mean is over the tokens of each image and then over images
(DynamicViT's images keep different numbers of tokens while it trains, and each token counts alike); a merged token is
compared at the place that it kept, and a fused token, which has no place, with nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from top_jax.models import Features
from top_jax.models.weights import Weights
from top_jax.typing import Array, Float, Images, Logits


def teach(graphdef: nnx.GraphDef[Any], weights: Weights, images: Images) -> tuple[Logits, Features]:
    """The teacher's logits and final tokens, through which no gradient flows.

    Args:
        graphdef: of the dense model; it runs in eval mode, whichever it is in.
        weights: all of its weights.
        images: float32 `[B, H, W, 3]`, the very ones that the student sees.
    """
    model = nnx.merge(graphdef, weights)
    model.eval()
    features = model.features(images)
    return jax.lax.stop_gradient((model.classify(features), features))


def prediction_loss(student: Logits, teacher: Logits, temperature: float) -> Float[Array, " B"]:
    """T^2 KL(teacher_T || student_T), nats, of softmaxes of logits / T."""
    log_student, log_teacher = (jax.nn.log_softmax(logits / temperature) for logits in (student, teacher))
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)


def token_loss(student: Features, teacher: Features) -> Float[Array, " B"]:
    """Mean squared difference of final tokens, over channels and over the tokens that the student kept.

    Args:
        student: its patch tokens are compared with the teacher's at their own positions; one that stands for no place
            (position -1) is left out. Its class token, where there is one, is compared with the teacher's.
        teacher: of the dense model, whose patch tokens are all there, in raster order.
    """
    place = jnp.maximum(student.positions, 0)[:, :, None]
    difference = jnp.mean(jnp.square(student.x - jnp.take_along_axis(teacher.x, place, axis=1)), axis=-1)
    counts = (student.positions >= 0).astype(difference.dtype)
    total, tokens = jnp.sum(difference * counts, axis=1), jnp.sum(counts, axis=1)
    if student.cls is not None and teacher.cls is not None:
        total, tokens = total + jnp.mean(jnp.square(student.cls - teacher.cls), axis=-1), tokens + 1
    return total / jnp.maximum(tokens, 1)

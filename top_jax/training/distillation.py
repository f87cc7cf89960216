"""Distillation losses: a pruned model learns from the dense one.

The loss of an image is (1 - weight) CE + weight T^2 KL(teacher_T || student_T) + token_weight MSE(tokens).

Sources: the first two terms are DeiT's soft distillation (arXiv 2012.12877, section 4). From DynamicViT: the
teacher is the model itself before pruning, and kept tokens should keep its values (arXiv 2106.02034, section "Training
and Inference"; raoyongming/DynamicViT, losses.py, `DistillDiffPruningLoss` with mse_token). Its weights of the three
terms are 1, 0.5 and 0.5.

Ours: the class token counts as one more token. The mean is over the tokens of each image, then over images (in
DynamicViT's training, images keep different numbers of tokens, and all tokens count equally). A merged token is
compared at the position that it kept. A fused token has no position and is left out.
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
    """Returns the teacher's logits and final tokens, without gradients.

    Args:
        graphdef: graph of the dense model, which is switched to eval mode.
        weights: all of its weights.
        images: float32 `[B, H, W, 3]`, the same that the student sees.
    """
    model = nnx.merge(graphdef, weights)
    model.eval()
    features = model.features(images)
    return jax.lax.stop_gradient((model.classify(features), features))


def prediction_loss(student: Logits, teacher: Logits, temperature: float) -> Float[Array, " B"]:
    """Returns T^2 KL(teacher_T || student_T) in nats, of softmaxes of logits / T."""
    log_student, log_teacher = (jax.nn.log_softmax(logits / temperature) for logits in (student, teacher))
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)


def token_loss(student: Features, teacher: Features) -> Float[Array, " B"]:
    """Returns the mean squared difference of final tokens, over channels and the tokens that the student kept.

    Args:
        student: each patch token is compared with the teacher's at the same position; a token without a position (-1)
            is left out. If there is a class token, it is compared with the teacher's.
        teacher: features of the dense model, with all patch tokens in raster order.
    """
    place = jnp.maximum(student.positions, 0)[:, :, None]
    difference = jnp.mean(jnp.square(student.x - jnp.take_along_axis(teacher.x, place, axis=1)), axis=-1)
    counts = (student.positions >= 0).astype(difference.dtype)
    total, tokens = jnp.sum(difference * counts, axis=1), jnp.sum(counts, axis=1)
    if student.cls is not None and teacher.cls is not None:
        total, tokens = total + jnp.mean(jnp.square(student.cls - teacher.cls), axis=-1), tokens + 1
    return total / jnp.maximum(tokens, 1)

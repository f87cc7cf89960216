"""Models by name, as in timm: lists them, builds them with or without official weights, and describes their input."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from top_jax import models
from top_jax.convert.official_files import OFFICIAL_FILES, model_of
from top_jax.convert.torch_checkpoint import load_torch_checkpoint
from top_jax.errors import InputError
from top_jax.models import MODELS, Backbone, Segmenter, model_config
from top_jax.pruning import Reduction
from top_jax.values import flag, one_of, refused

_IMAGENET_CLASSES = 1000  # classes of every official file
_NO_FIXED_SIZE = "top_jax.segment(model, photo) prepares photographs of any size."


def list_models(filter: str | Sequence[str] = "", pretrained: bool = False) -> list[str]:
    """Lists model names.

    Args:
        filter: a pattern with * and ?, such as `vim_*`, or several of which one must match; empty for all.
        pretrained: list the names of official weights, which `create_model(name, pretrained=True)` takes. Those with a
            dot are variants, such as `vim_small.stride8`.

    Raises:
        InputError: an argument of another type.
    """
    patterns = [filter] if isinstance(filter, str) else filter
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise refused("filter", filter, "a pattern such as 'vim_*', or several")
    names = OFFICIAL_FILES if flag("pretrained", pretrained) else MODELS
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern or "*") for pattern in patterns or [""])]


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    rngs: nnx.Rngs | None = None,
    pruning: Reduction | None = None,
    **overrides: Any,
) -> Backbone:
    """Builds a model, in eval mode; `.train()` turns on drop-path and batch statistics.

    Args:
        name: name of a model, such as `vim_small` or `plain_mamba_l1`; with `pretrained` also a name in
            `list_models(pretrained=True)`, such as `vim_small.stride8`.
        pretrained: load the official weights, downloaded once (`top_jax.convert.hub`). With another `num_classes` than
            1,000 the head is new, with random weights.
        rngs: source of the random weights, `nnx.Rngs(0)` by default.
        pruning: how tokens are reduced (`top_jax.pruning`); None is the dense model. It adds no parameters.
        **overrides: any field of the model's config (`VimConfig`, `PlainMambaConfig`, `DeitConfig`): `num_classes` (0:
            no head, the model returns pooled features), `img_size` (a side, or (height, width); official position
            embeddings are resized to it), `patch_size`, `stride` (the patch size by default), `embed_dim`, `depth`,
            `d_state`, `drop_path`, `dtype`, `implementation`, `remat` and others.

    Raises:
        InputError: an unknown name or override, a value of another type or out of range, sizes that do not fit together
            or differ from those of the official weights, or huggingface_hub is missing.
        RunError: the weights are not cached, and cannot be downloaded.
    """
    if not flag("pretrained", pretrained):
        if isinstance(name, str) and name in OFFICIAL_FILES and name not in MODELS:
            sizes = "".join(f", {key}={value}" for key, value in OFFICIAL_FILES[name].sizes.items())
            raise InputError(
                f"{name} is the name of official weights; pass pretrained=True to load them, or for random weights "
                f"create_model({model_of(name)!r}{sizes})."
            )
        return models.create_model(name, rngs=rngs, pruning=pruning, **overrides)
    model = model_of(one_of("pretrained model", name, OFFICIAL_FILES))
    config = model_config(model, **{**OFFICIAL_FILES[name].sizes, **overrides})
    head = "load" if config.num_classes in (0, _IMAGENET_CLASSES) else "new"
    return load_torch_checkpoint(f"pretrained:{name}", model, pruning, head=head, rngs=rngs, **overrides)


def data_config(model: str | Path | Backbone) -> dict[str, Any]:
    """Returns how images are prepared for a model: the keyword arguments of `top_jax.preprocess`.

    Args:
        model: the name of a model or variant, a model, or a run directory. Names and models get the preprocessing of
            the official weights; for a model that you trained, pass its run directory, because the model does not store
            its data settings.

    Returns:
        `img_size` (height, width) in pixels, `eval_crop`, `interpolation`, `mean`, `std` and `exif_rotate`.

    Raises:
        InputError: neither a known name nor a run directory, or a segmenter, for which `top_jax.segment` prepares
            photographs of any size.
    """
    from top_jax.config import DataConfig

    if isinstance(model, Backbone):
        return _prepared(model.config.img_size, DataConfig())
    if isinstance(model, str) and model in (*MODELS, *OFFICIAL_FILES):
        return _prepared(MODELS[model_of(model)].img_size, DataConfig())
    if isinstance(model, Segmenter):
        raise InputError(f"model is a segmenter; {_NO_FIXED_SIZE}")
    if not isinstance(model, str | Path) or not Path(model).is_dir():
        raise refused("model", model, f"a model, a run directory, or one of {', '.join(MODELS)}")

    from top_jax.build import build_sizes
    from top_jax.training.run_directory import RunDirectory

    config = RunDirectory(model).read_config()
    if config.model.is_segmenter:
        raise InputError(f"{model} is the run of a segmenter; {_NO_FIXED_SIZE}")
    return _prepared(build_sizes(config.model).img_size, config.data)


def _prepared(img_size: tuple[int, int], data: Any) -> dict[str, Any]:
    return {
        "img_size": img_size,
        "eval_crop": data.eval_crop,
        "interpolation": "bicubic",
        "mean": data.mean,
        "std": data.std,
        "exif_rotate": data.exif_rotate,
    }

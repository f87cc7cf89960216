"""Sections that configs share: augmentation as the papers' authors train with it, ours for small images, and CIFAR-10.

    augment=recipes.deit()

Colour jitter is 0 in all of the ImageNet recipes: where RandAugment is on, timm leaves colour jitter out whatever
factor the authors' scripts pass (timm 0.4.12, data/transforms_factory.py), while a config here does what it says.

What no value can mirror:

- Mixing draws its share and rectangle once for a step's whole batch; the authors draw once on each GPU.
- The flip comes after RandAugment, on the device. Only ShearY can tell: it holds the left edge of an image, so after
  a flip the right one.
- The copies of repeated augmentation stand in one batch in a row; the authors' lie on different GPUs of a step.
"""

from __future__ import annotations

from typing import Any

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


def deit() -> dict[str, Any]:
    """DeiT's, which ViM and EViT kept, for fine-tuning too: the defaults of the three main.py.

    Source: facebookresearch/deit, hustvl/Vim (vim/main.py) and youweiliang/evit, main.py; all three turn repeated
    augmentation on by default, with the 3 copies of samplers.py.
    """
    return {
        "repeats": 3,
        "rand_augment": RAND_AUGMENT,
        "color_jitter": 0.0,
        "flip": True,
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mix_probability": 1.0,
        "switch_probability": 0.5,
    }


def plain_mamba() -> dict[str, Any]:
    """PlainMamba's: DeiT's values, each image once. Every batch is mixed, by mixup and cutmix half of the time each.

    Source: ChenhongyiYang/PlainMamba, plain_mamba_configs/plain_mamba_l*_in1k_300e.py (BatchMixup and BatchCutMix,
    probability 0.5 each) and configs/_base_/datasets/imagenet_bs64_swin_224_lmdb.py.

    Written for mmcls, they differ from ours, which are timm's, in three places:

    - RandAugment's operations are OpenCV's (mmcv), not PIL's, with the same ranges: the pixels differ.
    - Erased rectangles have the same limits (2 % to a third of the area, sides 3:10 to 10:3), but one that does not
      fit is cut to the image's side, where timm draws again; their noise is cut to the range of pixels.
    - Images are paired at random for mixing; ours pairs the first of the batch with the last, and so on.
    """
    return deit() | {"repeats": 1}


def small_images() -> dict[str, Any]:
    """Ours, for 32 pixels (CIFAR-10): everything is on, and milder, so that a small model can still learn.

    A shift by RandAugment is a share of the image and so suits any size, but at magnitude 9 the colours of an image
    of 32 pixels leave little to see. Both colour jitter and RandAugment are on, each of them weak.
    """
    return {
        "repeats": 2,
        "rand_augment": "rand-m5-mstd0.5-inc1",
        "color_jitter": 0.1,
        "flip": True,
        "erasing": 0.1,
        "mixup": 0.2,
        "cutmix": 1.0,
        "mix_probability": 0.5,
        "switch_probability": 0.5,
    }


def cifar10() -> dict[str, Any]:
    """`config.data` of CIFAR-10 in a TFDS directory, its 32 pixels kept, with the usual mean and deviation."""
    return {
        "source": "tfds",
        "name": "cifar10",
        "train_transform": "shift_crop",
        "eval_crop": 1.0,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
    }

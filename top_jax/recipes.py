"""Training recipes, published ones and ours for small images: complete configs, and the sections that they share.

    return recipes.vim_imagenet("small", batch_size=512, learning_rate=1e-3, drop_path=0.05, weight_decay=0.05)
    return make_config(..., augment=recipes.deit())

A file in `configs/` calls one of the recipes with the values that differ from model to model. A recipe returns a
ConfigDict of all settings; a section, such as `deit()`, returns a dict of one part of `RunConfig`.

Some properties of the authors' training cannot be expressed by a setting:

- Colour jitter is 0 in every ImageNet recipe. Where RandAugment is on, timm skips colour jitter whatever factor the
  authors' scripts pass (timm 0.4.12, data/transforms_factory.py); here a factor above 0 would be applied.
- Mixing draws its share and its rectangle once per step for the whole batch; the authors draw once per GPU.
- The flip runs on the device, after RandAugment. Only ShearY depends on this order: it fixes the left edge of an image,
  which is the right edge if a flip follows.
- The copies of repeated augmentation follow each other in one batch; the authors' copies go to different GPUs.
- Matrix products run in bfloat16. The authors of DeiT and PlainMamba-L1 train under float16 autocast, those of ViM and
  of the larger PlainMambas in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from top_jax.config import make_config

if TYPE_CHECKING:
    from ml_collections import config_dict

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


def vim_imagenet(
    size: str, *, batch_size: int, learning_rate: float, drop_path: float, weight_decay: float
) -> config_dict.ConfigDict:
    """Trains a dense ViM for 300 epochs as its authors do; the learning rate is per 512 images.

    Source: hustvl/Vim, vim/scripts/pt-vim-t.sh and pt-vim-s.sh, and the defaults of vim/main.py. There is no public
    script for `base`. The authors' optimizer (timm 0.4.12) also decays A_log; ours does not.

    Args:
        size: `tiny`, `small` or `base`.
        batch_size: images per step, over all devices.
        learning_rate: peak learning rate.
        drop_path: rate of the last block.
        weight_decay: AdamW's weight decay.
    """
    return _dense(
        f"vim_{size}",
        batch_size=batch_size,
        drop_path=drop_path,
        augment=deit(),
        optimizer=dict(learning_rate=learning_rate, weight_decay=weight_decay, ema_decay=0.99996),
    )


def deit_imagenet(size: str) -> config_dict.ConfigDict:
    """Trains a dense DeiT for 300 epochs as its authors do, without distillation; the learning rate is per 512 images.

    Source: facebookresearch/deit, the defaults of main.py with the batch of its README (4 x 256 images).

    Args:
        size: `tiny`, `small` or `base`.
    """
    return _dense(
        f"deit_{size}",
        batch_size=1024,
        drop_path=0.1,
        augment=deit(),
        optimizer=dict(learning_rate=5e-4, weight_decay=0.05, ema_decay=0.99996),
    )


def plain_mamba_imagenet(
    size: str,
    *,
    batch_size: int,
    drop_path: float,
    clip_norm: float,
    warmup_epochs: float,
    warmup_learning_rate: float,
    min_learning_rate: float,
    ema_decay: float | None = None,
) -> config_dict.ConfigDict:
    """Trains a dense PlainMamba for 300 epochs as its authors do; the learning rate is per 512 images.

    Source: ChenhongyiYang/PlainMamba, plain_mamba_configs/plain_mamba_l*_in1k_300e.py. The authors' moving average of
    L2 and L3 should change its decay at epoch 250 (`decay_factor=10`; the public hook defines no value from there on);
    ours keeps its decay.

    Args:
        size: `l1`, `l2` or `l3`.
        batch_size: images per step, over all devices.
        drop_path: rate of the last block.
        clip_norm: largest global norm of the gradient.
        warmup_epochs: epochs of linear warm-up.
        warmup_learning_rate: learning rate at step 0, not scaled with the batch.
        min_learning_rate: learning rate at the end, not scaled with the batch.
        ema_decay: decay per step of the moving average of the weights; None for no average.
    """
    return _dense(
        f"plain_mamba_{size}",
        batch_size=batch_size,
        drop_path=drop_path,
        augment=plain_mamba(),
        optimizer=dict(
            learning_rate=5e-4,
            warmup_learning_rate=warmup_learning_rate,
            min_learning_rate=min_learning_rate,
            warmup_epochs=warmup_epochs,
            weight_decay=0.05,
            clip_norm=clip_norm,
            ema_decay=ema_decay,
        ),
    )


def finetune(
    name: str, pruning: Mapping[str, Any], *, drop_path: float, clip_norm: float | None = None
) -> config_dict.ConfigDict:
    """Fine-tunes dense weights with token pruning for 30 epochs, as ToP does for ViM.

    Without `init_from` the run warns and starts from random weights.

    Source: ToP (arXiv 2409.18962): 8 x 64 images, 30 epochs, weight decay 1e-8, the augmentation of ViM's main.py. The
    authors' script sets a learning rate of 5e-6 with a minimum of 1e-5, so that it would rise; ours falls from 1e-5 to
    1e-6. Averaged weights, main.py's default, are not kept. The paper gives no recipe for PlainMamba: we use ToP's for
    ViM, with PlainMamba's own gradient clipping, drop-path and augmentation.

    Args:
        name: a ViM or PlainMamba, such as `vim_small`.
        pruning: the section of `RunConfig`: `top(...)` or `naive(...)`.
        drop_path: rate of the last block, the dense model's.
        clip_norm: largest global norm of the gradient; None does not clip.
    """
    return _imagenet(
        name,
        batch_size=512,
        epochs=30.0,
        eval_every_epochs=1.0,
        checkpoint_every=1000,
        drop_path=drop_path,
        pruning=dict(pruning),
        augment=plain_mamba() if name.startswith("plain_mamba") else deit(),
        optimizer=dict(
            learning_rate=1e-5,
            warmup_learning_rate=1e-6,
            min_learning_rate=1e-6,
            warmup_epochs=5.0,
            weight_decay=1e-8,
            clip_norm=clip_norm,
        ),
    )


def evit_finetune(size: str) -> config_dict.ConfigDict:
    """Fine-tunes a DeiT with EViT for 30 epochs as its authors do; the learning rate is per 512 images.

    Without `init_from` the run warns and starts from random weights.

    Source: youweiliang/evit, finetune.sh (8 x 256 images) and the defaults of its main.py. Averaged weights, main.py's
    default, are not kept.

    Args:
        size: `tiny`, `small` or `base`.
    """
    return _imagenet(
        f"deit_{size}",
        batch_size=2048,
        epochs=30.0,
        eval_every_epochs=1.0,
        checkpoint_every=500,
        drop_path=0.1,
        pruning=dict(method="evit", after_blocks=(4, 7, 10), keep_ratio=(0.7,)),
        augment=deit(),
        optimizer=dict(
            learning_rate=2e-5,
            reference_batch_size=512,
            warmup_learning_rate=1e-6,
            min_learning_rate=2e-6,
            warmup_epochs=0.0,
            weight_decay=1e-6,
        ),
    )


def vim_cifar10(
    *,
    epochs: float,
    learning_rate: float,
    warmup_epochs: float,
    drop_path: float,
    pruning: Mapping[str, Any] | None = None,
) -> config_dict.ConfigDict:
    """Trains a small ViM on CIFAR-10, whose images keep their 32 pixels (our recipe).

    Args:
        epochs: length of the training in epochs.
        learning_rate: peak learning rate.
        warmup_epochs: epochs of linear warm-up.
        drop_path: rate of the last block.
        pruning: the section of `RunConfig`; None is the dense model.
    """
    return make_config(
        batch_size=128,
        eval_batch_size=200,
        epochs=epochs,
        eval_every_epochs=2.0,
        checkpoint_every=500,
        model=dict(
            name="vim_tiny",
            num_classes=10,
            img_size=(32,),
            patch_size=4,
            embed_dim=96,
            depth=12,
            drop_path=drop_path,
        ),
        pruning=dict(pruning or {}),
        data=cifar10(),
        augment=small_images(),
        optimizer=dict(learning_rate=learning_rate, warmup_epochs=warmup_epochs, weight_decay=0.05, clip_norm=1.0),
    )


def vim_digits(pruning: Mapping[str, Any] | None = None) -> config_dict.ConfigDict:
    """Trains a small ViM on scikit-learn's digits (8 x 8 pixels), which needs no download (our recipe).

    Digits are cropped at random, and not flipped.

    Args:
        pruning: the section of `RunConfig`; None is the dense model.
    """
    return make_config(
        batch_size=64,
        eval_batch_size=120,
        epochs=25.0,
        log_every=20,
        eval_every_epochs=5.0,
        checkpoint_every=100,
        model=dict(name="vim_tiny", num_classes=10, img_size=(8,), patch_size=2, embed_dim=64, depth=6, d_state=4),
        pruning=dict(pruning or {}),
        data=dict(source="digits", min_area=0.6, eval_crop=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        augment=dict(flip=False),
        optimizer=dict(learning_rate=3e-3, warmup_epochs=2.0, weight_decay=0.05, clip_norm=1.0),
    )


def vim_ade20k(size: str, pruning: Mapping[str, Any] | None = None) -> config_dict.ConfigDict:
    """Trains UPerNet over a ViM on ADE20K for 60,000 steps as ViM's authors do; `init_from` gives the backbone.

    Source: hustvl/Vim, seg/configs/vim/upernet and its scripts; mmseg 0.29.1. Ours differs from it:

    - The backbone is the pre-trained classifier itself (variant `residual`). The authors' ViM-T takes the mixers'
      outputs as maps, and their ViM-S adds rotary embeddings and does not average the two directions; the pre-trained
      classifier does neither. `--config.model.variant=official_tiny` or `official_small` trains theirs.
    - Only the stem's learning rate is lowered, as in the authors' code, which looks for blocks under another name.
      `--config.optimizer.layer_decay_rule=blocks` lowers those of the blocks too, as the authors' settings intend.
    - A_log, norms, biases and the position embedding have no weight decay.

    Args:
        size: `tiny` or `small`.
        pruning: the section of `RunConfig`; None is the dense model.
    """
    learning_rate, weight_decay, layer_decay = {"tiny": (2e-4, 0.1, 0.92), "small": (1e-4, 0.05, 0.95)}[size]
    return _ade20k(
        f"vim_{size}",
        batch_size=32,
        total_steps=60_000,
        eval_every_epochs=9.5,  # 6,000 steps
        model=dict(img_size=(512,), drop_path=0.1),
        pruning=dict(pruning or {}),
        optimizer=dict(
            learning_rate=learning_rate,
            warmup_learning_rate=1e-6 * learning_rate,
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            layer_decay_rule="official",
        ),
    )


def plain_mamba_ade20k(size: str, pruning: Mapping[str, Any] | None = None) -> config_dict.ConfigDict:
    """Trains UPerNet over a PlainMamba on ADE20K for 160,000 steps as its authors do; `init_from` gives the backbone.

    Source: ChenhongyiYang/PlainMamba, downstream/mmsegmentation; mmseg 0.23.0. The authors exempt norms, position
    embedding, A_log, D and direction_Bs from weight decay; we also exempt biases and the heads' BatchNorm.

    Args:
        size: `l1`, `l2` or `l3`.
        pruning: the section of `RunConfig`; None is the dense model.
    """
    return _ade20k(
        f"plain_mamba_{size}",
        batch_size=16,
        total_steps=160_000,
        eval_every_epochs=12.6,  # 16,000 steps
        model=dict(drop_path={"l1": 0.1, "l2": 0.2, "l3": 0.3}[size]),
        data=dict(crop_size=(512,), size_divisor=32),
        pruning=dict(pruning or {}),
        optimizer=dict(learning_rate=6e-5, warmup_learning_rate=6e-11, weight_decay=0.01),
    )


def seg_digits(pruning: Mapping[str, Any] | None = None) -> config_dict.ConfigDict:
    """Trains a small PlainMamba with UPerNet on digits pasted onto photographs, which need no download (our recipe).

    Photographs and digits are those of scikit-learn: real pixels, labels by construction. There are 11 classes:
    background, and the strokes of ten digits. Batches are small, because the model distinguishes digits only after 350
    to 500 steps, with batches of 8 and of 16. A ViM of this size still confused all digits after 300 steps of 16
    images, with patches of 8 and of 12; the reason is not known.

    Args:
        pruning: the section of `RunConfig`; None is the dense model.
    """
    return make_config(
        batch_size=8,
        eval_batch_size=60,
        epochs=5.5,
        log_every=40,
        eval_every_epochs=3.0,
        checkpoint_every=200,
        model=dict(
            name="plain_mamba_l1",
            head="uper",
            num_classes=11,
            img_size=(64,),
            patch_size=8,
            embed_dim=64,
            depth=6,
            d_state=8,
            d_conv=3,
            num_convs_patch_embed=0,
            channels=64,
            aux_channels=64,
        ),
        pruning=dict(pruning or {}),
        data=dict(source="digit_scenes", scale=(64, 64), scale_range=(1.0, 1.0), max_class_share=1.0),
        augment=dict(flip=False),
        optimizer=_segmentation(learning_rate=3e-3, warmup_learning_rate=3e-6, weight_decay=0.05, clip_norm=1.0)
        | dict(warmup_steps=60),
    )


def my_labels(
    pruning: Mapping[str, Any] | None = None,
    *,
    epochs: float = 40.0,
    learning_rate: float = 2e-4,
) -> config_dict.ConfigDict:
    """Trains a segmenter over ViM-T on your own folder of photographs and label maps (our recipe).

    Classes, splits and batch size come from the folder (`data.infer`). `init_from` gives the weights to start from: a
    classifier's for the backbone, or a segmenter's.

    Args:
        pruning: the section of `RunConfig`; None is the dense model.
        epochs: length of the training in epochs.
        learning_rate: peak learning rate; the stem's is lower, by `layer_decay`.
    """
    return make_config(
        batch_size=8,
        epochs=epochs,
        log_every=10,
        eval_every_epochs=5.0,
        checkpoint_every=200,
        model=dict(name="vim_tiny", head="uper", img_size=(512,), drop_path=0.1),
        pruning=dict(pruning or {}),
        data=dict(source="segmentation_folder", infer=True, num_workers=None),
        augment=dict(photometric=True),
        optimizer=_segmentation(
            learning_rate=learning_rate,
            warmup_learning_rate=1e-6 * learning_rate,
            weight_decay=0.05,
            clip_norm=1.0,
            layer_decay=0.9,
        )
        | dict(warmup_steps=100),
    )


def my_images(
    pruning: Mapping[str, Any] | None = None,
    *,
    init_head: str = "new",
    epochs: float = 30.0,
    learning_rate: float = 5e-4,
) -> config_dict.ConfigDict:
    """Fine-tunes a ViM on your own image folder; learning rates fall from the head towards the stem (our recipe).

    Classes, splits and batch sizes come from the folder (`data.infer`). `init_from` gives the weights to start from.

    Args:
        pruning: the section of `RunConfig`; None is the dense model.
        init_head: `new` for weights of other classes, `load` for those of a run on the same folder.
        epochs: length of the training in epochs.
        learning_rate: peak learning rate of the head.
    """
    return make_config(
        batch_size=32,
        epochs=epochs,
        log_every=10,
        eval_every_epochs=5.0,
        checkpoint_every=200,
        init_head=init_head,
        model=dict(name="vim_small", drop_path=0.05),
        pruning=dict(pruning or {}),
        data=dict(source="image_folder", infer=True, min_area=0.3, exif_rotate=True, num_workers=None),
        augment=dict(color_jitter=0.2),
        optimizer=dict(
            learning_rate=learning_rate,
            min_learning_rate=1e-6,
            warmup_epochs=2.0,
            weight_decay=0.05,
            clip_norm=1.0,
            layer_decay=0.85,
        ),
    )


def study(name: str, **model: Any) -> config_dict.ConfigDict:
    """Trains a dense model of docs/study.md on a CPU: 200 steps on CIFAR-10, patches of 2 pixels (our recipe).

    Only crops and flips, because the runs are short.

    Args:
        name: model name, such as `vim_tiny`.
        **model: its other settings.
    """
    return make_config(
        batch_size=64,
        eval_batch_size=250,
        total_steps=200,
        log_every=20,
        eval_every_epochs=1000.0,
        checkpoint_every=100,
        model=dict(name=name, num_classes=10, img_size=(32,), patch_size=2, embed_dim=48, depth=6, d_state=4, **model),
        data=cifar10(),
        optimizer=dict(learning_rate=1e-3, warmup_epochs=0.02, weight_decay=0.05, clip_norm=1.0, label_smoothing=0.0),
    )


def study_gpu(name: str, **model: Any) -> config_dict.ConfigDict:
    """Trains a dense model of docs/study.md on a GPU: 30 epochs of CIFAR-10, patches of 2 pixels (our recipe).

    Every augmentation is on, each milder than ImageNet's.

    Args:
        name: model name, such as `vim_tiny`.
        **model: its other settings.
    """
    return make_config(
        batch_size=256,
        eval_batch_size=1000,
        epochs=30.0,
        eval_every_epochs=10.0,
        checkpoint_every=500,
        model=dict(
            name=name,
            num_classes=10,
            img_size=(32,),
            patch_size=2,
            embed_dim=128,
            depth=12,
            drop_path=0.05,
            dtype="bfloat16",
            **model,
        ),
        data=cifar10() | dict(num_workers=None),
        augment=small_images(),
        optimizer=dict(learning_rate=1e-3, warmup_epochs=2.0, weight_decay=0.05, clip_norm=1.0),
    )


def top(after_blocks: tuple[int, ...], keep_ratio: float) -> dict[str, Any]:
    """Returns `config.pruning` of ToP: tokens ranked by the clipped scan output, `hold` alignment."""
    return dict(after_blocks=after_blocks, keep_ratio=(keep_ratio,))


def naive(after_blocks: tuple[int, ...], keep_ratio: float) -> dict[str, Any]:
    """Returns `config.pruning` of the baseline, pruning as in a ViT: best tokens first, and positions re-indexed.

    ViM's class token moves to the middle of the kept tokens, and PlainMamba scans a condensed grid. An SSM has no
    attention that could rank tokens, so the score is ToP's. `--config.pruning.fuse=True` adds EViT's fused token.
    """
    return dict(method="evit", after_blocks=after_blocks, keep_ratio=(keep_ratio,), score="clip", fuse=False)


def deit() -> dict[str, Any]:
    """Returns `config.augment` of DeiT, which ViM and EViT kept, for fine-tuning too.

    Source: the defaults of main.py in facebookresearch/deit, hustvl/Vim (vim/main.py) and youweiliang/evit. All three
    turn repeated augmentation on by default, with the 3 copies of samplers.py.
    """
    return {
        "repeats": 3,
        "rand_augment": RAND_AUGMENT,
        "color_jitter": 0.0,
        "flip": True,
        "photometric": False,
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mix_probability": 1.0,
        "switch_probability": 0.5,
    }


def plain_mamba() -> dict[str, Any]:
    """Returns `config.augment` of PlainMamba: DeiT's values, each image once.

    Every batch is mixed, with equal probability by mixup or cutmix.

    Source: ChenhongyiYang/PlainMamba, plain_mamba_configs/plain_mamba_l*_in1k_300e.py (BatchMixup and BatchCutMix,
    probability 0.5 each) and configs/_base_/datasets/imagenet_bs64_swin_224_lmdb.py. The authors' augmentation is that
    of mmcls, ours follows timm. They differ in three points:

    - RandAugment's operations are OpenCV's (mmcv) instead of PIL's, with the same ranges, so the pixels differ.
    - Erased rectangles have the same limits (2 % to a third of the area, sides 3:10 to 10:3). mmcls clips one that does
      not fit, where timm draws again, and clips the noise to the range of pixels.
    - mmcls pairs images at random for mixing; ours pairs the first of the batch with the last, and so on.
    """
    return deit() | {"repeats": 1}


def small_images() -> dict[str, Any]:
    """Returns `config.augment` for CIFAR-10's 32 pixels: everything on, but milder, so that a small model still learns.

    RandAugment shifts by a share of the image and so suits any size, but its colour changes at magnitude 9 are too
    strong for 32 pixels. Therefore we use both RandAugment and colour jitter, and weak ones.
    """
    return {
        "repeats": 2,
        "rand_augment": "rand-m5-mstd0.5-inc1",
        "color_jitter": 0.1,
        "flip": True,
        "photometric": False,
        "erasing": 0.1,
        "mixup": 0.2,
        "cutmix": 1.0,
        "mix_probability": 0.5,
        "switch_probability": 0.5,
    }


def cifar10() -> dict[str, Any]:
    """Returns `config.data` of CIFAR-10 in a TFDS directory: 32 pixels, the usual mean and standard deviation."""
    return {
        "source": "tfds",
        "name": "cifar10",
        "train_transform": "shift_crop",
        "eval_crop": 1.0,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
    }


def _dense(
    name: str, *, batch_size: int, drop_path: float, augment: dict[str, Any], optimizer: dict[str, Any]
) -> config_dict.ConfigDict:
    """Trains a dense model on ImageNet-1K for 300 epochs; the learning rate is per 512 images."""
    common = dict(reference_batch_size=512, warmup_learning_rate=1e-6, min_learning_rate=1e-5, warmup_epochs=5.0)
    return _imagenet(
        name,
        batch_size=batch_size,
        epochs=300.0,
        eval_every_epochs=5.0,
        checkpoint_every=2500,
        drop_path=drop_path,
        augment=augment,
        optimizer=common | optimizer,
    )


def _ade20k(name: str, *, model: dict[str, Any], optimizer: dict[str, Any], **settings: Any) -> config_dict.ConfigDict:
    """Trains a segmenter on ADE20K: mmseg's pipeline at 512 x 512, and its schedule."""
    data = dict(
        source="ade20k",
        train_split="training",
        eval_split="validation",
        reduce_zero_label=True,
        num_workers=None,
    )
    return make_config(
        model=dict(name=name, head="uper", num_classes=150, dtype="bfloat16") | model,
        data=data | settings.pop("data", {}),
        augment=dict(flip=True, photometric=True),
        optimizer=_segmentation(**optimizer),
        eval_batch_size=8,
        checkpoint_every=1000,
        **settings,
    )


def _segmentation(**optimizer: Any) -> dict[str, Any]:
    """Returns `config.optimizer` of mmseg's schedule: a line to 0, times a linear warm-up of 1,500 steps."""
    common = dict(schedule="poly", min_learning_rate=0.0, warmup_steps=1500, label_smoothing=0.0)
    return common | optimizer


def _imagenet(name: str, *, drop_path: float, optimizer: dict[str, Any], **settings: Any) -> config_dict.ConfigDict:
    """Trains a model on ImageNet-1K, read from a TFDS directory, with every core decoding."""
    return make_config(
        model=dict(name=name, num_classes=1000, drop_path=drop_path, dtype="bfloat16"),
        data=dict(source="tfds", name="imagenet2012", eval_split="validation", num_workers=None),
        optimizer=dict(label_smoothing=0.1) | optimizer,
        **settings,
    )

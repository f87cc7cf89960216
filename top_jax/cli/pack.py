"""Packs the training and evaluation splits of a config into one file, which --config.data.source=packed reads.

top-jax pack cifar10.npz --config configs/vim_cifar10.py --config.data.data_dir=DIR
python train.py --config configs/vim_cifar10.py --config.data.source=packed --config.data.data_dir=cifar10.npz

This is for a machine that neither has the dataset nor can fetch it. The images are not encoded again.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from top_jax import files
from top_jax.cli import runner, shared_flags, terminal
from top_jax.errors import InputError

_CONFIG = shared_flags.define_config()
_JSON = flags.DEFINE_string("json", None, "File for the report; by default next to the packed file.")


def main(arguments: list[str]) -> None:
    """Reads two splits and writes one file."""
    from top_jax.data import open_source
    from top_jax.data.sources.packed import pack

    if len(arguments) != 1 or not arguments[0].endswith(".npz"):
        raise InputError(
            f"needed: the name of one .npz file to write; given: {' '.join(arguments) or 'none'} (--help)."
        )
    path, data = Path(arguments[0]), shared_flags.read_config(_CONFIG).data
    if path.exists():
        raise InputError(f"{path} exists; choose another name, or delete it.")
    runner.check_json(_JSON.value, path)
    splits = {data.train_split: open_source(data, train=True), data.eval_split: open_source(data, train=False)}
    with terminal.progress("packing", sum(map(len, splits.values()))) as advance:
        pack(path, data.name or data.source, splits, config=data, on_images=advance)
    report = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "images": {split: len(source) for split, source in splits.items()},
    }
    counts = ", ".join(f"{split} {images:,}" for split, images in report["images"].items())
    print(f"{path}: {counts} images, {report['bytes'] / 2**20:.1f} MiB")
    print(f"use it with --config.data.source=packed --config.data.data_dir={path}")
    files.save_json(_JSON.value or path.with_suffix(".json"), report)


if __name__ == "__main__":
    runner.run(main)

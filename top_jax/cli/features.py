"""Writes the pooled features of a folder of images (the input of the classifier's head) with their labels.

top-jax features PHOTOS --checkpoint runs/my_images_PHOTOS --output features.npz

PHOTOS holds one folder per class, or images without classes. The .npz file holds `features` float32 [N, D], `labels`
int32 [N] (-1 without classes), `class_names` [C] and `files` [N]. docs/guides/own_images.md trains a linear probe.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags

from top_jax.cli import runner, shared_flags, terminal
from top_jax.errors import InputError

_CHECKPOINT = shared_flags.define_classifier()
_OUTPUT = flags.DEFINE_string("output", None, "The .npz file to write.", required=True)


def main(arguments: list[str]) -> None:
    """Lists the folder, runs the model, and writes the arrays."""
    from top_jax.data.sources.image_folder import folders_in
    from top_jax.files import check_writable, save_arrays
    from top_jax.inference import check_readable, image_files

    shared_flags.check_classifier(_CHECKPOINT.value)
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise InputError(f"got {' '.join(arguments) or 'no argument'}; needed: one folder of images.")
    output = Path(_OUTPUT.value)
    if output.suffix != ".npz" or not output.absolute().parent.is_dir():
        raise InputError(f"--output={output}; needed: a file ending in .npz, in a folder that exists.")
    check_writable(output)
    folder = Path(arguments[0])
    classes, files = folders_in(folder), image_files([folder])
    classifier = shared_flags.open_classifier(_CHECKPOINT.value)
    names, rows = [], []
    with terminal.progress(f"running on {folder}", len(files)) as advance:
        for name, pooled in classifier.features(files, batch_size=flags.FLAGS.batch_size):
            names.append(str(Path(name).relative_to(folder)))
            rows.append(pooled)
            advance(1)
    check_readable(classifier, files)
    labels = [classes.index(Path(name).parts[0]) if Path(name).parts[0] in classes else -1 for name in names]
    arrays = {"features": np.stack(rows), "labels": np.array(labels, np.int32)}
    save_arrays(output, {**arrays, "class_names": np.array(classes, str), "files": np.array(names)})
    left_out = f", {len(classifier.unreadable)} unreadable files left out" if classifier.unreadable else ""
    print(f"{output}: {len(rows)} images, {len(rows[0])} features each, {len(classes)} classes{left_out}")


if __name__ == "__main__":
    runner.run(main)

"""Classifies images: class names with probabilities.

top-jax predict --checkpoint runs/my_images_photos photo.jpg holiday/ 'cats/*.png'
top-jax predict --checkpoint vim_s.pth --model vim_small photo.jpg --json result.json

IMAGE is a file, a folder (with all images below it) or a pattern in quotes. A run is used with its own pruning and
preprocessing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from top_jax.cli import runner, shared_flags
from top_jax.errors import InputError

_CHECKPOINT = shared_flags.define_classifier()
_TOP_K = flags.DEFINE_integer("top_k", 5, "Classes per image, at most as many as there are.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the results; - prints them as JSON instead of lines.")


def main(arguments: list[str]) -> None:
    """Classifies the images, prints the results and writes them as JSON."""
    from top_jax.files import save_json
    from top_jax.inference import check_readable, image_files

    shared_flags.check_classifier(_CHECKPOINT.value)
    if not arguments:
        raise InputError("no image; pass files, folders, or patterns such as 'photos/*.jpg'.")
    as_lines = _JSON.value != "-"
    if as_lines:
        runner.check_json(_JSON.value, Path(_CHECKPOINT.value))
    files = image_files(arguments)
    classifier = shared_flags.open_classifier(_CHECKPOINT.value)
    results = []
    for found in classifier.predict(files, top_k=_TOP_K.value, batch_size=flags.FLAGS.batch_size):
        pairs = list(zip(found.classes, found.indices, found.probabilities, strict=True))
        results.append({"image": found.image, "predictions": [_entry(*pair) for pair in pairs]})
        if as_lines:
            print(f"{found.image}: {', '.join(f'{name} {share:.1%}' for name, _, share in pairs)}", flush=True)
    check_readable(classifier, files)
    content = {
        "checkpoint": str(_CHECKPOINT.value),
        "images": results,
        "unreadable": [{"image": file, "reason": reason} for file, reason in sorted(classifier.unreadable.items())],
    }
    if not as_lines:
        json.dump(content, sys.stdout, indent=2)
        print()
    elif _JSON.value:
        save_json(_JSON.value, content)


def _entry(name: str, index: int, probability: float) -> dict[str, Any]:
    return {"class": name, "index": index, "probability": probability}


if __name__ == "__main__":
    runner.run(main)

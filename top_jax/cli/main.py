"""The command `top-jax`: runs a command's module as `python -m top_jax.cli.<command>` does. Only it is loaded."""

from __future__ import annotations

import difflib
import runpy
import sys
from typing import Final, NoReturn

import top_jax

# Command -> its line in --help. Each is a module of this package that ends in `runner.run(main)`.
COMMANDS: Final = {
    "train": "train a model, or resume a run",
    "evaluate": "accuracy, or mIoU, of a run or an official file on its data",
    "predict": "classes and probabilities of image files",
    "features": "pooled features of an image folder, for a linear probe",
    "convert": "official weights to a run directory, and either to a file",
    "flops": "multiply-accumulates by part, in three conventions",
    "benchmark": "speed and memory, pruned and dense; tune the GPU kernels",
    "ablate": "tables of alignments, scores and keep ratios on your checkpoint",
    "visualize": "pictures of the kept tokens, scores, scan paths and attention",
    "export": "a checkpoint as one StableHLO file that runs with JAX alone",
    "doctor": "versions, devices and missing packages; check a run's data and loader",
    "pack": "a dataset as one small file",
}


def main() -> NoReturn:
    """Runs the command that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help", "help"):
        print(help_text())
        sys.exit(0 if name else 2)
    if name == "--version":
        print(f"top-jax {top_jax.__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}."
        print(f"error: there is no command {name!r}; {meant}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    run_command(name)


def run_command(name: str) -> NoReturn:
    """Runs a command with the rest of the command line.

    Its module becomes `__main__`, as with `python -m`, so that worker processes find it by its name.
    """
    runpy.run_module(f"top_jax.cli.{name}", run_name="__main__", alter_sys=True)
    sys.exit(0)  # a command exits without returning


def help_text() -> str:
    """Returns the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: top-jax COMMAND [ARGUMENT...]",
            "",
            *lines,
            "",
            "`top-jax COMMAND --help` explains a command; `top-jax train --help` also lists every setting of a config.",
        ]
    )


if __name__ == "__main__":
    main()

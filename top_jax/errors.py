"""Exceptions whose message is meant for the user: the commands print it as one line, without a traceback."""

import os


class InputError(ValueError):
    """Bad input: the message says what came, what is needed and what to do.

    Library users can catch it as a `ValueError`. Commands exit with status 2 (`top_jax.cli.runner`).
    """

    def add_note(self, note: str, /) -> None:
        """Adds a note to the error, except JAX's note about hidden frames."""
        if "JAX_TRACEBACK_FILTERING" not in note:
            super().add_note(note)


class MissingPackageError(ImportError, InputError):
    """A missing package that only an extra installs; the message has the `pip install` command.

    It is an `ImportError` too, so that `try: import ... except ImportError` works as usual.
    """


class RunError(RuntimeError):
    """A run that cannot continue although its input is right: the message says what is kept and what to do.

    Commands exit with status 1. Any other exception is a bug and keeps its traceback.

    Attributes:
        at_once: whether a command ends without Python's own exit, which would wait for threads that hang.
    """

    at_once = False


def write_last_line(text: str) -> None:
    """Writes a line to stderr and shows the cursor again; for signal handlers, in which `print` is not safe."""
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
    os.write(2, show_cursor + text.encode() + b"\n")

"""The one exception for mistakes that the caller can mend."""


class InputError(ValueError):
    """Bad input: the message says what came, what is needed and what to do.

    Library users can catch it as a `ValueError`; the commands print it as one line and exit with status 2
    (`top_jax.cli.runner`). Anything else that escapes is a defect of ours and keeps its traceback.
    """

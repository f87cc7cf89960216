"""What a family of models says about its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Parts(NamedTuple):
    """Multiply-accumulates of one image, by part of the model.

    Attributes:
        class_tokens: tokens beside the patches.
        stem_and_head: of a config.
        block: of a config, the block's index from 0, the tokens that enter it, the tokens that leave it (a DeiT block
            reduces in its middle) and the convention.
    """

    class_tokens: int
    stem_and_head: Callable[[Any], int]
    block: Callable[[Any, int, int, int, str], int]

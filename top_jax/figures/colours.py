"""The colours of all pictures: Okabe and Ito's, which people with any kind of colour vision can tell apart."""

from __future__ import annotations

from typing import Final

BLACK: Final = "#000000"
BLUE: Final = "#0072B2"
GREEN: Final = "#009E73"
ORANGE: Final = "#E69F00"
PURPLE: Final = "#CC79A7"
VERMILLION: Final = "#D55E00"

"""The letters used in every shape, and the array types built from them.

B  batch
L  tokens entering a stage (class token included)
K  tokens kept (a Python int)
M  patch tokens of the whole image
D  embedding width
E  inner width, expand x D
G  directions of a scan
N  state size
R  rank of delta
P  patch side
"""

from jaxtyping import Array, Float, Int, Integer

Images = Float[Array, "B H W 3"]
Logits = Float[Array, "B classes"]
Embedded = Float[Array, "B L D"]
Inner = Float[Array, "B L E"]
Selective = Float[Array, "B L N"]
StateMatrix = Float[Array, "E N"]
PerChannel = Float[Array, " E"]
PerToken = Float[Array, "B L"]
Positions = Int[Array, "B L"]
ClassIndex = Int[Array, " B"]
Slots = Int[Array, "B K"]  # indices along L
SlotScores = Float[Array, "B K"]
PixelLabels = Integer[Array, "B H W"]  # signed or not: uint8 in the data, int32 for predictions

__all__ = [
    "Array",
    "ClassIndex",
    "Embedded",
    "Float",
    "Images",
    "Inner",
    "Int",
    "Integer",
    "Logits",
    "PerChannel",
    "PerToken",
    "PixelLabels",
    "Positions",
    "Selective",
    "SlotScores",
    "Slots",
    "StateMatrix",
]

"""What to do about keys that do not fit: whose they are, where that can be told."""

from __future__ import annotations

from collections.abc import Collection

from top_jax.convert.families import FAMILIES, models_of
from top_jax.models import BackboneConfig


def hint(config: BackboneConfig, names: Collection[str]) -> str:
    """A sentence for the reader of a list of missing and unexpected keys.

    Args:
        config: the model that the keys were meant for.
        names: the keys that came.
    """
    if averages := [name for name in names if name.startswith("ema_")]:
        return (
            f"{len(averages)} of its keys, such as {averages[0]}, are buffers of mmcv's EMA hook, which swaps the two "
            "sets of weights about the time it saves: find out which set holds the averages, and save the one that you "
            "want under the plain names, without the ema_ keys."
        )
    if any(name.startswith(("dist_token", "head_dist.")) for name in names):
        return (
            "It is a distilled DeiT (dist_token, head_dist), which has a second class token and is not supported; take "
            "the checkpoint of the plain one (deit_*_patch16_224, not deit_*_distilled_*)."
        )
    kind = look(names)
    prefix = _common_prefix(names)
    if kind is None and prefix and (kind := look([name.removeprefix(prefix) for name in names])):
        return (
            f"Its keys are those of a {FAMILIES[kind].name} with {prefix!r} before each, as DistributedDataParallel "
            "and other wrappers leave them; save the state_dict without it."
        )
    if kind is None or kind is type(config):
        return "Choose the model and the overrides that the checkpoint was trained with."
    return f"Its keys look like those of a {FAMILIES[kind].name}: choose one of {', '.join(models_of(kind))}."


def look(names: Collection[str]) -> type | None:
    """The config type of the family that the keys look like: the one most of whose keys, for one block, are there."""
    names = set(names)
    share = {}
    for kind, family in FAMILIES.items():
        wanted = {key.torch for key in family.keys(kind(depth=1))}
        share[kind] = len(wanted & names) / len(wanted)
    best = max(share, key=lambda kind: share[kind])
    return best if share[best] > 0.5 else None


def _common_prefix(names: Collection[str]) -> str:
    """The first part of the names, with its dot, where all share it."""
    firsts = {name.partition(".")[0] for name in names}
    return f"{firsts.pop()}." if len(firsts) == 1 else ""

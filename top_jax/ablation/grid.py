"""Which settings the tables need."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

from top_jax.build import build_abstract_model, build_sizes
from top_jax.config import RunConfig
from top_jax.errors import InputError
from top_jax.models.registry import BACKBONES
from top_jax.pruning import SCAN_EVIDENCE, WAYS, Pruning
from top_jax.pruning.score import CONTROLS

TABLES: Final = ("alignment", "score", "keep_ratio")
ALIGNMENTS: Final = tuple(way if order == "position" else f"{way}:{order}" for way, order in WAYS)
"""none:score (the naive ViT way: best tokens first), and none, hold and decay in scan order."""
KEEP_RATIOS: Final = (0.9, 0.7, 0.5)  # each is a program to compile for each alignment
KEEP_RATIO: Final = 0.7  # of a dense config that is given after_blocks alone
DENSE: Final = Pruning()


def base_pruning(
    config: RunConfig, *, after_blocks: Sequence[int] | None = None, keep_ratio: float | None = None
) -> Pruning:
    """The point at which the tables cross: each varies one thing of it.

    It is the config's own pruning where its method is `top`. Of another method, whose survivors a `Pruning` cannot
    describe, only the schedule is taken.

    Args:
        config: of the model; its pruning may be empty.
        after_blocks: instead of the config's.
        keep_ratio: instead of the config's; 0.7 where neither says.

    Raises:
        InputError: no schedule, or values out of range.
    """
    chosen = config.pruning.settings()
    settings = chosen if chosen.pop("method") == "top" else {"after_blocks": chosen["after_blocks"]}
    settings["keep_ratio"] = chosen["keep_ratio"] or KEEP_RATIO
    if after_blocks:
        settings["after_blocks"] = tuple(after_blocks)
    if keep_ratio is not None:
        settings["keep_ratio"] = keep_ratio
    if not settings["after_blocks"]:
        raise InputError(
            "the config is dense, so that nothing says where to prune; pass --after_blocks, such as --after_blocks=2,4."
        )
    evidence = _evidence(config)
    if "score" not in settings and "clip" not in evidence:
        settings["score"] = evidence[0]  # DeiT's blocks have attention to rank by, and no scan
    return Pruning(**{**settings, "seed": 0})


def default_scores(config: RunConfig) -> tuple[str, ...]:
    """All that the config's model can rank tokens by, controls last."""
    return (*_evidence(config), *CONTROLS)


def default_alignments(config: RunConfig) -> tuple[str, ...]:
    """All that the config's model can have: `decay` is of a scan."""
    return ALIGNMENTS if _evidence(config) == SCAN_EVIDENCE else ALIGNMENTS[:-1]


def make_grid(
    base: Pruning,
    *,
    tables: Sequence[str] = TABLES,
    full: bool = False,
    alignments: Sequence[str] = ALIGNMENTS,
    scores: Sequence[str] = (*SCAN_EVIDENCE, *CONTROLS),
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    random_seeds: int = 3,
) -> tuple[Pruning, ...]:
    """The settings that the tables need, each once: the dense model, then what is alike side by side.

    Args:
        base: as of `base_pruning`.
        tables: of `TABLES`. `alignment` varies that; `score` the score; `keep_ratio` that, for each alignment.
        full: the whole product of the three lists instead, the base's keep ratio included.
        alignments: `none`, `hold`, `decay`, with `:score` behind it to leave the survivors best first.
        scores: what ranks tokens; `random` stands for `random_seeds` settings.
        keep_ratios: of the curve, beside the base's; each is that of every prune.
        random_seeds: of the control `random`.

    Raises:
        InputError: no table or an unknown one, or a setting that cannot be, such as `hold:score`.
    """
    if not (tables or full):
        raise InputError(f"no table is chosen; choose from {', '.join(TABLES)}.")
    if unknown := [table for table in tables if table not in TABLES]:
        raise InputError(f"table {unknown[0]!r} is unknown; choose from {', '.join(TABLES)}.")
    if random_seeds < 1:
        raise InputError(f"random_seeds={random_seeds}; needed: at least 1.")
    variants = [_variant(name) for name in alignments]
    ratios = [{"keep_ratio": ratio} for ratio in (base.keep_ratio, *keep_ratios)]
    ranked = [{"score": score} for score in scores]
    combinations: list[dict[str, Any]] = []
    if full:
        combinations += [{**v, **r, **s} for v, r, s in itertools.product(variants, ratios, ranked)]
    else:
        combinations += variants if "alignment" in tables else []
        combinations += ranked if "score" in tables else []
        combinations += [{**v, **r} for v, r in itertools.product(variants, ratios)] if "keep_ratio" in tables else []
    settings = [seeded for c in combinations for seeded in _seeded(dataclasses.replace(base, **c), random_seeds)]
    alike: dict[Any, list[Pruning]] = {}
    for setting in dict.fromkeys(settings):
        alike.setdefault(program(setting), []).append(setting)
    return (DENSE, *itertools.chain.from_iterable(alike.values()))


def check_settings(config: RunConfig, settings: Sequence[Pruning]) -> None:
    """Makes sure that the config's model can have each of them, before anything takes long.

    Raises:
        InputError: as the model would raise it.
    """
    sizes, evidence = build_sizes(config.model), _evidence(config)
    for setting in settings:
        setting.check_evidence(evidence)
        setting.schedule(sizes.num_patches, sizes.depth)
    for setting in {setting.alignment: setting for setting in settings}.values():
        build_abstract_model(config.model, setting)


def program(setting: Pruning) -> tuple[Any, ...]:
    """What decides a compiled program; score, order and seed are chosen when it runs (`selectable.py`)."""
    return setting.after_blocks, setting.keep_ratio, setting.alignment


def _variant(name: str) -> dict[str, Any]:
    alignment, _, order = name.partition(":")
    variant: dict[str, Any] = {"alignment": alignment, "order": order or "position"}
    Pruning(**variant)  # raises where the two do not fit
    return variant


def _seeded(setting: Pruning, seeds: int) -> Iterator[Pruning]:
    for seed in range(seeds if setting.score == "random" else 1):
        yield dataclasses.replace(setting, seed=seed)


def _evidence(config: RunConfig) -> tuple[str, ...]:
    """What the blocks of the config's model tell about their tokens."""
    sizes = build_sizes(config.model)
    return BACKBONES[type(sizes)].EVIDENCE

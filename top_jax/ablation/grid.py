"""The settings that each table needs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

from top_jax.build import build_abstract_model, build_sizes
from top_jax.config import ModelConfig, RunConfig
from top_jax.errors import InputError
from top_jax.models.features import FILLS
from top_jax.models.registry import BACKBONES
from top_jax.pruning import SCAN_EVIDENCE, WAYS, Pruning
from top_jax.pruning.score import CONTROLS
from top_jax.values import one_of

TABLES: Final = ("alignment", "score", "keep_ratio")
OF_SEGMENTERS: Final = (*TABLES, "fill")
ALIGNMENTS: Final = tuple(way if order == "position" else f"{way}:{order}" for way, order in WAYS)
"""`none:score` (the naive ViT way: kept tokens in the order of their scores), then the alignments in scan order."""
KEEP_RATIOS: Final = (0.9, 0.7, 0.5)  # each compiles one program per alignment
KEEP_RATIO: Final = 0.7  # for a dense config that gets only after_blocks
DENSE: Final = Pruning()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filled(Pruning):
    """A `Pruning` for a segmenter, and the fill of its maps where tokens were dropped.

    Attributes:
        fill: one of `top_jax.models.features.FILLS`.

    Raises:
        InputError: a value out of range.
    """

    fill: str = FILLS[0]

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("fill", self.fill, FILLS)


def base_pruning(
    config: RunConfig, *, after_blocks: Sequence[int] | None = None, keep_ratio: float | None = None
) -> Pruning:
    """Returns the setting that all tables share: each table varies one part of it.

    It is the config's own pruning if its method is `top`. From another method, which a `Pruning` cannot describe, only
    the schedule is taken. For a segmenter the result is a `Filled`, with the config's fill.

    Args:
        config: the run config; its pruning may be empty.
        after_blocks: replaces the config's.
        keep_ratio: replaces the config's; 0.7 if neither is given.

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
        raise InputError("this config has no pruning; pass the blocks to prune after, such as --after_blocks=2,4.")
    evidence = _evidence(config)
    if "score" not in settings and "clip" not in evidence:
        settings["score"] = evidence[0]  # DeiT ranks tokens by attention; it has no scan
    settings["seed"] = 0
    return Filled(**settings, fill=config.model.fill) if config.model.is_segmenter else Pruning(**settings)


def default_scores(config: RunConfig) -> tuple[str, ...]:
    """Returns every score that the config's model offers, the controls last."""
    return (*_evidence(config), *CONTROLS)


def default_alignments(config: RunConfig) -> tuple[str, ...]:
    """Returns every alignment that the config's model can have: `decay` needs a scan."""
    return ALIGNMENTS if _evidence(config) == SCAN_EVIDENCE else ALIGNMENTS[:-1]


def make_grid(
    base: Pruning,
    *,
    tables: Sequence[str] | None = None,
    full: bool = False,
    alignments: Sequence[str] = ALIGNMENTS,
    scores: Sequence[str] = (*SCAN_EVIDENCE, *CONTROLS),
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    fills: Sequence[str] | None = None,
    random_seeds: int = 3,
) -> tuple[Pruning, ...]:
    """Returns the settings that the tables need, each once: the dense model, then the others grouped by program.

    Args:
        base: the setting that all tables share, from `base_pruning`.
        tables: a subset of `TABLES`, and for a segmenter also `fill`; by default all. `alignment` varies the alignment,
            `score` the score, `fill` the fill, and `keep_ratio` the keep ratio for each alignment.
        full: every combination of the lists instead of the tables; the base's keep ratio is included.
        alignments: `none`, `hold` or `decay`. A suffix `:score` leaves the kept tokens in the order of their scores.
        scores: scores to rank tokens by; `random` stands for `random_seeds` settings.
        keep_ratios: keep ratios in addition to the base's, each applied to every prune.
        fills: ways to fill a segmenter's maps where tokens were dropped; by default all of
            `top_jax.models.features.FILLS`.
        random_seeds: number of seeds of the control `random`.

    Raises:
        InputError: no table, an unknown one, an impossible setting such as `hold:score`, or a fill for a classifier.
    """
    possible = OF_SEGMENTERS if isinstance(base, Filled) else TABLES
    tables = possible if tables is None else tables
    if not (tables or full):
        raise InputError(f"no table is given; choose from {', '.join(possible)}.")
    if unknown := [table for table in tables if table not in possible]:
        reason = "is for segmenters, and the config's model is a classifier" if unknown[0] == "fill" else "is unknown"
        raise InputError(f"table {unknown[0]!r} {reason}; choose from {', '.join(possible)}.")
    if fills and not isinstance(base, Filled):
        raise InputError(f"fills={list(fills)} are for segmenters, and the config's model is a classifier; drop them.")
    if random_seeds < 1:
        raise InputError(f"random_seeds={random_seeds}; needed: at least 1.")
    variants = [_variant(name) for name in alignments]
    ratios = [{"keep_ratio": ratio} for ratio in (base.keep_ratio, *keep_ratios)]
    ranked = [{"score": score} for score in scores]
    filled = [{"fill": fill} for fill in fills or FILLS] if isinstance(base, Filled) else [{}]
    combinations: list[dict[str, Any]] = []
    if full:
        combinations += [v | r | s | f for v, r, s, f in itertools.product(variants, ratios, ranked, filled)]
    else:
        combinations += variants if "alignment" in tables else []
        combinations += ranked if "score" in tables else []
        combinations += [v | r for v, r in itertools.product(variants, ratios)] if "keep_ratio" in tables else []
        combinations += filled if "fill" in tables else []
    settings = [seeded for c in combinations for seeded in _seeded(dataclasses.replace(base, **c), random_seeds)]
    alike: dict[Any, list[Pruning]] = {}
    for setting in dict.fromkeys(settings):
        alike.setdefault(program_key(setting), []).append(setting)
    return (DENSE, *itertools.chain.from_iterable(alike.values()))


def check_settings(config: RunConfig, settings: Sequence[Pruning]) -> None:
    """Checks that the config's model can have each setting, before anything slow starts.

    Raises:
        InputError: the model cannot have one of the settings.
    """
    sizes, evidence = build_sizes(config.model), _evidence(config)
    for setting in settings:
        setting.check_evidence(evidence)
        setting.schedule(sizes.num_patches, sizes.depth)
    for setting in {setting.alignment: setting for setting in settings}.values():
        build_abstract_model(config.model, setting)


def program_key(setting: Pruning) -> tuple[Any, ...]:
    """Returns the key of settings that share a compiled program; score, order and seed are the program's arguments."""
    return setting.after_blocks, setting.keep_ratio, setting.alignment, fill_of(setting)


def fill_of(setting: Pruning) -> str | None:
    """Returns the fill of a segmenter's setting; None for the dense model and for a classifier."""
    return setting.fill if isinstance(setting, Filled) else None


def model_of(config: ModelConfig, setting: Pruning) -> ModelConfig:
    """Returns the model of a setting: the config's, with the setting's fill."""
    fill = fill_of(setting)
    return config if fill is None else dataclasses.replace(config, fill=fill)


def _variant(name: str) -> dict[str, Any]:
    alignment, _, order = name.partition(":")
    variant: dict[str, Any] = {"alignment": alignment, "order": order or "position"}
    Pruning(**variant)  # raises InputError if the two do not fit together
    return variant


def _seeded(setting: Pruning, seeds: int) -> Iterator[Pruning]:
    for seed in range(seeds if setting.score == "random" else 1):
        yield dataclasses.replace(setting, seed=seed)


def _evidence(config: RunConfig) -> tuple[str, ...]:
    """Returns the names of the evidence for token scores that the blocks of the config's model give."""
    families = type(build_sizes(config.model)).__mro__  # a segmenter's ViM has sizes of its own, a subclass
    return next(BACKBONES[family].EVIDENCE for family in families if family in BACKBONES)

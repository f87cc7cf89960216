"""Official weights by name: address, licence and known facts of each file.

The one list of them; `top_jax.list_models(pretrained=True)` and the names after `pretrained:` come from it. None of
these files was opened during development: repositories, file names and accuracies are from the authors' READMEs,
checksums and licences from the pages of the repositories.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Final

# The tag of the repositories is apache-2.0; the text of their model cards says "Non-commercial license".
_VIM_LICENCE: Final = "apache-2.0 by the repository's tag, non-commercial by its model card"
_STRIDE_8: Final = "fine-tuned at stride 8: 729 patches, 730 positions"


@dataclasses.dataclass(frozen=True)
class OfficialFile:
    """One file of weights trained on ImageNet-1k at 224 pixels, with patches of 16.

    Attributes:
        repository: OWNER/REPO on the Hugging Face Hub.
        file: path in the repository.
        licence: as the repository states it; None if that is not known.
        top1: accuracy in per cent on ImageNet-1k's validation images, as the authors publish it.
        sha256: SHA-256 of the file's content, in hexadecimal digits; None if it is not known.
        sizes: settings of the model that differ from those of the named one.
        authors_url: the authors' own file with the same weights, not on the Hub; the eight digits in its name are
            the first of its SHA-256.
        note: what else a user should know.
    """

    repository: str
    file: str
    licence: str | None
    top1: float
    sha256: str | None = None
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    authors_url: str | None = None
    note: str = ""

    @property
    def address(self) -> str:
        """The file as `hf://OWNER/REPO/FILE`."""
        return f"hf://{self.repository}/{self.file}"


def _deit(size: str, top1: float, digits: str, sha256: str | None = None) -> OfficialFile:
    name = f"deit_{size}_patch16_224"
    return OfficialFile(
        f"timm/{name}.fb_in1k",
        "model.safetensors",
        "apache-2.0",
        top1,
        sha256,
        authors_url=f"https://dl.fbaipublicfiles.com/deit/{name}-{digits}.pth",
        note="timm's copy of the authors' weights, read without PyTorch",
    )


# A name is that of a model (`top_jax.models.MODELS`), or MODEL.VARIANT.
OFFICIAL_FILES: Final[dict[str, OfficialFile]] = {
    "vim_tiny": OfficialFile(
        "hustvl/Vim-tiny-midclstok",
        "vim_t_midclstok_76p1acc.pth",
        _VIM_LICENCE,
        76.1,
        "fedb1e60267f3bc7b2a8443f2ddead8d39e019d10247a87252162b3789801fd5",
    ),
    "vim_tiny.stride8": OfficialFile(
        "hustvl/Vim-tiny-midclstok",
        "vim_t_midclstok_ft_78p3acc.pth",
        _VIM_LICENCE,
        78.3,
        "9847490c5c3ca36cc38caf8be537b726f326a1b5b15764b0bde650934ac35b54",
        sizes={"stride": 8},
        note=_STRIDE_8,
    ),
    "vim_small": OfficialFile(
        "hustvl/Vim-small-midclstok",
        "vim_s_midclstok_80p5acc.pth",
        _VIM_LICENCE,
        80.5,
        "aae4583e2def6389b66cfaf292cfade47a873182a39adbec19ec55b730ea9fe3",
    ),
    "vim_small.stride8": OfficialFile(
        "hustvl/Vim-small-midclstok",
        "vim_s_midclstok_ft_81p6acc.pth",
        _VIM_LICENCE,
        81.6,
        sizes={"stride": 8},
        note=_STRIDE_8,
    ),
    "vim_base": OfficialFile("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", _VIM_LICENCE, 81.9),
    "plain_mamba_l1": OfficialFile("ChenhongyiYang/PlainMamba", "l1.pth", "apache-2.0", 77.9),
    "plain_mamba_l2": OfficialFile("ChenhongyiYang/PlainMamba", "l2.pth", "apache-2.0", 81.6),
    "plain_mamba_l3": OfficialFile("ChenhongyiYang/PlainMamba", "l3.pth", "apache-2.0", 82.3),
    "deit_tiny": _deit("tiny", 72.2, "a1311bcf", "21d4764d94f6c3ffdb6da3581115a0a1ee2d505537d96883b540e54766407c9e"),
    "deit_small": _deit("small", 79.9, "cd65a155"),
    "deit_base": _deit("base", 81.8, "b5f2ef4d"),
}


def model_of(name: str) -> str:
    """Returns the model of a name in `OFFICIAL_FILES`: `vim_small` of `vim_small.stride8`."""
    return name.partition(".")[0]


def official_name(path: str | PurePath) -> str | None:
    """Returns the name of an official ViM file, recognised by its file name alone; None for another."""
    stems = {PurePath(found.file).stem: name for name, found in OFFICIAL_FILES.items() if name.startswith("vim_")}
    return next((name for stem, name in stems.items() if stem in PurePath(path).name), None)

"""Turns the name of weights into a local file, downloading it from the Hugging Face Hub where it is not cached yet.

    pretrained:vim_small                an official file, by its name in `official_files`
    pretrained                          the official file of the model in question
    hf://OWNER/REPO/FILE                any file of the Hub; hf://OWNER/REPO@REVISION/FILE for a branch, tag or commit
    runs/a, vim_s.pth a path, returned unchanged

Downloads go through huggingface_hub (extra `hub`): they are cached (HF_HOME), resumed after an interruption and shown
with a progress bar. HF_HUB_OFFLINE=1 takes only what is cached, and HF_TOKEN gives access to gated repositories.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from top_jax.convert.official_files import OFFICIAL_FILES, model_of
from top_jax.errors import InputError, RunError
from top_jax.optional import optional_package
from top_jax.values import one_of
from top_jax.values import path as path_of

PRETRAINED: Final = "pretrained"
_SCHEME: Final = re.compile("hf:/+")  # pathlib turns hf://a/b into hf:/a/b
_ADDRESS: Final = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


def is_name(source: str | Path) -> bool:
    """Returns whether a source is a name of weights, not a path."""
    return is_pretrained(source) or _SCHEME.match(str(source)) is not None


def is_pretrained(source: str | Path) -> bool:
    """Returns whether a source is the name of official weights."""
    return str(source).partition(":")[0] == PRETRAINED


def local_file(source: str | Path, model: str | None = None) -> Path:
    """Returns the local file or folder of weights that are given by a name or a path.

    Args:
        source: a path or a name, as above.
        model: name of the model to which a bare `pretrained` refers.

    Raises:
        InputError: an unknown name; no such repository or file, or no access to it; huggingface_hub is not installed;
            or the downloaded file differs from the one in the list of official files.
        RunError: the Hub cannot be reached, and the file is not cached.
    """
    if not is_name(source):
        return path_of("checkpoint", source)
    repository, revision, file = _place(str(source), model)
    address = f"hf://{repository}/{file}"
    known = next((found for found in OFFICIAL_FILES.values() if found.address == address), None)
    return _download(repository, revision, file, known.sha256 if known else None)


def official_model(source: str | Path) -> tuple[str, dict[str, Any]] | None:
    """Returns the model of `pretrained:NAME`, and the sizes in which its file differs; None for other sources."""
    scheme, _, name = str(source).partition(":")
    if scheme != PRETRAINED or not name:
        return None
    found = OFFICIAL_FILES[one_of("pretrained", name, OFFICIAL_FILES)]
    return model_of(name), dict(found.sizes)


def label_of(source: str | Path) -> str:
    """Returns a name for files about the weights of `source`.

    That is vim_s.pth for hf://OWNER/REPO/vim_s.pth, vim_small for pretrained:vim_small, and the path for a path.
    """
    if not is_name(source):
        return str(source)
    return re.split("[:/]", str(source))[-1]


def _place(text: str, model: str | None) -> tuple[str, str | None, str]:
    """Returns repository, revision and file of a name."""
    if is_pretrained(text):
        name = text.partition(":")[2] or model
        if name is None:
            raise InputError(f"{text} needs a name: pretrained:NAME with one of {', '.join(OFFICIAL_FILES)}.")
        found = OFFICIAL_FILES[one_of("pretrained", name, OFFICIAL_FILES)]
        return found.repository, None, found.file
    match = _ADDRESS.fullmatch(_SCHEME.sub("", text, count=1))
    if match is None:
        raise InputError(f"{text} is not the address of a file; needed: hf://OWNER/REPO/FILE.")
    return match["repository"], match["revision"], match["file"]


@functools.cache
def _download(repository: str, revision: str | None, file: str, sha256: str | None) -> Path:
    purpose = "weights by name (pretrained:, hf://)"
    hub, errors = (optional_package(name, purpose=purpose) for name in ("huggingface_hub", "huggingface_hub.errors"))
    address = f"hf://{repository}{'' if revision is None else f'@{revision}'}/{file}"
    try:
        with _without_warnings("huggingface_hub"):  # it reports each retry, and then raises
            endpoint = os.environ.get("HF_ENDPOINT")
            path = Path(hub.hf_hub_download(repository, file, revision=revision, endpoint=endpoint))
    except Exception as error:  # huggingface_hub's own, those of its HTTP library, OSError
        raise _explained(address, repository, error, errors) from error
    if sha256 is not None and (found := _sha256(path)) != sha256:
        raise InputError(
            f"{address} is not the file that was published: its SHA-256 is {found} instead of {sha256}. Delete "
            f"{path.resolve()} and try again; if the authors replaced the file and you trust it, pass that path."
        )
    return path


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _explained(address: str, repository: str, error: Exception, errors: Any) -> InputError | RunError:
    """Returns a one-line error for an exception of huggingface_hub."""
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{address} is gated: ask for access at https://huggingface.co/{repository}, then log in (hf auth login) "
            "or set HF_TOKEN."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):  # a kind of EntryNotFoundError
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else f"the Hub cannot be reached ({_first_line(error.__cause__)})"
        return RunError(
            f"{address} is not in the cache, and {why}; connect to the network once, or pass the path of a copy."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{address} does not exist: the repository has no such branch, tag or commit.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{address} does not exist: there is no public repository {repository}; check the name, or set HF_TOKEN "
            "for a private one."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return InputError(f"{address} does not exist: the repository {repository} has no such file; check the name.")
    if isinstance(error, errors.HFValidationError):
        return InputError(
            f"{address} is not the address of a file ({_first_line(error)}); needed: hf://OWNER/REPO/FILE."
        )
    return RunError(
        f"{address} could not be downloaded ({type(error).__name__}: {_first_line(error)}); try again (the download "
        "resumes where it stopped), or pass the path of a local file."
    )


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

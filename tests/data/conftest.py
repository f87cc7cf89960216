"""Loads TFDS before any test of the data."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def tfds_is_loaded() -> None:
    """While TFDS loads, importing gives lazy stand-ins, on which the finalizers of other tests' garbage fail."""
    gc.collect()
    gc.disable()
    try:
        import tensorflow_datasets as tfds

        tfds.builder_from_directory  # noqa: B018  what the source asks for
    finally:
        gc.enable()

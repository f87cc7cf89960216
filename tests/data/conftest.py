"""Imports TFDS before any test of the data."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def tfds_is_loaded() -> None:
    """Imports TFDS without garbage collection: finalizers of other tests' objects fail on its lazy modules."""
    gc.collect()
    gc.disable()
    try:
        import tensorflow_datasets as tfds

        tfds.builder_from_directory  # noqa: B018  what the source asks for
    finally:
        gc.enable()

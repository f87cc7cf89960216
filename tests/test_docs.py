"""The documentation: every public name and every setting has its place in the reference."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re

import pytest

import top_jax
from tools.docs_hooks import MARKER, settings_table
from top_jax import config


def public_modules():
    """Returns top_jax and each of its packages and modules that lists its public names."""
    names = ["top_jax", "top_jax.typing"]
    names += [f"top_jax.{found.name}" for found in pkgutil.iter_modules(top_jax.__path__) if found.ispkg]
    names += ["top_jax.data.sources", "top_jax.evaluation.flops"]
    modules = [importlib.import_module(name) for name in names]
    return [module for module in modules if hasattr(module, "__all__")]


def reference(root):
    pages = "\n".join(path.read_text() for path in (root / "docs" / "reference").glob("*.md"))
    return re.findall(r"^::: (\S+)$", pages, re.MULTILINE), pages


def test_every_public_name_is_in_the_reference(root):
    """A name that two modules export needs one entry; a module, or a name that is not ours, needs only a mention."""
    entries, pages = reference(root)
    assert len(entries) == len(set(entries))
    documented = [pkgutil.resolve_name(entry) for entry in entries]
    missing = []
    for module in public_modules():
        for name in module.__all__:
            found, path = getattr(module, name), f"{module.__name__}.{name}"
            if not any(found is other for other in documented) and f"`{path}`" not in pages:
                missing.append(path)
    assert missing == []


def test_the_reference_names_objects_not_modules(root):
    for entry in reference(root)[0]:
        file = root / f"{entry.replace('.', '/')}.py"
        assert not file.exists(), f"{entry} is a module; name what is in it"


def test_every_setting_has_a_table(root):
    page = (root / "docs" / "reference" / "config.md").read_text()
    sections = {
        name for name, found in vars(config).items() if name.endswith("Config") and dataclasses.is_dataclass(found)
    }
    assert set(MARKER.findall(page)) == sections
    for name in sections:
        table = settings_table(name)
        for field in dataclasses.fields(getattr(config, name)):
            if not dataclasses.is_dataclass(field.default):
                assert f"| `{field.name}` |" in table, f"{name}.{field.name}"
    with pytest.raises(ValueError, match="NoConfig"):
        settings_table("NoConfig")

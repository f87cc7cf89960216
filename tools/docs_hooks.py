"""Hook of the documentation site (mkdocs.yml): writes the tables of settings from the fields of `top_jax/config.py`.

It reads the file as text, because the site is built without our packages; `top-jax train --help` has the same settings
from the loaded classes (`top_jax/cli/usage.py`).
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / "top_jax" / "config.py"
MARKER = re.compile(r"^<!-- settings of (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces each `<!-- settings of ClassName -->` by a table of that class's fields."""
    return MARKER.sub(lambda found: settings_table(found[1]), markdown)


def settings_table(name: str) -> str:
    """Returns a markdown table of a config class: its fields, their defaults and the comments that explain them.

    Raises:
        ValueError: no such class, or a field without a comment.
    """
    source = CONFIG.read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        raise ValueError(f"{CONFIG.name} has no class {name}")
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for node in classes[name].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            continue
        default = ast.unparse(node.value)
        if default.endswith("Config()"):
            continue  # a section, which has a table of its own
        comment = source.splitlines()[(node.end_lineno or 0) - 1].partition("  # ")[2]
        if not comment:
            raise ValueError(f"{CONFIG.name}, line {node.end_lineno}: {name}.{node.target.id} has no comment")
        rows.append(f"| `{node.target.id}` | `{default}` | {comment.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)

"""Text of `--help`: a command's docstring, its flags, and the settings of a config with meaning and default."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from absl import flags

from top_jax import config

_REPEAT: Final = ";\n    repeat this option to specify a list of values"  # absl adds it
_FIELD: Final = re.compile(r"    (\w+): .*?  # (.*)")


class Setting(NamedTuple):
    """A setting of a run's config.

    Attributes:
        key: dotted, such as `optimizer.learning_rate`.
        type: its annotation.
        default: its value in `RunConfig`; None is "not set".
        meaning: the comment beside it in top_jax/config.py.
    """

    key: str
    type: str
    default: Any
    meaning: str


def settings(section: type = config.RunConfig, prefix: str = "") -> Iterator[Setting]:
    """Yields every setting of `RunConfig` in order; the sections follow the run's own settings.

    Args:
        section: the dataclass to begin with.
        prefix: prefix of its keys.
    """
    meanings = dict(_FIELD.findall(inspect.getsource(section)))
    hints, later = typing.get_type_hints(section), []
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            later.append((hint, f"{prefix}{field.name}."))
        else:
            yield Setting(f"{prefix}{field.name}", str(field.type), field.default, meanings[field.name])
    for hint, name in later:
        yield from settings(typing.cast(type, hint), name)


def help_text(*, with_settings: bool) -> str:
    """Returns the help of the command that runs.

    Args:
        with_settings: whether to list the settings of a config too, instead of the command that lists them.
    """
    values = flags.FLAGS
    text = [(sys.modules["__main__"].__doc__ or "").strip(), "", "flags:"]
    modules = (sys.argv[0], "top_jax.cli.shared_flags")
    own = {flag.name: flag for module in modules for flag in values.get_key_flags_for_module(module)}
    text += [_entry(*_flag(flag)) for flag in own.values()]
    if "config" in own and not with_settings:
        text.append(_entry("--config.KEY=VALUE", "A setting of the config; `top-jax train --help` lists them."))
    if with_settings:
        text += ["", "settings of the config, each --config.KEY=VALUE, with their defaults:"]
        text += [_entry(f"{one.key}={_value(one.default)}", one.meaning) for one in settings()]
    return "\n".join(text)


def _flag(flag: flags.Flag[Any]) -> tuple[str, str]:
    """Returns a flag as it is typed, with its default, and its explanation."""
    if isinstance(flag, flags.BooleanFlag):
        return f"--{'' if flag.default is False else '[no]'}{flag.name}", str(flag.help)
    if isinstance(flag, flags.EnumFlag):
        choices = "|".join(flag.parser.enum_values)
        text = str(flag.help).removeprefix(f"<{choices}>: ")
        return f"--{flag.name}={choices}", text if flag.default is None else f"{text} Default: {flag.default}."
    return f"--{flag.name}={_value(flag.default)}", str(flag.help).removesuffix(_REPEAT)


def _value(default: Any) -> str:
    """Returns a default as it would be typed; nothing for None."""
    if default is None:
        return ""
    if isinstance(default, list):
        return ",".join(map(str, default))
    return repr(default).replace(" ", "") if isinstance(default, tuple) else str(default)


def _entry(name: str, text: str) -> str:
    """Returns a name and its explanation, which begins on the same line if there is room."""
    width, indent = min(shutil.get_terminal_size((100, 24)).columns, 120), 34
    lines = textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
    if len(name) + 3 < indent and lines:
        lines[0] = f"  {name}".ljust(indent) + lines[0].strip()
        return "\n".join(lines)
    return "\n".join([f"  {name}", *lines])

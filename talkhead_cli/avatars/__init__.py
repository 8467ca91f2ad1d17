"""The methods by name; a method's module is imported on first use.

Methods from outside are added in two ways: an installed package lists them as entry points of the
group `talkhead.methods` (`name = "package.module:Class"`), or a program calls `register`.  Presets
and imported runs can only choose among these names; a name is never used to import a module.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from talkhead_cli.contracts import MisuseError, TalkheadError

if TYPE_CHECKING:
    from talkhead_cli.avatars.base import Avatar

METHODS = {"landmark": "Landmark", "lokitalk": "LokiTalk", "s3d": "S3D", "talk3d": "Talk3D"}
LEARNERS = METHODS | {"expert": "Expert"}  # what pretrain can train; the expert renders nothing
GROUP = "talkhead.methods"
_NAME = re.compile(r"[a-z][a-z0-9_-]*")

_registered: dict[str, type[Avatar]] = {}


def register(method: str, kind: type[Avatar]) -> None:
    """Add a method in this process, under a name that talkhead does not use itself; an earlier one
    of the same name is replaced."""
    if method in LEARNERS:
        raise MisuseError(f"'{method}' is a method of talkhead; register yours by another name")
    if not _NAME.fullmatch(method):
        raise MisuseError(
            f"'{method}' cannot be the name of a method; use small letters, digits, '-' and '_', "
            "a letter in front"
        )
    _registered[method] = _checked(method, kind)


def method_names() -> list[str]:
    """Return the methods that render people: built-in, from installed packages, and registered."""
    installed = (p.name for p in entry_points(group=GROUP) if _NAME.fullmatch(p.name))
    return sorted(({*_registered, *installed} - LEARNERS.keys()) | METHODS.keys())


def avatar_class(method: str) -> type[Avatar]:
    """Return the class of a method; MisuseError names the known ones."""
    if method in LEARNERS:
        return getattr(import_module(f"{__name__}.{method}"), LEARNERS[method])
    if method not in _registered:
        offered = set(entry_points(group=GROUP, name=method))
        if not offered:
            raise MisuseError(
                f"unknown method '{method}'; known: {', '.join(method_names())} (install the "
                "package that offers yours, or run the script that registers it)"
            )
        register(method, _loaded(method, offered))
    return _registered[method]


def _loaded(method: str, offered: set[EntryPoint]) -> type[Avatar]:
    """Return the class that an installed package offers."""
    if len(offered) > 1:
        values = ", ".join(sorted(point.value for point in offered))
        raise TalkheadError(f"installed packages offer several methods '{method}': {values}")
    (point,) = offered
    try:
        found: type[Avatar] = point.load()
    except Exception as error:  # whatever somebody's code raises
        raise TalkheadError(
            f"method '{method}' cannot be loaded from {point.value} ({error}); mend or remove the "
            "package that offers it"
        ) from error
    return found


def _checked(method: str, kind: object) -> type[Avatar]:
    """Return `kind` if it is a subclass of Avatar, else raise TalkheadError."""
    from talkhead_cli.avatars.base import Avatar

    if not (isinstance(kind, type) and issubclass(kind, Avatar)):
        raise TalkheadError(f"method '{method}' is no class of avatars: {kind!r}")
    return kind

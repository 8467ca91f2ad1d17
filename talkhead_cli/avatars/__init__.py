"""The methods, by name; a method's module is imported when it is asked for.

Methods of one's own come in by two doors: an installed package names them as entry points of the
group `talkhead.methods` (`name = "package.module:Class"`), or a program calls `register`.  Whoever
names a method, in a preset or in a run that came from elsewhere, chooses among these names; none
of them is ever read as the name of a module.
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
LEARNERS = METHODS | {"expert": "Expert"}  # who pretrain can train; an expert draws nobody
GROUP = "talkhead.methods"
_NAME = re.compile(r"[a-z][a-z0-9_-]*")

_registered: dict[str, type[Avatar]] = {}


def register(method: str, kind: type[Avatar]) -> None:
    """Make a method of one's own known in this process, by a name that is not talkhead's; one that
    was registered under the name before gives way."""
    if method in LEARNERS:
        raise MisuseError(f"'{method}' is a method of talkhead; register yours by another name")
    if not _NAME.fullmatch(method):
        raise MisuseError(
            f"'{method}' cannot be the name of a method; use small letters, digits, '-' and '_', "
            "a letter in front"
        )
    _registered[method] = _checked(method, kind)


def method_names() -> list[str]:
    """The methods that draw people: talkhead's, installed packages' and registered ones."""
    installed = (point.name for point in entry_points(group=GROUP))
    return sorted(({*_registered, *installed} - LEARNERS.keys()) | METHODS.keys())


def avatar_class(method: str) -> type[Avatar]:
    """The class of a method, or MisuseError naming the known ones."""
    if method in LEARNERS:
        found: type[Avatar] = getattr(import_module(f"{__name__}.{method}"), LEARNERS[method])
        return found
    if method not in _registered:
        offered = set(entry_points(group=GROUP, name=method))
        if not offered:
            raise MisuseError(
                f"unknown method '{method}'; known: {', '.join(method_names())} (one of your "
                "own by the package that offers it, or in the script that registers it)"
            )
        register(method, _loaded(method, offered))
    return _registered[method]


def _loaded(method: str, offered: set[EntryPoint]) -> type[Avatar]:
    """The class that an installed package offers."""
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
    """The same, if it is an avatar's class."""
    from talkhead_cli.avatars.base import Avatar

    if not (isinstance(kind, type) and issubclass(kind, Avatar)):
        raise TalkheadError(f"method '{method}' is no class of avatars: {kind!r}")
    return kind

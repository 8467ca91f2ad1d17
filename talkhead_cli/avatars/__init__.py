"""The methods, by name; a method's module is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from talkhead_cli.contracts import MisuseError

if TYPE_CHECKING:
    from talkhead_cli.avatars.base import Avatar

METHODS = {"landmark": "Landmark", "lokitalk": "LokiTalk", "talk3d": "Talk3D"}


def avatar_class(method: str) -> type[Avatar]:
    """The class of a method, or MisuseError naming the known ones."""
    if method not in METHODS:
        raise MisuseError(f"unknown method '{method}'; known: {', '.join(sorted(METHODS))}")
    found: type[Avatar] = getattr(import_module(f"{__name__}.{method}"), METHODS[method])
    return found

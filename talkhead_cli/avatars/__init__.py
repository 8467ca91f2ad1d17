"""The methods, by name; a method's module is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from talkhead_cli.contracts import MisuseError

if TYPE_CHECKING:
    from talkhead_cli.avatars.base import Avatar

METHODS = {"landmark": "Landmark", "lokitalk": "LokiTalk", "s3d": "S3D", "talk3d": "Talk3D"}
LEARNERS = METHODS | {"expert": "Expert"}  # who pretrain can train; an expert draws nobody


def avatar_class(method: str) -> type[Avatar]:
    """The class of a method, or MisuseError naming the known ones."""
    if method not in LEARNERS:
        raise MisuseError(f"unknown method '{method}'; known: {', '.join(sorted(METHODS))}")
    found: type[Avatar] = getattr(import_module(f"{__name__}.{method}"), LEARNERS[method])
    return found

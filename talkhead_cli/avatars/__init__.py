"""The methods by name; a method's module is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from talkhead_cli.contracts import MisuseError

if TYPE_CHECKING:
    from talkhead_cli.avatars.base import Avatar

METHODS = {"landmark": "Landmark", "lokitalk": "LokiTalk", "s3d": "S3D", "talk3d": "Talk3D"}
LEARNERS = METHODS | {"expert": "Expert"}  # what pretrain can train; the expert renders nothing


def avatar_class(method: str) -> type[Avatar]:
    """Return the class of a method; MisuseError names the known ones."""
    if method not in LEARNERS:
        raise MisuseError(f"unknown method '{method}'; known: {', '.join(sorted(METHODS))}")
    found: type[Avatar] = getattr(import_module(f"{__name__}.{method}"), LEARNERS[method])
    return found

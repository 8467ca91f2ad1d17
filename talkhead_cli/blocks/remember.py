"""What follows from tensors that hardly ever change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def remembered(owner: Any, name: str, of: Sequence[Tensor], make: Callable[[], T]) -> T:
    """What `make` makes of the tensors `of`: made anew where any was changed, or replaced, since
    `owner` was last asked under that name.  For what has no gradient."""
    key = tuple((t.data_ptr(), t._version) for t in of)
    held: dict[str, tuple[Any, T, Any]] = owner.__dict__.setdefault("_remembered", {})
    if name not in held or held[name][0] != key:
        held[name] = key, make(), of  # kept, lest others come to lie where they lie
    return held[name][1]


@cache
def constant(*values: float, device: torch.device) -> Tensor:
    """A tensor of a few numbers, which crosses to a GPU once and not with every step: whoever
    sends numbers there waits for it."""
    return torch.tensor(values, device=device)

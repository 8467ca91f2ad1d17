"""Caches: values derived from tensors that rarely change, and constants on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def remembered(owner: Any, name: str, of: Sequence[Tensor], make: Callable[[], T]) -> T:
    """Return `make()`, cached on `owner` under `name` until one of the tensors `of` is replaced or
    modified in place (CUDA graph replays go unnoticed).  For values without gradients."""
    key = tuple((t.data_ptr(), t._version) for t in of)
    held: dict[str, tuple[Any, T, Any]] = owner.__dict__.setdefault("_remembered", {})
    if name not in held or held[name][0] != key:
        held[name] = key, make(), of  # `of` is kept alive, so that no new tensor reuses its address
    return held[name][1]


@cache
def constant(*values: float, device: torch.device) -> Tensor:
    """Return a cached tensor of a few numbers: copying them to a GPU in every step would cost a
    host sync each time."""
    return torch.tensor(values, device=device)

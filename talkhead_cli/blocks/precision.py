"""Where sixteen bits will not do."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def exact(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The function in float32 even under autocast; one of its arguments must be a tensor.

    For places: half precision puts a head wrong by a hundredth of its height.
    """

    @wraps(function)
    def exactly(*args: P.args, **named: P.kwargs) -> Tensor:
        given = next(a for a in args if isinstance(a, Tensor))
        with torch.autocast(given.device.type, enabled=False):
            return function(*args, **named)

    return exactly

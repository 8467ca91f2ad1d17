"""A copy of a module with some parameters offset and all others shared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def variant(module: M, changes: Mapping[str, Tensor]) -> M:
    """Return a copy of the module with `changes` added to the parameters of these dotted names.

    Gradients flow to the changes and to the original parameters.  Only the modules on the path are
    copied, shallowly; attributes set on the copy afterwards do not affect the original.
    """
    made = copy.copy(module)
    made._parameters, made._modules = dict(module._parameters), dict(module._modules)
    inner: dict[str, dict[str, Tensor]] = {}
    for name, change in changes.items():
        head, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(head, {})[rest] = change
            continue
        parameter = made._parameters.pop(head)
        assert parameter is not None and parameter.shape == change.shape, name
        made.__dict__[head] = parameter + change  # a plain tensor: nn.Module would refuse it
    for name, theirs in inner.items():
        child = made._modules[name]
        assert child is not None, name
        made._modules[name] = variant(child, theirs)
    return made

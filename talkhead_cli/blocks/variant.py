"""A network as somebody else would have it: some parameters changed, all others shared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def variant(module: M, changes: Mapping[str, Tensor]) -> M:
    """The module with `changes` added to its parameters of those names, dots for submodules.

    Gradients go to the changes as well as to what they are added to.  Nothing is copied but the
    modules on the way; what the variant is told to hold from then on, the module does not know.
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

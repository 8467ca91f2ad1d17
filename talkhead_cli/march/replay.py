"""Work of one shape, recorded once as a CUDA graph and played again on other numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WARM_UPS = 3  # calls that run as they are: kernels are compiled, constants sent, buffers found


class CannotRecordError(RuntimeError):
    """The work waits for its device, or asks what cannot be recorded; nothing was done."""


class Replay(Generic[T]):
    """`work(*tensors)` on a CUDA device, whose hundreds of small operations start as one.

    The first calls run as they are, the next one is recorded, and from then on the recording is
    played.  What it makes lies where the recording put it, and the next call overwrites it.

    `work` must not wait for the device (`nonzero`, `item`, numbers sent there), and what it reads
    besides its arguments must stay where it lies.  CannotRecordError by the call that records if
    it does wait.
    """

    def __init__(self, work: Callable[..., T], device: torch.device) -> None:
        self.work, self.device = work, device
        self._side = torch.cuda.Stream(device)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *given: Tensor) -> T:
        self._calls += 1
        if self._calls <= WARM_UPS:
            return self._aside(given)
        if self._graph is None:
            self._record(given)
        assert self._graph is not None
        for held, tensor in zip(self._given, given, strict=True):
            held.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._made

    def _aside(self, given: Sequence[Tensor]) -> T:
        """On a stream of its own, as recordings are made: what remembers streams, remembers it."""
        now = torch.cuda.current_stream(self.device)
        self._side.wait_stream(now)
        with torch.cuda.stream(self._side):
            made = self.work(*(t.to(self.device) for t in given))
        now.wait_stream(self._side)
        return made

    def _record(self, given: Sequence[Tensor]) -> None:
        self._given = [torch.empty_like(t, device=self.device).copy_(t) for t in given]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._side):
                self._made = self.work(*self._given)
        except RuntimeError as error:
            # A recording that broke off leaves the random numbers waiting for its end.
            fresh = torch.Generator(self.device).graphsafe_get_state()
            torch.cuda.default_generators[_number(self.device)].graphsafe_set_state(fresh)
            raise CannotRecordError(str(error).strip().splitlines()[0]) from error
        self._graph = graph


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index

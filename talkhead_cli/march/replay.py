"""CUDA graphs: record a function of fixed tensor shapes once, replay it on new values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WARM_UPS = 3  # eager calls: kernels get compiled, constants copied, buffers allocated


class CannotRecordError(RuntimeError):
    """The function has a host sync or another operation that cannot be recorded; nothing ran."""


class Replay(Generic[T]):
    """`work(*tensors)` as a CUDA graph, so that hundreds of small kernels launch as one.

    The first WARM_UPS calls run eagerly, the next one is recorded, and it and all later ones replay
    the graph.  Results are static buffers, which the next call overwrites.

    `work` must not sync with the host (`nonzero`, `item`, copies of numbers to the device), and
    tensors that it reads besides its arguments must keep their addresses.  If it does sync, the
    call that records raises CannotRecordError.
    """

    def __init__(self, work: Callable[..., T], device: torch.device) -> None:
        self.work, self.device = work, device
        self._side = torch.cuda.Stream(device)
        self._calls = 0
        self._recording: tuple[torch.cuda.CUDAGraph, list[Tensor], T] | None = None

    def __call__(self, *given: Tensor) -> T:
        self._calls += 1
        if self._calls <= WARM_UPS:
            return self._aside(given)
        if self._recording is None:
            self._recording = self._record(given)
        graph, inputs, made = self._recording
        for held, tensor in zip(inputs, given, strict=True):
            held.copy_(tensor, non_blocking=True)
        graph.replay()
        return made

    def _aside(self, given: Sequence[Tensor]) -> T:
        """Run eagerly on the recording stream, so that whatever caches its stream has this one."""
        now = torch.cuda.current_stream(self.device)
        self._side.wait_stream(now)
        with torch.cuda.stream(self._side):
            made = self.work(*(t.to(self.device) for t in given))
        now.wait_stream(self._side)
        return made

    def _record(self, given: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], T]:
        """Return the graph, and the buffers of its inputs and of its result."""
        inputs = [torch.empty_like(t, device=self.device).copy_(t) for t in given]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._side):
                made = self.work(*inputs)
        except RuntimeError as error:
            # An aborted capture leaves the default generator in capture mode: give it a new state.
            fresh = torch.Generator(self.device).graphsafe_get_state()
            torch.cuda.default_generators[_number(self.device)].graphsafe_set_state(fresh)
            raise CannotRecordError(str(error).strip().splitlines()[0]) from error
        return graph, inputs, made


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index

"""Read tensors from a pickled network without running any code of the file.

StyleGAN's and EG3D's published files are pickles of live objects, with the source of their classes
inside, which their own loader executes.  Here every class of the file becomes an inert record; only
the few functions that build a tensor are called, and any other name is refused.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talkhead_cli.contracts import TalkheadError


class Inert:
    """Stand-in for an object of the file: its state, without behaviour."""

    def __init__(self, *args: Any) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields = state


class InertDict(dict[Any, Any]):
    """Stand-in for an instance of a dict subclass."""

    def __setstate__(self, state: Any) -> None:
        pass


def networks(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the state dict of each network in a pickled dictionary, by the network's name.

    Raises TalkheadError for a file that is no such pickle, or that names anything but tensors and
    modules.
    """
    try:
        with path.open("rb") as file:
            held = _Reader(file).load()
    except TalkheadError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise TalkheadError(f"{path} cannot be read as a pickled network ({error})") from error
    found = {str(k): _tensors(v) for k, v in held.items()} if isinstance(held, dict) else {}
    found = {name: tensors for name, tensors in found.items() if tensors}
    if not found:
        raise TalkheadError(f"{path} holds no networks")
    return found


def _tensors(value: Any) -> dict[str, Tensor]:
    """Return parameters and buffers of a module and its submodules."""
    if not isinstance(value, Inert):
        return {}
    found: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        own = value.fields.get(kind) or {}
        found |= {str(k): v.detach() for k, v in own.items() if isinstance(v, Tensor)}
    for name, inner in (value.fields.get("_modules") or {}).items():
        found |= {f"{name}.{k}": v for k, v in _tensors(inner).items()}
    return found


def _persistent(meta: Any) -> Inert:
    """Return a stand-in for an object pickled with its source code: only its state is kept."""
    made = Inert()
    made.__setstate__(meta.get("state") if isinstance(meta, dict) else None)
    return made


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, *_: Any
) -> Tensor:
    """Return a view of a storage, inside its bounds."""
    flat = torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage)
    return flat.as_strided(tuple(size), tuple(stride), offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _made(cls: Any, *_: Any) -> Any:
    """Stand-in for copyreg's reconstructor of old protocols; `cls` is from `_CALLED` or Inert."""
    return cls()


_CALLED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("copyreg", "_reconstructor"): _made,
    ("copy_reg", "_reconstructor"): _made,
    ("builtins", "object"): Inert,
    ("builtins", "set"): set,
    ("dnnlib.util", "EasyDict"): InertDict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Reader(pickle.Unpickler):
    """Unpickler that resolves the names in `_CALLED`, and classes of torch.nn to Inert."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLED:
            return _CALLED[module, name]
        if module.startswith("torch.nn.modules.") and name.isidentifier():
            return Inert
        raise TalkheadError(
            f"the file names {module}.{name}, which is no part of a network's tensors; it was not "
            "read any further"
        )

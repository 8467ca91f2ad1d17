"""A trained run: plain data from which its avatar is rebuilt.  A prior is a run of many people.

runs/lokitalk+tiny/
    preset.yaml          the whole preset, resolved
    avatar.safetensors   weights, identity, occupancy
    meta.json            versions, training data, figures; "finished" is written last
    drive.npz  plate.png what rendering needs of the footage
    portrait.npz         pictures from which the avatar is made, where the method needs any (s3d)
    optim.pt             for resuming only
    evaluate/            figures and films
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.store.files import (
    atomic,
    delete_folder,
    exclusive,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

CURE = "make it again with --fresh (finetune, or pretrain)"
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-")


class Run:
    """Reads and writes one run's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = root.name

    @classmethod
    def named(cls, folder: Path, name: str) -> Run:
        """Return the run of that name in a folder; MisuseError for names that could leave it."""
        if not name or not set(name) <= _NAME_CHARS or name.startswith("."):
            raise MisuseError(
                f"'{name}' cannot be the name of a run or prior; use letters, digits, '+', '-', "
                "'_', '.', and no dot in front"
            )
        return cls(folder / name)

    def locked(self) -> AbstractContextManager[None]:
        """Lock the run for one writing job; the file is beside the run, which `clear` deletes."""
        return exclusive(self.root.with_name(f".{self.name}.lock"), self.name)

    def meta(self) -> dict[str, Any]:
        path = self.root / "meta.json"
        try:
            found = read_json(path)
        except FileNotFoundError:
            return {}
        if not isinstance(found, dict):
            raise TalkheadError(f"{path} is damaged; {CURE}")
        return found

    @property
    def is_finished(self) -> bool:
        """Whether training ended; False for a damaged run, which raises when it is opened."""
        try:
            return bool(self.meta().get("finished"))
        except TalkheadError:
            return False

    def clear(self) -> None:
        if self.root.exists():
            delete_folder(self.root)

    def write_meta(self, **facts: Any) -> None:
        write_json(self.root / "meta.json", {**self.meta(), **facts})

    def write_preset(self, text: str) -> None:
        with atomic(self.root / "preset.yaml") as part:
            part.write_text(text, encoding="utf-8")

    def preset_text(self) -> str | None:
        path = self.root / "preset.yaml"
        # bytes that are no text are no preset either, which whoever parses it says
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None

    def save_weights(self, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with atomic(self.root / "avatar.safetensors") as part:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part)

    def weights(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        path = self.root / "avatar.safetensors"
        if not path.exists():
            raise TalkheadError(f"run '{self.name}' has no weights; {CURE}")
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises its own untyped errors
            raise TalkheadError(f"{path} is damaged ({error}); {CURE}") from error

    def save_resume(self, state: dict[str, Any]) -> None:
        """Save weights, optimiser and schedule position in one file, as they must agree."""
        import torch

        with atomic(self.root / "optim.pt") as part:
            torch.save(state, part)

    def drop_resume(self) -> None:
        """Delete the resume state once training is finished."""
        (self.root / "optim.pt").unlink(missing_ok=True)

    def resume_state(self) -> dict[str, Any] | None:
        import torch

        path = self.root / "optim.pt"
        if not path.exists():
            return None
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # a torn file of another program; ours are atomic
            raise TalkheadError(f"{path} is damaged ({error}); {CURE}") from error

    def save_drive(self, arrays: dict[str, NDArray[Any]]) -> None:
        write_arrays(self.root / "drive.npz", arrays)

    def save_portrait(self, arrays: dict[str, NDArray[Any]]) -> None:
        write_arrays(self.root / "portrait.npz", arrays)

    def portrait(self) -> dict[str, NDArray[Any]] | None:
        path = self.root / "portrait.npz"
        return read_arrays(path, cure=CURE) if path.exists() else None

    def drive(self) -> dict[str, NDArray[Any]]:
        return read_arrays(self.root / "drive.npz", cure=CURE)

    @property
    def plate_file(self) -> Path:
        return self.root / "plate.png"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluate"

    @property
    def log_folder(self) -> Path:
        return self.root / "log"

    def write_figures(self, figures: dict[str, Any]) -> Path:
        path = self.evaluation / "metrics.json"
        write_json(path, figures)
        return path


def finished_runs(folder: Path) -> list[Run]:
    """Return the finished runs of a folder, newest first."""
    return [run for run in list_runs(folder) if run.is_finished]


def list_runs(folder: Path) -> list[Run]:
    """Return the runs of a workspace, newest finished first, unfinished ones last."""
    if not folder.is_dir():
        return []
    runs = [
        Run(p)
        for p in folder.iterdir()
        if (p / "meta.json").exists() and set(p.name) <= _NAME_CHARS
    ]
    ended = {run.name: _number(run.meta().get("finished_at")) for run in runs if run.is_finished}
    return sorted(runs, key=lambda run: (run.name not in ended, -ended.get(run.name, 0.0)))


def _number(value: Any) -> float:
    """Return a number from a file that anybody may have written; 0 if it is none."""
    return float(value) if isinstance(value, int | float) else 0.0

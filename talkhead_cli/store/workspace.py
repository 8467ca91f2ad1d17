"""One identity's folder: the only data that passes between jobs.

<home>/alice/
    manifest.json   source, backends, crop, frame counts; keys of finished stages
    video.mp4       the crop, 25 frames/s, all-intra, near-lossless
    audio.wav       16 kHz mono on the video's clock
    mesh.npz shots.npz film.npz tracks.npz voice.npz   arrays from pictures and sound
    maps/  labels/  matte and skin; soft labels, in pieces of 100 frames
    plate.png       background
    cache/          the video as raw pixels at a training size (rebuilt when missing)
    runs/           trained avatars
<home>/.priors/     priors, trained on many people
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.store.files import (
    atomic,
    delete_folder,
    digest,
    exclusive,
    read_arrays,
    read_json,
    sha256_of,
    sweep,
    write_arrays,
    write_json,
)

# Files that each stage of preprocessing writes.
STAGE_FILES = {
    "mesh": ("mesh.npz", "shots.npz"),
    "sound": ("audio.wav", "voice.npz"),
    "film": ("video.mp4", "plate.png", "film.npz", "maps"),
    "tracks": ("tracks.npz",),
    "labels": ("labels",),
}
FILM_PX = 512  # side of the cropped film, for which `tracks` has the intrinsics
PIECE = 100  # frames per file of maps and labels
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_id(name: str) -> str:
    """Return the id; MisuseError if it could leave the home folder or be hidden in it."""
    if not _ID.fullmatch(name) or ".." in name:
        raise MisuseError(
            f"'{name}' cannot be an id; use letters, digits, '-', '_' and '.', "
            "beginning with a letter or digit"
        )
    return name


def home_folder(given: Path | None) -> Path:
    """Return `--home`, else $TALKHEAD_HOME, else ./avatars."""
    return given or Path(os.environ.get("TALKHEAD_HOME") or "avatars")


def priors_folder(home: Path) -> Path:
    """Return the folder of priors, which is no id: ids do not begin with a dot."""
    return home / ".priors"


def list_ids(home: Path) -> list[str]:
    """Return the ids of all workspaces in a home, sorted."""
    if not home.is_dir():
        return []
    names = (p.parent.name for p in home.glob("*/manifest.json"))
    return sorted(n for n in names if _ID.fullmatch(n))


class PieceWriter:
    """Writes arrays of consecutive frames, in files of PIECE frames."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._first = folder, 0
        self._rows: dict[str, list[NDArray[Any]]] = {}

    def add(self, **arrays: NDArray[Any]) -> None:
        """Append the next frame's arrays, by name: the same names in every frame."""
        for name, array in arrays.items():
            self._rows.setdefault(name, []).append(array)
        if max(map(len, self._rows.values())) == PIECE:
            self.close()

    def close(self) -> None:
        """Write the frames since the last full piece."""
        if self._rows:
            file = self._folder / f"{self._first:07d}.npz"
            stacked = {name: np.stack(rows) for name, rows in self._rows.items()}
            write_arrays(file, stacked, compress=True)
            self._rows, self._first = {}, self._first + PIECE


class Workspace:
    """Reads and writes one identity's folder; nothing else knows its file names."""

    def __init__(self, home: Path, name: str) -> None:
        self.id = check_id(name)
        self.root = home / self.id
        self._piece: dict[str, tuple[int, dict[str, NDArray[Any]]]] = {}

    @classmethod
    def open(cls, home: Path, name: str) -> Workspace:
        """Return an existing, finished workspace; TalkheadError if there is none."""
        space = cls(home, name)
        if not space.exists():
            known = ", ".join(list_ids(home)) or "none yet"
            raise TalkheadError(
                f"there is no identity '{name}' in {home} (known: {known}); "
                "make one with: talkhead preprocess VIDEO --id " + name
            )
        if not space.manifest().get("finished"):
            raise TalkheadError(
                f"'{name}' is not preprocessed to the end; run the same preprocess command again"
            )
        return space

    def refuse_without_footage(self, what: str) -> None:
        """Raise TalkheadError if there is no footage, as for an imported avatar."""
        if not self.video.exists():
            raise TalkheadError(
                f"'{self.id}' is here without its footage, as an imported avatar is: there is "
                f"nothing to {what}"
            )

    def exists(self) -> bool:
        """Return whether the folder has a manifest, that is, any stage was begun."""
        return (self.root / "manifest.json").exists()

    # -- manifest and stages ------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        try:
            found = read_json(self.root / "manifest.json")
        except FileNotFoundError:
            return {"id": self.id, "finished": False, "stages": {}}
        if not isinstance(found, dict) or not isinstance(found.get("stages", {}), dict):
            raise TalkheadError(
                f"{self.root / 'manifest.json'} is damaged; delete it and run preprocess again"
            )
        return {"id": self.id, "finished": False, "stages": {}, **found}

    def note(self, **facts: Any) -> None:
        """Merge facts into the manifest."""
        write_json(self.root / "manifest.json", {**self.manifest(), **facts})

    def is_done(self, stage: str, key: str) -> bool:
        """Return whether `stage` was finished from exactly these inputs, and its files exist."""
        there = all((self.root / file).exists() for file in STAGE_FILES.get(stage, ()))
        return there and bool(self.manifest()["stages"].get(stage) == key)

    def mark_done(self, stage: str, key: str) -> None:
        manifest = self.manifest()
        manifest["stages"][stage] = key
        write_json(self.root / "manifest.json", manifest)

    def mark_undone(self, stage: str) -> None:
        """Mark a stage as not done before it is redone, since its files will be a mixture."""
        manifest = self.manifest() | {"finished": False}
        manifest["stages"].pop(stage, None)
        write_json(self.root / "manifest.json", manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of all stage keys, which changes when the input of any stage does."""
        return digest(self.manifest()["stages"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for one writing job, and remove half-written files of killed jobs."""
        with exclusive(self.root / ".lock", self.id):
            for folder in ("", "maps", "labels", "consent"):
                sweep(self.root / folder)
            yield

    # Wherever one of these three is interrupted, `bring_back` or the next job's sweep ends it.

    def set_aside(self) -> None:
        """Move what preprocessing wrote aside, until `bring_back` or `forget_aside`.  A folder
        without a manifest is left alone."""
        if self.exists():
            on_the_way, aside = self._asides
            on_the_way.mkdir()
            for entry in self._replaceable():
                entry.rename(on_the_way / entry.name)
            on_the_way.rename(aside)

    def bring_back(self) -> bool:
        """Undo `set_aside`, also that of a job that was killed; what was made since is deleted.
        Return whether anything was aside."""
        on_the_way, aside = self._asides
        found = aside.exists() or on_the_way.exists()
        if aside.exists():
            for entry in self._replaceable():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            aside.rename(on_the_way)
        if on_the_way.exists():
            for entry in on_the_way.iterdir():
                entry.rename(self.root / entry.name)
            on_the_way.rmdir()
        return found

    def forget_aside(self) -> None:
        """Delete what was set aside."""
        _, aside = self._asides
        if aside.exists():
            shutil.rmtree(aside.rename(self.root / ".part-replaced"))

    @property
    def _asides(self) -> tuple[Path, Path]:
        return self.root / ".moving", self.root / ".replaced"

    def _replaceable(self) -> list[Path]:
        """Return what preprocessing wrote: people keep other files here, such as renders."""
        written = (
            "manifest.json",
            "cache",
            "compare",
            *(f for files in STAGE_FILES.values() for f in files),
        )
        return [self.root / name for name in written if (self.root / name).exists()]

    def remove(self) -> None:
        """Delete the folder with all its runs."""
        delete_folder(self.root)

    # -- files --------------------------------------------------------------------------

    @property
    def video(self) -> Path:
        return self.root / "video.mp4"

    @property
    def audio(self) -> Path:
        return self.root / "audio.wav"

    @property
    def plate_file(self) -> Path:
        return self.root / "plate.png"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def save(self, name: str, arrays: dict[str, NDArray[Any]]) -> None:
        write_arrays(self.root / f"{name}.npz", arrays)

    def load(self, name: str) -> dict[str, NDArray[Any]]:
        try:
            found = read_arrays(self.root / f"{name}.npz")
        except FileNotFoundError as error:
            raise TalkheadError(
                f"{self.root / name}.npz is missing; run preprocess for '{self.id}' again"
            ) from error
        if name == "tracks" and "mesh_px" in found:  # as shares of the crop were once called
            raise TalkheadError(
                f"'{self.id}' was preprocessed by an older version; preprocess the video again"
            )
        return found

    def consents(self) -> list[str]:
        """Return the names of the stored consent records."""
        folder = self.root / "consent"
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []

    def keep_consent(self, file: Path) -> str:
        """Copy a consent record into the folder under its name and hash; return that name."""
        name = f"{file.stem}-{sha256_of(file)[:8]}{file.suffix}"
        target = self.root / "consent" / name
        with atomic(target) as part:
            shutil.copyfile(file, part)
        return target.name

    # -- pieces: per-frame maps -----------------------------------------------------------

    @contextmanager
    def pieces(self, kind: str) -> Iterator[PieceWriter]:
        """Yield a writer of per-frame arrays from frame 0 on, which buffers at most one piece."""
        writer = PieceWriter(self.root / kind)
        yield writer
        writer.close()

    def piece(self, kind: str, frame: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of a frame; the last piece read is cached."""
        first = frame // PIECE * PIECE
        held = self._piece.get(kind)
        if held is None or held[0] != first:
            try:
                held = (first, read_arrays(self.root / kind / f"{first:07d}.npz"))
            except FileNotFoundError as error:
                raise TalkheadError(
                    f"{kind} of frame {frame} are missing; preprocess the video of '{self.id}' "
                    "again, with --fresh"
                ) from error
            self._piece[kind] = held
        return {name: rows[frame - first] for name, rows in held[1].items()}

    def labels(self, frame: int) -> NDArray[np.uint8]:
        """Return soft labels (6, 128, 128) of a frame, in the order of contracts.LABELS."""
        return self.piece("labels", frame)["labels"]

    # -- pixels at a training size ----------------------------------------------------------

    def cache_file(self, kind: str, size_px: int) -> Path:
        return self.root / "cache" / f"{kind}-{size_px}.npy"

    def pixels(self, kind: str, size_px: int) -> NDArray[np.uint8] | None:
        """Return a memory map (T, ...) of cached pixels, or None if they must be made."""
        path = self.cache_file(kind, size_px)
        marker = path.with_suffix(".key")
        if not path.exists() or not marker.exists() or marker.read_text() != self.fingerprint:
            return None
        try:
            found: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError):  # damaged
            return None
        return found

    def save_pixels(
        self, kind: str, size_px: int, shape: tuple[int, ...], rows: Iterator[NDArray[np.uint8]]
    ) -> NDArray[np.uint8]:
        """Write rows (each shape[1:]) to the cache as they come; return the memory map.

        Takes no lock: jobs that read footage may write the same file at the same time."""
        sweep(self.root / "cache")
        key = self.fingerprint  # now: footage that is replaced meanwhile has another
        path = self.cache_file(kind, size_px)
        path.with_suffix(".key").unlink(missing_ok=True)  # of the file that is replaced
        with atomic(path) as part:
            target = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
            with part.open("r+b") as file:  # a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
            count = 0
            for count, row in enumerate(rows, 1):
                if count <= shape[0]:
                    target[count - 1] = row
            target.flush()
            if count != shape[0]:
                raise TalkheadError(
                    f"video.mp4 of '{self.id}' holds {count} of {shape[0]} frames; "
                    "run preprocess with --fresh"
                )
        path.with_suffix(".key").write_text(key)
        return np.load(path, mmap_mode="r", allow_pickle=False)

"""Render new speech to a video of the person, frame by frame, in constant memory."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkhead_cli import __version__, march, media
from talkhead_cli.contracts import FPS, Frame, MisuseError, Progress, TalkheadError
from talkhead_cli.jobs import drive, photo, script, views
from talkhead_cli.jobs.drive import MotionOptions
from talkhead_cli.jobs.enroll import enroll, id_of
from talkhead_cli.jobs.paste import Original
from talkhead_cli.jobs.player import Player, eight_bits
from talkhead_cli.jobs.runs import pick_run
from talkhead_cli.jobs.script import Script
from talkhead_cli.media.video import SUFFIXES
from talkhead_cli.store import Run, Workspace
from talkhead_cli.store.files import read_json, refuse_foreign, sha256_of, write_json

DEPTH_UNIT = 1 / 4096  # face heights per step of the 16-bit depth video


@dataclass(frozen=True)
class RenderOptions(MotionOptions):
    """Render options, in addition to those of `MotionOptions`.

    into  the source video of the identity, to paste the rendered face back into
    """

    background: str = "plate"
    alpha: bool = False
    depth: bool = False
    into: Path | None = None


def render(
    home: Path,
    name: str,
    speech: Path,
    progress: Progress,
    *,
    out: Path | None = None,
    run_name: str | None = None,
    options: RenderOptions | None = None,
    device: str = "auto",
) -> list[Path]:
    """Render identity `name` speaking `speech`; return the paths written, the video first.

    The video shows the square crop or, with `options.into`, the whole source video, and has
    round(25 * seconds of sound) frames.  A JSON sidecar and the container's metadata mark it as
    synthetic and record what it was made from.
    """
    options = options or RenderOptions()
    began = time.monotonic()
    space = Workspace.open(home, name)
    run = pick_run(space, run_name, progress)
    script.require_audio_track(speech)
    files, backdrop = _refuse_unfit(options, name, speech, out)
    _name_old_footage(space, run, progress)
    original = None if options.into is None else Original.of(space, run, options.into)
    as_filmed = None if original is None else original.stands.clip(0)
    player = Player.load(run, march.device_of(device))
    progress.note(f"marching: {player.note}")
    options = script.with_available_motion(player, options, progress)
    plate = player.plate if backdrop is None else _middle(backdrop, player.preset.data.size_px)
    # now: both may be replaced while pictures are rendered
    meta, speech_sha256 = run.meta(), sha256_of(speech)
    consent = sorted({*meta.get("consent", []), *space.consents()})
    tags = _marks(space, run, speech, consent)
    old_depth = files.old_depth()
    shoot = _Shoot(player, options, plate, original, speech, files, tags)
    files.film.parent.mkdir(parents=True, exist_ok=True)
    with script.open_script(player, speech, options, progress, as_filmed=as_filmed) as film_script:
        n_frames = film_script.n_frames
        beyond = drive.beyond(run.drive(), film_script.drive, n_frames)
        if beyond and original is None:
            progress.note(f"{beyond}; such views are guesses and may look wrong")
        if options.pose not in script.poses_in_grid(player) or film_script.drive.moves_camera:
            progress.stage("new views", None)
            at = film_script.drive.sample_frames(views.N_VIEWS, n_frames)
            player.open_views(film_script.scattered(at))
        progress.stage("render", n_frames)
        n_empty = shoot.film(film_script, progress)
    if old_depth is not None:
        old_depth.unlink()
    if n_empty:
        why = (
            "the run has learnt too little"
            if options.pose in ("footage", "still", "auto")
            else "poses lead out of them"
        )
        progress.note(f"nobody is seen in {n_empty} of {n_frames} frames: {why}")
    seconds = time.monotonic() - began
    write_json(files.sidecar, {
        "synthetic": True, **tags,
        "talkhead": __version__, "speech_sha256": speech_sha256,
        "film_sha256": sha256_of(files.film),
        "run_meta": {k: meta.get(k)
                     for k in ("version", "steps", "source", "torch", "generator")},
        "consent": consent,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "frames": n_frames, "fps": FPS, "size_px": player.preset.data.size_px,
        "film_px": shoot.size_px,
        "depth_unit_face_heights": DEPTH_UNIT if files.depth else None,
        "seconds_taken": round(seconds, 2),
        "frames_per_second": round(n_frames / max(seconds, 1e-9), 2),
    })  # fmt: skip
    return [*files.films, files.sidecar]


@dataclass(frozen=True)
class _Files:
    """Paths of the files that a render writes."""

    film: Path
    depth: Path | None
    sidecar: Path

    @classmethod
    def of(cls, name: str, speech: Path, out: Path | None, options: RenderOptions) -> _Files:
        """Return the paths; MisuseError if one is an input, or foreign, or has an unfit suffix."""
        usual = Path(f"{name}-{speech.stem}{'.webm' if options.alpha else '.mp4'}")
        film = usual if out is None else out / usual if out.is_dir() else out
        for what, given in (("speech file", speech), ("video it is set into", options.into)):
            if given is not None and film.exists() and given.exists() and film.samefile(given):
                raise MisuseError(f"the output would overwrite the {what}; give another -o")
        depth = _depth_of(film) if options.depth else None
        files = cls(film, depth, film.with_name(film.name + ".json"))
        ours = dict.fromkeys(files.films, _is_render) | {files.sidecar: _is_sidecar}
        refuse_foreign(ours, "talkhead render")
        media.refuse_container(film, alpha=options.alpha)
        return files

    def old_depth(self) -> Path | None:
        """Return the depth video of an earlier render to this name, if this one replaces it and has
        none of its own."""
        old = _depth_of(self.film)
        names = (self.film.stem + suffix for suffix in SUFFIXES["video"])  # with one depth video
        records = (self.film.with_name(f"{name}.json") for name in names)
        owners = [record for record in records if _tells_of_depth(record)]
        mine = self.depth is None and owners == [self.sidecar]
        return old if mine and old.exists() and _is_render(old) else None

    @property
    def films(self) -> list[Path]:
        return [self.film] if self.depth is None else [self.film, self.depth]


@dataclass(frozen=True)
class _Shoot:
    """Everything needed to render a video, except its script."""

    player: Player
    options: RenderOptions
    plate: Tensor
    original: Original | None
    speech: Path
    files: _Files
    tags: dict[str, str]

    def film(self, film_script: Script, progress: Progress) -> int:
        """Render and write all frames; return how many show no person (alpha below 0.5)."""
        options, side, n_empty = self.options, self.player.preset.data.size_px, 0
        behind = torch.zeros_like(self.plate) if options.alpha else self.plate
        with (
            media.VideoWriter(
                self.files.film,
                self.size_px,
                audio=self.speech,
                crf=self.player.preset.render.crf,
                alpha=options.alpha,
                metadata=self.tags,
            ) as film,
            _maybe_depth(self.files.depth, side, self.tags) as depth_film,
        ):

            def drawn() -> Iterator[NDArray[np.uint8]]:
                nonlocal n_empty
                for signals in film_script.chunks():
                    for frame, _ in self.player.pictures(signals, behind):
                        n_empty += float(frame.alpha.max()) < 0.5
                        if depth_film is not None:
                            depth_film.write(_depth(frame))
                        yield eight_bits(frame, options.alpha)

            pictures = drawn()
            if self.original is not None:
                rows = film_script.drive.rows(np.arange(film_script.n_frames)).astype(int)
                for warning in self.original.warnings(rows, side):
                    progress.note(warning)
                eyes = options.blink != "footage"
                pictures = self.original.with_faces(rows, pictures, eyes=eyes)
            for picture in pictures:
                film.write(picture)
                progress.advance()
        return n_empty

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the video in pixels."""
        side = self.player.preset.data.size_px
        return (side, side) if self.original is None else self.original.size


def render_picture(
    images: Sequence[Path],
    priors_home: Path,
    speech: Path,
    progress: Progress,
    *,
    preset_names: Sequence[str] = ("s3d",),
    prior: str | None = None,
    which_face: str = "largest",
    out: Path | None = None,
    options: RenderOptions | None = None,
    device: str = "auto",
) -> list[Path]:
    """Render the person of some pictures speaking `speech`; keep only the files of the render."""
    script.require_audio_track(speech)
    options = options or RenderOptions()
    _refuse_unfit(options, id_of(images), speech, out)  # before the pictures are enrolled
    with tempfile.TemporaryDirectory(prefix="talkhead-") as folder:
        space, run = enroll(
            images,
            priors_home,
            Path(folder),
            preset_names,
            progress,
            prior=prior,
            which_face=which_face,
            device=device,
        )
        return render(
            Path(folder),
            space.id,
            speech,
            progress,
            out=out,
            run_name=run.name,
            options=options,
            device=device,
        )


def _refuse_unfit(
    options: RenderOptions, name: str, speech: Path, out: Path | None
) -> tuple[_Files, NDArray[np.uint8] | None]:
    """Raise MisuseError or TalkheadError for options that cannot be met; return the files to write
    and the background, None if it is the plate."""
    _refuse_contradictions(options)
    files = _Files.of(name, speech, out, options)
    backdrop = _background(options.background)
    script.check_motion(options)
    return files, backdrop


def _refuse_contradictions(options: RenderOptions) -> None:
    """Raise MisuseError for options that exclude each other."""
    if options.alpha and options.background != "plate":
        raise MisuseError("--alpha leaves the background out, so --background does not go with it")
    if options.into is None:
        return
    own = {
        "--pose": options.pose != "footage",
        "--background": options.background != "plate",
        "--alpha": options.alpha,
        "--depth": options.depth,
        "--yaw": bool(options.yaw_deg),
        "--pitch": bool(options.pitch_deg),
        "--orbit": options.orbit,
    }
    at_odds = [option for option, asked in own.items() if asked]
    if at_odds:
        raise MisuseError(
            f"--into keeps the video's own moves, camera and background, so {', '.join(at_odds)} "
            f"{'does' if len(at_odds) == 1 else 'do'} not go with it"
        )


def _depth_of(film: Path) -> Path:
    return film.with_name(film.stem + ".depth.mkv")


def _tells_of_depth(sidecar: Path) -> bool:
    if not sidecar.exists() or not _is_sidecar(sidecar):
        return False
    return read_json(sidecar).get("depth_unit_face_heights") is not None


def _is_render(film: Path) -> bool:
    """Return whether a file is a film with the mark that renders, unlike evaluations, leave."""
    try:
        return media.probe(film).is_render
    except TalkheadError:
        return False


def _is_sidecar(path: Path) -> bool:
    try:
        record = read_json(path)
    except TalkheadError:
        return False
    return isinstance(record, dict) and "talkhead" in record


def _name_old_footage(space: Workspace, run: Run, progress: Progress) -> None:
    """Note if the run was trained on other footage than the workspace now holds."""
    own, now = run.meta().get("source"), space.manifest().get("source")
    if own and now and own.get("sha256") != now.get("sha256"):
        progress.note(
            f"run '{run.name}' was trained on other footage ({own.get('name')}) than '{space.id}' "
            f"holds now ({now.get('name')})"
        )
    elif space.video.exists() and run.meta().get("footage") != space.fingerprint:
        progress.note(
            f"run '{run.name}' was trained on an earlier preprocessing of '{space.id}'; it still "
            "renders as it did"
        )


def _depth(frame: Frame) -> NDArray[np.uint16]:
    """Return the depth (H, W) in steps of DEPTH_UNIT face heights; 65535 where nothing is hit."""
    steps = (frame.depth[0, ..., 0].float().cpu() / DEPTH_UNIT).round().clamp(0, 65_535)
    return steps.numpy().astype(np.uint16)


def _background(wanted: str) -> NDArray[np.uint8] | None:
    """Return the background (H, W, 3) for #rrggbb or a picture file; None for plate."""
    if wanted == "plate":
        return None
    if re.fullmatch(r"#[0-9a-fA-F]{6}", wanted):
        return np.array([[[int(wanted[i : i + 2], 16) for i in (1, 3, 5)]]], np.uint8)
    path = Path(wanted)
    if not path.is_file():
        raise MisuseError(
            f"--background {wanted}: give 'plate', a colour like #00ff00, or a picture file"
        )
    return photo.read(path)


def _middle(picture: NDArray[np.uint8], size_px: int) -> Tensor:
    """Crop the largest central square and resize it to (size_px, size_px, 3), in [0, 1]."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = picture[top : top + side, left : left + side]
    way = cv2.INTER_AREA if side > size_px else cv2.INTER_CUBIC
    shown = cv2.resize(middle, (size_px, size_px), interpolation=way)
    return torch.from_numpy(shown.astype(np.float32) / 255)


def _maybe_depth(
    path: Path | None, size: int, tags: dict[str, str]
) -> AbstractContextManager[media.VideoWriter | None]:
    """Return the writer of the depth video, or None in its place if none is asked for."""
    if path is None:
        return nullcontext()
    return media.VideoWriter(path, (size, size), gray16=True, metadata=tags)


def _marks(space: Workspace, run: Run, speech: Path, consent: Sequence[str]) -> dict[str, str]:
    """Return the metadata for the container."""
    return {
        "comment": "synthetic: made by talkhead, this person did not say this",
        "talkhead_synthetic": "true",
        "talkhead_version": __version__,
        "talkhead_avatar": f"{space.id}/{run.name}",
        "talkhead_speech": speech.name,
        "talkhead_consent": ", ".join(consent) or "none recorded",
    }

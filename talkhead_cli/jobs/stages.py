"""Stages of preprocessing: mesh, sound, cropped film with its maps, tracks, labels."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from talkhead_cli import media
from talkhead_cli.contracts import (
    FPS,
    SAMPLES_PER_FRAME,
    Progress,
    TalkheadError,
    UnfitError,
    followed,
)
from talkhead_cli.jobs import backends
from talkhead_cli.jobs.backends import Chosen
from talkhead_cli.media import Part
from talkhead_cli.store import FILM_PX, Workspace
from talkhead_cli.store.files import digest
from talkhead_cli.store.pictures import write_png
from talkhead_cli.track import face, lipsync, matte, pose, voice
from talkhead_cli.track.captions import CaptionFinder
from talkhead_cli.track.crop import Crop, choose_crop
from talkhead_cli.track.cuts import Shots, Takes
from talkhead_cli.track.pose import HeadTrack
from talkhead_cli.track.scout import Scene, scout
from talkhead_cli.track.spans import in_words
from talkhead_cli.track.zoom import STILL, common_window

MIN_SECONDS = 3.0
MESH_MAX_SIDE = 1280
SKIN_EVERY = 10  # frames between samples of the skin colour
BLOCK = 2048  # frames per block, to bound memory
N_PLATE = 25  # frames whose median is the background
SCOUT_EVERY = FPS // 2  # frame stride of the search for faces
N_EVIDENCE = 40  # frames used to separate hair from torso by motion
RESTLESS = 4.0  # of 255; a still background changes by 1 to 2, by noise and shadows
MIN_OFFSET_S = 0.06  # smallest offset between sound and lips that is corrected
# A stage's version is part of its key: raise it when its result changes.
VERSIONS = {"sound": 3, "mesh": 6, "film": 4, "tracks": 4, "labels": 2}


class Stages:
    """The stages, in order; one is skipped if its stored key matches its inputs."""

    def __init__(
        self,
        space: Workspace,
        part: Part,
        probe: media.Probe,
        progress: Progress,
        chosen: Chosen,
        *,
        with_audio: bool = True,
    ) -> None:
        self.space, self.part, self.video = space, part, part.path
        self.probe, self.progress, self.chosen = probe, progress, chosen
        self.with_audio = with_audio
        self.size = (probe.width, probe.height)
        self.n_done = 0
        self._keys: dict[str, str] = {}

    def run(self, source: str, which_face: str, offset_s: float | None) -> None:
        """Do all stages.

        source: sha256 of the video · which_face: see `scout` · offset_s: delay of the sound to
        correct; None measures it
        """
        if self.with_audio:
            self._require_audible()
        place = [self.part.first, self.part.n_frames]
        networks = [self.chosen[kind] for kind in ("detector", "mesh", "landmarks")]
        self.do("mesh", lambda: self.mesh(which_face), source, which_face, place, networks)
        self.do(
            "sound",
            lambda: self.sound(offset_s),
            self.with_audio,
            self.chosen["voice"],
            offset_s,
            needs=("mesh",),
        )
        side = self.crop.side  # refuses a face that is seen too little or too small
        self.space.forget_aside()
        if side < FILM_PX:
            self.progress.note(
                f"the head's square is {side} px in the film; it is enlarged to {FILM_PX} px"
            )
        square = [self.crop.x, self.crop.y, self.crop.side, FILM_PX]
        self.do("film", self.film, square, self.chosen["labels"], needs=("mesh",))
        self.do("tracks", self.tracks, needs=("film",))
        self.do("labels", self.labels, needs=("tracks",))

    def facts(self) -> dict[str, Any]:
        """Return what the manifest records of the stages' results."""
        kept = self.space.load("shots")["kept"]
        return {
            "fps": FPS,
            "size_px": FILM_PX,
            "n_frames": self.n_frames,
            "n_found": int(self.faces.found.sum()),
            "n_cut_away": int((~kept).sum()),
            "crop": {"x": self.crop.x, "y": self.crop.y, "side": self.crop.side},
            "backends": {
                **self.chosen,
                "matte": "mediapipe-selfie",
                "voice": self.chosen["voice"] if self.with_audio else "none",
            },
            "has_audio": self.with_audio,
            "offset": self._recorded_offset() if self.with_audio else None,
            "faces_seen": int(self.space.load("mesh")["n_faces"]),
        }

    def do(
        self, stage: str, work: Callable[[], None], *inputs: Any, needs: tuple[str, ...] = ()
    ) -> None:
        """Run a stage unless it was done from exactly these inputs and `needs` stages."""
        key = digest(VERSIONS[stage], inputs, [self._keys[n] for n in needs])
        self._keys[stage] = key
        if not self.space.is_done(stage, key):
            self.n_done += 1
            self.space.mark_undone(stage)
            work()
            self.space.mark_done(stage, key)

    @property
    def n_declared(self) -> int:
        """Number of frames of the part, if the declared duration is right."""
        return self.part.n_frames or round(self.probe.duration_s * FPS) - self.part.first

    def _require_audible(self) -> None:
        """Raise TalkheadError if the sound is silent, before time is spent on tracking."""
        known = self.space.manifest()
        place = [self.part.first, self.part.n_frames]
        if known.get("has_audio") and known["source"].get("part") == place:
            return
        samples = self.part.sound(self.n_declared * SAMPLES_PER_FRAME)
        if not voice.is_audible(samples, self.n_declared).any():
            raise UnfitError(
                f"the sound of {self.video.name} is silent; film with a working microphone, or "
                "pass --no-audio to track the pictures alone (no avatar can be trained on them)"
            )

    def mesh(self, which_face: str) -> None:
        """Choose the face to follow, then track its mesh in every frame."""
        self.progress.stage("looking for faces")
        scene = scout(
            self.part.frames(max_side=640, stride=SCOUT_EVERY),
            self.size,
            which_face,
            lambda: backends.detector_of(self.chosen["detector"]),
        )
        if scene.n_faces > 1:
            self.progress.note(
                f"{scene.n_faces} faces are in the film; following the {which_face} one "
                "(--face left|right|largest chooses)"
            )
        self.space.save("mesh", self._follow(scene) | {"n_faces": np.array(scene.n_faces)})

    @cached_property
    def faces(self) -> face.Faces:
        """The tracked mesh with gaps interpolated; UnfitError if too little of a face is seen."""
        stored = self.space.load("mesh")
        found = stored["found"]
        if not found.any():
            raise UnfitError(
                f"no face was found in {self.video.name}; film one person facing the camera"
            )
        if len(found) < MIN_SECONDS * FPS:
            raise UnfitError(
                f"only {len(found) / FPS:.1f} s of {self.video.name} could be read; at least "
                f"{MIN_SECONDS:.0f} s of talking are needed"
            )
        n_kept = int(self.space.load("shots")["kept"].sum())
        if n_kept < MIN_SECONDS * FPS:
            raise UnfitError(
                f"only {n_kept / FPS:.1f} s of {self.video.name} show one person in one picture, "
                f"between cuts; at least {MIN_SECONDS:.0f} s of talking are needed"
            )
        if found.sum() < MIN_SECONDS * FPS:
            raise UnfitError(
                f"a face is seen in only {found.sum() / FPS:.1f} s of {self.video.name}; at least "
                f"{MIN_SECONDS:.0f} s of talking are needed"
            )
        return face.Faces(face.fill_gaps(stored["points"], found), found)

    @property
    def n_frames(self) -> int:
        return len(self.faces.found)

    def _follow(self, scene: Scene) -> dict[str, NDArray[Any]]:
        """Track the mesh in every frame; save which frames belong to the kept shots."""
        x, y, width, height = scene.roi
        shrink = min(1.0, MESH_MAX_SIDE / max(width, height))
        size = (max(2, round(width * shrink)), max(2, round(height * shrink)))
        scale = np.array([width / size[0], height / size[1], width / size[0]], np.float32)
        offset = np.array([x, y, 0], np.float32)
        skin, shots = {}, Shots()
        total = self.n_declared
        self.progress.stage("face mesh", total)
        blank = np.full((face.N_MESH, 3), np.nan, np.float32)
        mark = backends.landmarks_of(self.chosen["landmarks"])
        marks = []
        # meshes are spooled to a file: concatenating a list would need twice the memory
        with (
            backends.mesh_of(self.chosen["mesh"]) as mesh,
            tempfile.TemporaryFile(dir=self.space.root) as spool,
        ):
            stream = self.part.frames(crop=scene.roi, size=size, on_warning=self.progress.note)
            for index, rgb in enumerate(followed(self.progress, stream)):
                seen = mesh(rgb)
                spool.write((blank if seen is None else seen * scale + offset).tobytes())
                shots.see(rgb, seen)
                if mark is not None:
                    at = mark(rgb, seen) if seen is not None else np.full((68, 2), np.nan)
                    marks.append((at * scale[:2] + offset[:2]).astype(np.float32))
                if seen is not None and index % SKIN_EVERY == 0:
                    skin[index] = matte.skin_samples(rgb, seen)
            spool.seek(0)
            points = np.fromfile(spool, np.float32).reshape(-1, face.N_MESH, 3)
        found = ~np.isnan(points[:, 0, 0])
        takes = shots.kept(n * SCOUT_EVERY for n in scene.seen_in)
        takes = takes.in_pixels(float(scale[0]), (x, y))
        kept = self._remaining(takes, shots.faded())
        takes.undo(points)
        placed = {"landmarks": np.stack(marks)} if marks else {}
        for of_film in placed.values():
            takes.undo(of_film)
        colours = [skin[index] for index in skin if kept[index]]
        self.space.save(
            "shots",
            {
                "kept": kept,
                "takes": takes.to_array(),
                "skin": np.concatenate(colours) if colours else np.zeros((0, 3), np.float32),
            },
        )
        return {"points": points, "found": found & kept, **placed}

    def _remaining(self, takes: Takes, faded: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which frames (T,) are kept, and note which are left out and why."""
        kept, zoomed = takes.flags(len(faded)), takes.flags(len(faded), zoomed=True)
        if not kept.all():
            self.progress.note(
                f"the film is cut: frames {in_words(~kept)} show another picture than "
                f"the one with most of the face, or lie at a cut, and are left out; "
                f"{kept.sum() / FPS:.1f} of {len(kept) / FPS:.1f} s remain (--face chooses whose)"
            )
        if (kept & faded).any():
            self.progress.note(
                f"the picture fades in or out in frames {in_words(kept & faded)}; they are left out"
            )
        if zoomed.any():
            times = sorted({f"{take.zoom.scale:.2f}" for take in takes if take.zoom != STILL})
            self.progress.note(
                f"frames {in_words(zoomed)} show the picture {', '.join(times)} times as "
                "large, which was undone"
            )
        return kept & ~faded

    def _takes(self) -> Takes:
        return Takes.from_array(self.space.load("shots")["takes"])

    @cached_property
    def crop(self) -> Crop:
        """The square around the head, inside the area that all kept frames show."""
        bounds = common_window([take.zoom for take in self._takes()], self.size)
        return choose_crop(self.faces.points, self.faces.found, bounds)

    def _cropped(self, n_frames: int, first: int = 0) -> Iterator[NDArray[np.uint8]]:
        """Yield crops (FILM_PX, FILM_PX, 3) from frame `first` on, with zooms undone."""
        for begin, end, zoom in self._takes().spans(first, first + n_frames):
            yield from self.part.frames(
                first=begin,
                n_frames=end - begin,
                crop=self.crop.zoomed(zoom, self.size),
                size=(FILM_PX, FILM_PX),
            )

    def sound(self, offset_s: float | None) -> None:
        """Save the 16 kHz sound, in sync with the lips, and its speech features."""
        self.progress.stage("sound", None)
        n_frames = self.n_frames
        n_samples = n_frames * SAMPLES_PER_FRAME
        found = {}
        if self.with_audio:
            samples = self.part.sound(n_samples)
            measured = self._offset(samples)
            if offset_s is None:
                offset_s = self._offset_to_correct(measured)
            if offset_s:
                samples = self.part.sound(n_samples, late_s=offset_s)
            if measured is not None:
                found = {"found": np.array([measured.sound_after_lips_s, measured.margin])}
        else:
            samples = np.zeros(n_samples, np.float32)
        heard = voice.is_audible(samples, n_frames)
        if self.with_audio and not heard.any():
            raise TalkheadError(
                f"nothing is heard of {self.video.name} while its picture lasts"
                + (f", when its sound is moved by {offset_s:g} s" if offset_s else "")
                + "; give another part of it, or another --offset"
            )
        if self.with_audio and not heard.all():
            self.progress.note(
                f"the sound is dead in frames {in_words(~heard)}; speech is not learnt from them"
            )
        media.write_wav(self.space.audio, samples)
        listener = backends.voice_of(self.chosen["voice"])
        self.space.save(
            "voice",
            {
                "stream": listener.features(samples),
                "rate_hz": np.array(listener.rate_hz),
                "heard": heard,
                "undone_s": np.array(offset_s or 0.0),
                **found,
            },
        )

    def _offset(self, samples: NDArray[np.float32]) -> lipsync.Offset | None:
        """Measure how late the sound is; None if there is too little lip motion or sound."""
        heard = voice.is_audible(samples, self.n_frames)
        frames = np.flatnonzero(self.faces.found & heard)
        lips = lipsync.lip_motion(self.faces.points)[frames]
        return lipsync.measure(voice.features(samples), frames, lips)

    def _offset_to_correct(self, found: lipsync.Offset | None) -> float:
        """Return the offset to correct, in s, to 10 ms; 0 if it is small or uncertain."""
        if found is None or not found.is_sure:
            self.progress.note(
                "whether lips and sound agree could not be told (too little is seen or heard); the "
                "sound is left as it is (--offset SECONDS shifts it)"
            )
            return 0.0
        if abs(found.sound_after_lips_s) < MIN_OFFSET_S:
            return 0.0
        self.progress.note(
            f"the sound comes {found}; it was shifted into step (--offset none leaves it as it is)"
        )
        return round(found.sound_after_lips_s, 2)

    def _recorded_offset(self) -> dict[str, float | None]:
        """Return the measured and the corrected offset of sound and lips, for the manifest."""
        stored = self.space.load("voice")
        late, margin = stored["found"].tolist() if "found" in stored else (None, None)
        return {
            "sound_after_lips_s": None if late is None else round(late, 4),
            "margin": None if margin is None else round(margin, 4),
            "sure_from": lipsync.SURE,
            "corrected_s": round(float(stored["undone_s"]), 4),
        }

    def film(self) -> None:
        """Save the cropped video, mattes, skin maps, shoulder registration and plate."""
        n_frames = self.n_frames
        stored = self.space.load("shots")
        kept = np.flatnonzero(stored["kept"])
        mesh = self.crop.fractions(self.faces.points)
        reference = _reference_frame(mesh, self.faces.found)
        skin_model = matte.SkinModel.fit(stored["skin"])
        wanted = set(_spread(kept, N_PLATE).tolist())
        thumbs_at = np.unique(np.append(_spread(kept, N_EVIDENCE), reference))
        plate_frames, plate_mattes, thumbs = [], [], []
        warps = np.tile(np.eye(2, 3), (n_frames, 1, 1))
        tracked = np.zeros(n_frames, bool)
        parse = backends.parser_of(self.chosen["labels"])
        captions = CaptionFinder()
        first_picture = next(self._cropped(1, reference))
        self.progress.stage("crop, matte, shoulders", n_frames)
        with (
            matte.Segmenter() as segment,
            media.VideoWriter(
                self.space.video, (FILM_PX, FILM_PX), crf=10, preset="ultrafast", intra=True
            ) as out,
            self.space.pieces("maps") as maps,
        ):
            person = cv2.resize(segment(first_picture), (matte.MAP_PX, matte.MAP_PX))
            prior = matte.torso_prior(mesh[reference])
            shoulders = matte.BodyTracker(first_picture, (person * prior).astype(np.uint8))
            stream = self._cropped(n_frames)
            for index, rgb in enumerate(followed(self.progress, stream)):
                out.write(rgb)
                captions.see(rgb)
                mask = segment(rgb)
                parsed = {} if parse is None else {"parsed": parse(rgb)}
                maps.add(matte=mask, skin=skin_model(rgb), **parsed)
                warp = shoulders(rgb)
                if warp is not None and stored["kept"][index]:
                    warps[index], tracked[index] = warp, True
                if index in wanted:
                    plate_frames.append(rgb)
                    plate_mattes.append(mask)
                if index in thumbs_at:
                    size = (matte.MAP_PX, matte.MAP_PX)
                    thumbs.append(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA))
            n_read = out.n_frames
        if n_read != n_frames:
            raise TalkheadError(
                f"{self.video.name} gave {n_read} frames, and {n_frames} when faces were looked "
                "for; run the command again, or convert the film first"
            )
        if captions.lines is not None:
            top, bottom = captions.lines
            self.progress.note(
                f"captions are burnt into the picture, {top:.0%} to {bottom:.0%} of the way down; "
                "they will be learnt as if they were part of the person: take the film without them"
            )
        furniture = matte.fixtures(plate_mattes)
        self._plate(plate_frames, [matte.without(mask, furniture) for mask in plate_mattes])
        self.space.save(
            "film",
            {
                "warps": warps,
                "tracked": tracked,
                "thumbs": np.stack(thumbs),
                "thumbs_at": thumbs_at,
                "reference": np.array(reference),
                "furniture": furniture,
            },
        )

    def _plate(self, frames: list[NDArray[np.uint8]], mattes: list[NDArray[np.uint8]]) -> None:
        """Save the background behind the person, estimated from some frames and mattes."""
        plate, _ = matte.make_plate(frames, mattes)
        background_change = matte.background_change(frames, mattes, plate)
        if background_change > RESTLESS:
            self.progress.note(
                f"the background moves (by {background_change:.0f} of 255); films show it still, "
                "as it is on average (render --background gives them another)"
            )
        write_png(self.space.plate_file, plate)

    def tracks(self) -> None:
        """Fit the head's pose, then compute and save all per-frame signals."""
        faces, crop = self.faces, self.crop
        self.progress.stage("head pose", None)
        head = pose.fit_head(faces.points, faces.found, self.size)
        mesh = self.crop.fractions(self.faces.points)
        film = self.space.load("film")
        k = crop.intrinsics(head.focal_px, head.centre_px, FILM_PX)
        seen = _face_signals(faces, head, self._marks())
        eyes = face.fit_eye_scale(seen["gap"][faces.found])
        lost = 1 - float(film["tracked"][self.space.load("shots")["kept"]].mean())
        if lost > 0.2:
            self.progress.note(
                f"the shoulders could not be followed in {lost:.0%} of the frames (plain or dark "
                "clothes, or hardly in the picture); there they are taken to move on evenly, and "
                "may swim in films"
            )
        reference = int(film["reference"])
        pivot = matte.body_pivot(mesh[reference])
        body = matte.body_motion(film["warps"], film["tracked"], pivot)
        to_heights = FILM_PX / k[0, 0] * float(np.median(head.translation[faces.found, 2]))
        near_gap = np.convolve(~faces.found, np.ones(5), "same") > 0
        self.space.save(
            "tracks",
            {
                "pose": head.pose.astype(np.float32),
                "k": k.astype(np.float32),
                "eye": eyes.openness(seen["gap"]).astype(np.float32),
                "gaze": seen["gaze"],
                "brow": seen["brow"] - seen["brow"][faces.found].mean(0),
                "landmarks": seen["landmarks"],
                "mesh_px": mesh,
                "body": np.concatenate(
                    [body[:, :2] * to_heights, body[:, 2:], np.zeros((len(body), 1))], -1
                ).astype(np.float32),
                "body_px": body.astype(np.float32),
                "body_pivot": pivot.astype(np.float32),
                "shape": head.shape.astype(np.float32),
                "residual_px": head.residual_px.astype(np.float32),
                "found": faces.found,
                "usable": ~near_gap,
            },
        )

    def _marks(self) -> NDArray[np.float32]:
        """Return landmarks (T, 68, 2) in pixels of the source video, gaps interpolated."""
        stored = self.space.load("mesh")
        if "landmarks" not in stored:
            return face.to_68(self.faces.points)[..., :2]
        return face.fill_gaps(stored["landmarks"], np.isfinite(stored["landmarks"][:, 0, 0]))

    def labels(self) -> None:
        """Compute and save the soft labels of every frame."""
        film, tracks = self.space.load("film"), self.space.load("tracks")
        reference = int(film["reference"])
        mesh, body, pivot = tracks["mesh_px"], tracks["body_px"], tracks["body_pivot"]
        at = film["thumbs_at"]
        known = tracks["found"] & film["tracked"]  # else the shoulders' motion is unknown
        others = [i for i, frame in enumerate(at) if frame != reference and known[frame]]
        thumbs = film["thumbs"]
        odds = matte.motion_evidence(
            thumbs[int(np.flatnonzero(at == reference)[0])],
            [thumbs[i] for i in others],
            [mesh[at[i]] for i in others],
            mesh[reference],
            [film["warps"][at[i]] for i in others],
        )
        prior = matte.torso_prior(mesh[reference])
        logit = np.log((prior + 1e-3) / (1 - prior + 1e-3)) + np.clip(odds, -4, 4)
        maps = matte.RegionMaps(1 / (1 + np.exp(-logit)), mesh[reference])
        self.progress.stage("labels", self.n_frames)
        with self.space.pieces("labels") as labels:
            for row in followed(self.progress, range(self.n_frames)):
                seen = self.space.piece("maps", row)
                hair, torso = maps.moved(mesh[row], body[row] - body[reference], pivot)
                person = matte.without(seen["matte"], film["furniture"])
                own = matte.label_maps(mesh[row], person, seen["skin"], hair, torso)
                parsed = seen.get("parsed")
                labels.add(labels=own if parsed is None else matte.parsed_labels(parsed, own))


def _face_signals(
    faces: face.Faces, head: HeadTrack, marks: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """Return per-frame signals: gap (T, 2) of the lids, gaze (T, 2), brow (T, 2) height of each,
    landmarks (T, 68, 3) in head space, lifted from `marks` (T, 68, 2) in pixels.
    """
    chosen = np.unique(np.concatenate([*face.BROWS, *(e[:2] for e in face.EYES)]))
    parts: dict[str, list[NDArray[Any]]] = {}
    for first in range(0, len(faces.found), BLOCK):
        rows = slice(first, first + BLOCK)
        pixels = faces.points[rows, :, :2].astype(np.float64)
        lifted = np.full((len(pixels), face.N_MESH, 3), np.nan)
        part = head.part(rows)
        lifted[:, chosen] = part.lift(pixels[:, chosen], chosen)
        for name, value in {
            "gap": face.lid_gap(pixels),
            "gaze": face.gaze(pixels),
            "brow": face.brow_height(lifted),
            "landmarks": part.lift(marks[rows].astype(np.float64), face.MESH_TO_68),
        }.items():
            parts.setdefault(name, []).append(value.astype(np.float32))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _spread(rows: NDArray[np.integer[Any]], n: int) -> NDArray[np.integer[Any]]:
    """Return at most n of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)]


def _reference_frame(mesh: NDArray[np.float32], found: NDArray[np.bool_]) -> int:
    """Return the found frame whose rigid points are nearest to their median position."""
    rigid = mesh[:, pose.RIGID].reshape(len(mesh), -1)
    distance = np.linalg.norm(rigid - np.median(rigid[found], 0), axis=1)
    return int(np.argmin(np.where(found, distance, np.inf)))

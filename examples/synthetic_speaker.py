"""A synthetic person who talks, blinks and turns the head, with ground truth for all of it.

Made at run time: `posed_photo` turns the astronaut photo of scikit-image into a puppet,
`formant_voice` synthesises its speech and mouth motion, and this file animates and paints the
puppet in four layers, back to front: backdrop, torso, neck, head.

    python examples/synthetic_speaker.py OUT.mp4 [--seconds 20] [--size 512] [--seed 0]

writes OUT.mp4 and OUT.truth.npz. `--speech-only other.wav` needs no OUT and writes new speech
that can drive the avatar.

Shape legend: T frames, V vertices of the head, F triangles, S side of the picture in pixels.
"Photo pixels" as in `posed_photo`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import cv2
import numpy as np
from formant_voice import speak
from posed_photo import (
    BACKGROUND,
    CROP,
    EYES,
    FOCAL,
    HAIR,
    IRIS,
    LOWER_LIP,
    MARGIN,
    MOUTH,
    NECK,
    TEXELS,
    TORSO,
    UPPER_LIP,
    photo_parts,
    photo_puppet,
)
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from talkhead_cli.contracts import FPS

LABEL_PX = 128


@dataclass(frozen=True)
class Truth:
    """Ground truth of every frame. Camera axes are OpenCV's; 1.0 = one face height.

    rotation (T, 3, 3), translation (T, 3) head to camera · focal_px · shape (478, 3) the mesh
    in head space with the mouth shut and the eyes open · mouth (T,) lip aperture |13-14| /
    |10-152| · eye (T,) 0 shut ... 1 open · landmarks_px (T, 478, 2) · body (T, 3) shoulders
    right, down (px), roll (rad, clockwise) · labels (T, 128, 128) index into LABELS · matte
    (T, 128, 128) 0 ... 255 · plate (S, S, 3) RGB
    """

    rotation: np.ndarray
    translation: np.ndarray
    focal_px: float
    shape: np.ndarray
    mouth: np.ndarray
    eye: np.ndarray
    landmarks_px: np.ndarray
    body: np.ndarray
    labels: np.ndarray
    matte: np.ndarray
    plate: np.ndarray

    def save(self, path: str | Path) -> None:
        np.savez_compressed(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Truth:
        with np.load(path) as kept:
            values = {f.name: kept[f.name] for f in fields(cls)}
        return cls(**{**values, "focal_px": float(values["focal_px"])})


# ---------------------------------------------------------------- the performance


@dataclass(frozen=True)
class Performance:
    """rotation (T, 3, 3), translation (T, 3) · jaw, width, eye (T,) · gaze (T, 2) photo pixels ·
    lag (T,) how far the hair trails · body (T, 3) right, down in picture sides, roll in rad"""

    rotation: np.ndarray
    translation: np.ndarray
    jaw: np.ndarray
    width: np.ndarray
    eye: np.ndarray
    gaze: np.ndarray
    lag: np.ndarray
    body: np.ndarray


def _wander(rng: np.random.Generator, n: int, sigma: float, peak: float) -> np.ndarray:
    """Return smooth noise (n,) within +-peak; `sigma` in frames."""
    pad = int(4 * sigma)
    noise = gaussian_filter1d(rng.standard_normal(n + 2 * pad), sigma)[pad : pad + n]
    return peak * np.tanh(0.75 * noise * np.sqrt(2 * np.sqrt(np.pi) * sigma))


def _perform(jaw: np.ndarray, width: np.ndarray, seed: int) -> Performance:
    """Return random motion of head, eyes and shoulders for a mouth of T frames."""
    n, puppet = len(jaw), photo_puppet()
    rng = np.random.default_rng([seed, 0x5EED])
    yaw, pitch, roll = (_wander(rng, n, s, p) for s, p in ((15, 12.0), (13, 7.0), (17, 5.0)))
    turn = Rotation.from_euler("zxy", np.stack([roll, pitch, yaw], 1), degrees=True).as_matrix()
    rotation = turn @ puppet.rotation
    shift = np.stack([_wander(rng, n, 20, p) for p in (0.05, 0.03, 0.08)], 1)
    pivot = np.array([0.0, 0.35, 0.1])
    translation = puppet.translation + puppet.rotation @ pivot + shift - rotation @ pivot

    eye, at = np.ones(n), rng.uniform(0.8, 1.6) * FPS
    eye -= 0.16 * (0.5 + _wander(rng, n, 12, 0.5))
    while at < n - 4:
        down, up = rng.uniform(1.3, 1.8), rng.uniform(1.8, 2.6)
        t = np.arange(n) - at
        slope = np.where(t < 0, -t / down, np.maximum(t - 2.2, 0) / up)
        eye *= np.clip(slope, 0, 1)
        at += rng.uniform(2.0, 3.6) * FPS
    gaze = np.zeros((n, 2))
    start = 0
    while start < n:
        gaze[start:] = rng.uniform((-1.1, -0.4), (1.1, 0.4))
        start += int(rng.uniform(0.5, 2.2) * FPS)
    lag = np.radians(yaw - gaussian_filter1d(yaw, 4))
    breath = 0.006 * np.sin(2 * np.pi * (np.arange(n) / FPS / 3.8 + rng.random()))
    body = np.stack(
        [
            _wander(rng, n, 22, 0.016),
            breath + _wander(rng, n, 25, 0.006),
            _wander(rng, n, 24, np.radians(2.0)),
        ],
        1,
    )
    return Performance(rotation, translation, jaw, width, eye, gaze, lag, body)


def _vertices(p: Performance) -> np.ndarray:
    """Return the deformed head (T, V+10, 3) in head space."""
    puppet = photo_puppet()
    controls = np.stack(
        [p.jaw, np.maximum(p.width, 0), np.maximum(-p.width, 0), 1 - p.eye, p.lag], 1
    )
    modes = np.stack([puppet.jaw, puppet.spread, puppet.rounded, puppet.blink, puppet.sway])
    vertices = puppet.rest + np.einsum("tk,kvc->tvc", controls, modes)
    vertices[:, -10:, :2] += (p.gaze / puppet.unit_px)[:, None]
    return vertices


# ---------------------------------------------------------------- painting


class _Stage:
    """Paints frames of one size; holds the textures at that size."""

    def __init__(self, size_px: int) -> None:
        sitter = photo_parts()
        self.size = size_px
        self.sitter, self.puppet = sitter, photo_puppet()
        scale = min(1.0, 1.3 * size_px / (CROP[2] * TEXELS))
        shrink = dict(fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        self.head, self.neck, self.torso, self.eyes, self.mouth = (
            cv2.resize(t, None, **shrink)
            for t in (sitter.head, sitter.neck, sitter.torso, sitter.eyes, sitter.mouth)
        )
        self.kind = cv2.resize(sitter.kind, self.head.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        self.texels = self.head.shape[0] / (CROP[2] + 2 * MARGIN)
        self.source = self._texel(sitter.mesh[:, :2])
        a, b, c = (sitter.mesh[sitter.triangles[:, k], :2] for k in range(3))
        area = abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])
        self.retreat = np.where(area < 3.0, 0.03, 0.0)  # or slivers would speckle their neighbours
        left, top, right, bottom = sitter.neck_box
        gx, gy = np.meshgrid(np.linspace(left, right, 9), np.linspace(top, bottom, 11))
        self.neck_photo = np.stack([gx, gy], -1).reshape(-1, 2)
        tight = np.clip((bottom - 8 - self.neck_photo[:, 1]) / (bottom - 8 - 152), 0, 1)
        self.neck_share = (tight**2 * (3 - 2 * tight))[:, None]
        depth = np.full((len(self.neck_photo), 1), sitter.points[152, 2] + 14)
        self.neck_head = self.puppet.lifted(np.concatenate([self.neck_photo, depth], 1))
        corner = np.arange(10 * 9).reshape(10, 9)[:, :8].ravel()
        self.neck_triangles = np.concatenate(
            [
                np.stack([corner, corner + 1, corner + 9], 1),
                np.stack([corner + 1, corner + 10, corner + 9], 1),
            ]
        )
        self.plate = _backdrop(size_px)

    def _texel(self, photo: np.ndarray) -> np.ndarray:
        return (photo - (np.array(CROP[:2]) - MARGIN)) * self.texels - 0.5

    def screen(self, head: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
        """Project head space (N, 3) to picture x, y (centres at +0.5) and camera depth (N, 3)."""
        camera = head @ rotation.T + translation
        xy = camera[:, :2] / camera[:, 2:] * (FOCAL * self.size) + self.size / 2
        return np.concatenate([xy, camera[:, 2:]], 1)

    def _body(self, body: np.ndarray) -> np.ndarray:
        """Return the shoulders' affine (2, 3) from photo to picture pixels."""
        k = self.size / CROP[2]
        pivot = np.array([215.0, 290.0])
        c, s = np.cos(body[2]), np.sin(body[2])
        turn = np.array([[c, -s], [s, c]])
        offset = (pivot - CROP[:2]) * k + body[:2] * self.size - k * turn @ pivot
        return np.concatenate([k * turn, offset[:, None]], 1)

    def _warped(self, texture: np.ndarray, affine: np.ndarray, box: tuple[int, ...]) -> np.ndarray:
        """Warp `texture` by `affine` (2, 3), photo to picture pixels, within the given `box`."""
        x0, y0, x1, y1 = box
        to_photo = cv2.invertAffineTransform(affine)
        # picture index -> +0.5 -> photo -> texel index
        a = to_photo[:, :2]
        b = a @ (np.array([x0, y0]) + 0.5) + to_photo[:, 2]
        inverse = np.concatenate([a * self.texels, self._texel(b)[:, None]], 1)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(
            texture, inverse, (x1 - x0, y1 - y0), flags=flags, borderMode=cv2.BORDER_REPLICATE
        )

    def _plane(
        self, photo: np.ndarray, rotation: np.ndarray, translation: np.ndarray
    ) -> np.ndarray:
        """Return the affine (2, 3), photo to picture, of a small plane on the head at `photo`."""
        corners = photo + np.array([[-10, -10, 0], [10, -10, 0], [0, 10, 0]])
        seen = self.screen(self.puppet.lifted(corners), rotation, translation)
        return cv2.getAffineTransform(
            corners[:, :2].astype(np.float32), seen[:, :2].astype(np.float32)
        )

    def _opening(self, polygon: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
        """Return the antialiased mask of a polygon (k, 2) in picture pixels, and its box."""
        low = np.clip(np.floor(polygon.min(0)) - 2, 0, self.size).astype(int)
        high = np.clip(np.ceil(polygon.max(0)) + 3, 0, self.size).astype(int)
        mask = np.zeros((4 * (high - low))[::-1], np.uint8)
        fine = np.round(((polygon - low) * 4 - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(mask, [fine], 255, cv2.LINE_8, 4)
        mask = cv2.resize(mask, tuple((high - low).tolist()), interpolation=cv2.INTER_AREA)
        return mask.astype(np.float32)[..., None] / 255, (*low.tolist(), *high.tolist())

    def layers(
        self, p: Performance, i: int, vertices: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Return frame i's torso, neck and head (S, S, 4), mouth mask and head labels (S, S)."""
        rotation, translation = p.rotation[i], p.translation[i]
        s, full = self.size, (0, 0, self.size, self.size)
        body = self._body(p.body[i])
        torso = self._warped(self.torso, body, full)

        on_head = self.screen(self.neck_head, rotation, translation)[:, :2]
        on_body = self.neck_photo @ body[:, :2].T + body[:, 2]
        at = self.neck_share * on_head + (1 - self.neck_share) * on_body
        order = self.neck_triangles
        neck = _sampled(self.neck, *_inverse(at, self._texel(self.neck_photo), order, s))

        seen = self.screen(vertices, rotation, translation)
        triangles = self.sitter.triangles
        far = seen[triangles, 2].mean(1) + self.retreat
        order = triangles[np.argsort(-far, kind="stable")]
        maps = _inverse(seen[:-10, :2], self.source, order, s)
        head = _sampled(self.head, *maps)
        kind = cv2.remap(self.kind, *maps, cv2.INTER_NEAREST, borderValue=HAIR)

        for (upper, lower), iris in zip(EYES, IRIS, strict=True):
            mask, box = self._opening(seen[[*upper, *lower[-2:0:-1]], :2])
            ball = self.sitter.points[iris[0]] + [0, 0, 2]
            plane = self._plane(ball, rotation, translation)
            plane[:, 2] -= plane[:, :2] @ -p.gaze[i]
            self._into(head, self._warped(self.eyes, plane, box), mask, box)
        mask, box = self._opening(seen[[*UPPER_LIP[0], *LOWER_LIP[0][-2:0:-1]], :2])
        teeth = self.sitter.points[[13, 14]].mean(0) + [0, 0, 5]
        inside = self._warped(self.mouth, self._plane(teeth, rotation, translation), box)
        gap = np.linalg.norm(vertices[13] - vertices[14])
        rounded = max(0.0, -p.width[i])
        inside *= (0.4 + 0.6 * np.clip(gap / 0.05, 0, 1)) * (1 - 0.55 * rounded)
        self._into(head, inside, mask, box)
        mouth = np.zeros((s, s), np.float32)
        mouth[box[1] : box[3], box[0] : box[2]] = mask[..., 0]
        return [torso, neck, head], mouth, kind

    @staticmethod
    def _into(layer: np.ndarray, rgb: np.ndarray, mask: np.ndarray, box: tuple[int, ...]) -> None:
        x0, y0, x1, y1 = box
        part = layer[y0:y1, x0:x1]
        part[..., :3] += (rgb - part[..., :3]) * mask
        part[..., 3:] += (1 - part[..., 3:]) * mask

    def picture(self, p: Performance, i: int, vertices: np.ndarray) -> np.ndarray:
        """Return frame i, (S, S, 3) float32 RGB in [0, 1]."""
        rgb = self.plate.copy()
        for layer in self.layers(p, i, vertices)[0]:
            rows = np.flatnonzero(layer[..., 3].any(1))
            part = slice(rows[0], rows[-1] + 1)
            rgb[part] = rgb[part] * (1 - layer[part, :, 3:]) + layer[part, :, :3]
        return rgb

    def classes(
        self, p: Performance, i: int, vertices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return labels and matte of frame i, (S, S) uint8."""
        (torso, neck, head), mouth, kind = self.layers(p, i, vertices)
        labels = np.full(mouth.shape, BACKGROUND, np.uint8)
        labels[torso[..., 3] > 0.5] = TORSO
        labels[neck[..., 3] > 0.5] = NECK
        labels = np.where(head[..., 3] > 0.5, kind, labels)
        labels[(mouth > 0.5) & (head[..., 3] > 0.5)] = MOUTH
        clear = (1 - torso[..., 3]) * (1 - neck[..., 3]) * (1 - head[..., 3])
        return labels, np.round(255 * (1 - clear)).astype(np.uint8)


def _inverse(
    at: np.ndarray, source: np.ndarray, triangles: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return two float32 maps (S, S) from picture to `source` coordinates, -9 where empty.

    at (V, 2) picture pixels · source (V, 2) texture coordinates · later triangles cover earlier
    """
    at = at - 0.5
    a, b, c = (at[triangles[:, k]] for k in range(3))
    ab, ac = b - a, c - a
    area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    longest = np.sqrt(np.maximum(np.maximum((ab**2).sum(1), (ac**2).sum(1)), ((c - b) ** 2).sum(1)))
    thick = abs(area) > np.maximum(0.3 * longest, 0.02)  # needles would only cause speckles
    kept = np.flatnonzero(thick)
    ids = np.full((size, size), -1, np.int32)
    corners = np.round(at[triangles] * 16).astype(np.int32)
    for k in kept:
        cv2.fillConvexPoly(ids, corners[k], int(k), cv2.LINE_8, 4)
    y, x = np.nonzero(ids >= 0)
    name = ids[y, x]
    area = np.where(thick, area, 1.0)
    dx, dy = x - a[name, 0], y - a[name, 1]
    u = np.clip((dx * ac[name, 1] - dy * ac[name, 0]) / area[name], 0, 1)
    v = np.clip((dy * ab[name, 0] - dx * ab[name, 1]) / area[name], 0, 1)
    over = np.maximum(u + v, 1)
    u, v = (u / over)[:, None], (v / over)[:, None]
    p, q, r = (source[triangles[:, k]] for k in range(3))
    found = p[name] + u * (q - p)[name] + v * (r - p)[name]
    maps = np.full((2, size, size), -9, np.float32)
    maps[:, y, x] = found.T
    return cv2.medianBlur(maps[0], 3), cv2.medianBlur(maps[1], 3)  # specks where slivers overlap


def _sampled(texture: np.ndarray, map_x: np.ndarray, map_y: np.ndarray) -> np.ndarray:
    return cv2.remap(texture, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


def _backdrop(size_px: int) -> np.ndarray:
    """Return a mottled studio backdrop (S, S, 3) float32, in the tone of the photo."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:LABEL_PX, 0:LABEL_PX] / LABEL_PX - 0.5
    tone = np.array([203, 196, 193]) - (60 * (x**2 + y**2))[..., None] - 10 * y[..., None]
    for sigma, strength in ((18, 9.0), (6, 3.5)):
        noise = cv2.GaussianBlur(rng.standard_normal((LABEL_PX, LABEL_PX)), (0, 0), sigma)
        tone = tone + (noise / noise.std() * strength)[..., None] * [1.0, 0.95, 0.85]
    plate = cv2.resize(tone / 255, (size_px, size_px), interpolation=cv2.INTER_CUBIC)
    return np.clip(plate, 0, 1).astype(np.float32)


def make(
    seconds: float = 20.0, size_px: int = 512, seed: int = 0
) -> tuple[Iterator[np.ndarray], np.ndarray, Truth]:
    """Return frames (S, S, 3) uint8 RGB at 25/s, sound (T*640,) float32 at 16 kHz, and truth."""
    speech = speak(seconds, seed)
    p = _perform(speech.jaw, speech.width, seed)
    vertices = _vertices(p)
    stage, small = _Stage(size_px), _Stage(LABEL_PX)
    n = len(p.jaw)
    face = np.concatenate([vertices[:, :468], vertices[:, -10:]], 1)
    projected = [stage.screen(face[i], p.rotation[i], p.translation[i])[:, :2] for i in range(n)]
    known = [small.classes(p, i, vertices[i]) for i in range(n)]
    height = np.linalg.norm(vertices[:, 10] - vertices[:, 152], axis=1)
    rest = stage.puppet.rest
    truth = Truth(
        rotation=p.rotation,
        translation=p.translation,
        focal_px=FOCAL * size_px,
        shape=np.concatenate([rest[:468], rest[-10:]]),
        mouth=np.linalg.norm(vertices[:, 13] - vertices[:, 14], axis=1) / height,
        eye=p.eye,
        landmarks_px=np.array(projected),
        body=p.body * [size_px, size_px, 1],
        labels=np.array([labels for labels, _ in known]),
        matte=np.array([matte for _, matte in known]),
        plate=np.round(stage.plate * 255).astype(np.uint8),
    )

    def frames() -> Iterator[np.ndarray]:
        rng = np.random.default_rng([seed, 0xCA])
        grain = rng.standard_normal((size_px + 64, size_px + 64, 3), np.float32) / 255
        for i in range(n):
            a, b = rng.integers(0, 64, 2)
            rgb = stage.picture(p, i, vertices[i]) + grain[a : a + size_px, b : b + size_px]
            yield np.round(np.clip(rgb, 0, 1) * 255).astype(np.uint8)

    return frames(), speech.sound, truth


def film(out: Path, seconds: float = 20.0, size_px: int = 512, seed: int = 0) -> None:
    """Write OUT.mp4 and, beside it, OUT.truth.npz."""
    from talkhead_cli.media import VideoWriter, write_wav

    frames, sound, truth = make(seconds, size_px, seed)
    truth.save(out.with_suffix(".truth.npz"))
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        write_wav(wav, sound)
        with VideoWriter(out, (size_px,) * 2, audio=wav, crf=16, preset="veryfast") as video:
            for frame in frames:
                video.write(frame)


def main() -> None:
    """Write OUT.mp4 and OUT.truth.npz, or new speech."""
    from talkhead_cli.cli.console import native_stderr_silenced
    from talkhead_cli.media import write_wav

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="the video to write, OUT.mp4")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speech-only", type=Path, metavar="WAV", help="write new speech here")
    args = parser.parse_args()
    if args.speech_only:
        sound = speak(args.seconds, args.seed + 1000).sound
        write_wav(args.speech_only, sound)
        print(args.speech_only)
    if not args.out:
        if not args.speech_only:
            parser.error("name the video to write, or --speech-only WAV")
        return
    with native_stderr_silenced():
        film(args.out, args.seconds, args.size, args.seed)
    print(args.out)


if __name__ == "__main__":
    main()

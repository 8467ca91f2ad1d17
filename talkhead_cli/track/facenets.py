"""Optional networks, more accurate than the offline defaults, that return the same arrays.

facexlib's RetinaFace finds faces, its BiSeNet labels every pixel, and face-alignment's FAN places
68 landmarks.  All are built here and loaded from verified files: the libraries' own downloads are
bypassed, because they are not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from talkhead_cli.contracts import LABELS
from talkhead_cli.track.face import FACE_OVAL
from talkhead_cli.track.matte import MAP_PX

Array = NDArray[np.floating[Any]]
Picture = NDArray[np.uint8]
Fill = Callable[[Any], None]  # loads published weights into a library's module, or raises

SURE = 0.8  # lowest RetinaFace score that counts as a face
PARSED_PX = 512  # side of BiSeNet's input
# BiSeNet's 19 classes (CelebAMask-HQ) by label.  Ears and ear-rings count as hair: they move with
# the head but are not face.
CLASSES = {
    "background": [0],
    "face": [1, 2, 3, 4, 5, 6, 10, 12, 13],  # skin, brows, eyes, glasses, nose, lips
    "hair": [7, 8, 9, 17, 18],  # ears, ear-rings, hair, hat
    "mouth": [11],
    "neck": [14, 15],  # neck, necklace
    "torso": [16],
}


def best_device() -> torch.device:
    """Return CUDA if available: these networks take 0.25 to 0.6 s per picture on two CPU cores."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class RetinaDetector:
    """Boxes of all faces in a picture. Same interface as `face.FaceDetector`."""

    def __init__(self, fill: Fill) -> None:
        from facexlib.detection.retinaface import RetinaFace

        self._net = RetinaFace(network_name="resnet50", device=best_device())
        fill(self._net)

    def __enter__(self) -> RetinaDetector:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, rgb: Picture) -> NDArray[np.float32]:
        """rgb (H, W, 3) -> boxes (n, 4) x0 y0 x1 y1 in pixels, largest first."""
        return self.scored(rgb)[0]

    @torch.no_grad()
    def scored(self, rgb: Picture) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the boxes, and the confidence (n,) of each in [0, 1]."""
        found = np.asarray(self._net.detect_faces(rgb[..., ::-1], SURE), np.float32)
        boxes, scores = found[:, :4], found[:, 4]
        order = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        return boxes[order], scores[order]


class FaceParser:
    """Soft labels from a single picture (BiSeNet)."""

    def __init__(self, fill: Fill) -> None:
        from facexlib.parsing.bisenet import BiSeNet

        self._net = BiSeNet(num_class=19).to(best_device())
        fill(self._net)
        self._device = best_device()
        self._mean = torch.tensor([0.485, 0.456, 0.406], device=self._device)[:, None, None]
        self._std = torch.tensor([0.229, 0.224, 0.225], device=self._device)[:, None, None]

    @torch.no_grad()
    def __call__(self, rgb: Picture) -> NDArray[np.uint8]:
        """rgb (H, W, 3) -> labels (len(LABELS), MAP_PX, MAP_PX), 255 = certain."""
        sized = cv2.resize(rgb, (PARSED_PX, PARSED_PX), interpolation=cv2.INTER_AREA)
        picture = torch.from_numpy(sized).to(self._device).permute(2, 0, 1) / 255
        logits = self._net(((picture - self._mean) / self._std)[None])[0]
        share = torch.nn.functional.interpolate(logits.softmax(1), (MAP_PX, MAP_PX), mode="area")
        maps = torch.stack([share[0, CLASSES[name]].sum(0) for name in LABELS])
        return (maps * 255).round().byte().cpu().numpy()


class FanLandmarks:
    """68 landmarks (FAN) of a face whose mesh is known; 0.6 s per picture on two CPU cores."""

    def __init__(self, fill: Fill, *, in_space: bool) -> None:
        """in_space: place the jaw where it is in 3D (3DFAN), not on the visible outline (2DFAN)."""
        from face_alignment import FaceAlignment, LandmarksType
        from face_alignment.models import FAN

        class Aligner(FaceAlignment):
            def _load_native(self, name: str, size: int, device: str, dtype: Any) -> Any:
                net = FAN(size)
                fill(net)
                return net.to(device, dtype=dtype)

        self._find = Aligner(
            LandmarksType.TWO_HALF_D if in_space else LandmarksType.TWO_D,
            device=best_device().type,
            face_detector="folder",
            compile=False,
        )

    def __call__(self, rgb: Picture, mesh: Array) -> NDArray[np.float32]:
        """rgb (H, W, 3), its mesh (478, >= 2) in pixels -> landmarks (68, 2) in pixels."""
        oval = mesh[FACE_OVAL, :2]
        box = np.concatenate([oval.min(0), oval.max(0)])
        found = self._find.get_landmarks_from_image(rgb, detected_faces=[box])
        return np.asarray(found[0], np.float32)[:, :2]

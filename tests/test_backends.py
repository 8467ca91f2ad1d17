"""Better networks behind the arrays of the offline defaults: random weights, official layouts."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from talkhead_cli.contracts import LABELS, SilentProgress, TalkheadError
from talkhead_cli.jobs import backends, loss_networks
from talkhead_cli.jobs.preprocess import preprocess
from talkhead_cli.store import Workspace, weights
from talkhead_cli.track import face, matte

Bring = Callable[[str], Path]


def _random(name: str) -> dict[str, torch.Tensor]:
    """A state dict as the published file has it."""
    torch.manual_seed(0)
    if name == "retinaface":
        from facexlib.detection.retinaface import RetinaFace

        net = RetinaFace(network_name="resnet50", device=torch.device("cpu"))
        return {f"module.{k}": v for k, v in net.state_dict().items()}
    if name == "bisenet":
        from facexlib.parsing.bisenet import BiSeNet

        return dict(BiSeNet(num_class=19).state_dict())
    if name == "lpips":
        from torchvision.models import alexnet

        return dict(alexnet(weights=None).state_dict())
    from face_alignment.models import FAN

    return dict(FAN(4).state_dict())


@pytest.fixture
def bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bring:
    """Puts weights in the official layout where talkhead looks; their hash is not published."""
    monkeypatch.setenv("TALKHEAD_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    weights.folder().mkdir()

    def put(name: str, state: dict[str, torch.Tensor] | None = None) -> Path:
        known = replace(weights.KNOWN[name], sha256="")
        monkeypatch.setitem(weights.KNOWN, name, known)
        place = weights.folder() / known.file
        if name == "face-landmarker":  # a bundle of the models that lie in MediaPipe's wheel
            import mediapipe

            modules = Path(mediapipe.__file__).parent / "modules"
            with zipfile.ZipFile(place, "w") as bundle:
                bundle.write(
                    modules / "face_detection" / "face_detection_short_range.tflite",
                    "face_detector.tflite",
                )
                bundle.write(
                    modules / "face_landmark" / "face_landmark.tflite",
                    "face_landmarks_detector.tflite",
                )
        else:
            torch.save(_random(name) if state is None else state, place)
        return place

    return put


def _picture(side: int = 256) -> np.ndarray:
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut()[:side, 96 : 96 + side])


def test_auto_takes_the_best_that_is_there(bring: Bring) -> None:
    for name in ("retinaface", "bisenet", "face-landmarker", "fan2d"):
        bring(name, {})
    assert backends.choose() == {
        "voice": "embedding",
        "detector": "retinaface",
        "mesh": "face-landmarker",
        "landmarks": "mesh",
        "labels": "bisenet",
    }
    assert backends.choose(["landmarks=fan2d"])["landmarks"] == "fan2d"


def test_retinaface_answers_as_the_default_detector_does(bring: Bring) -> None:
    bring("retinaface")
    with backends.detector_of("retinaface") as detect:
        boxes, scores = detect.scored(_picture())  # type: ignore[attr-defined]
        detect._net.detect_faces = lambda *_: np.array(  # type: ignore[attr-defined]
            [[10, 10, 20, 20, 0.99, *[0] * 10], [30, 30, 90, 80, 0.9, *[0] * 10]], np.float32
        )
        known, sure = detect.scored(_picture())  # type: ignore[attr-defined]
    assert boxes.shape == (len(scores), 4) and boxes.dtype == np.float32
    assert known.tolist() == [[30, 30, 90, 80], [10, 10, 20, 20]]  # largest first
    assert np.allclose(sure, [0.9, 0.99])


def test_a_parser_labels_a_picture_by_the_classes_that_it_sees(bring: Bring) -> None:
    from talkhead_cli.track.facenets import CLASSES

    assert sorted(c for classes in CLASSES.values() for c in classes) == list(range(19))
    assert set(CLASSES) == set(LABELS)
    bring("bisenet")
    parse = backends.parser_of("bisenet")
    maps = parse(_picture())
    assert maps.shape == (6, matte.MAP_PX, matte.MAP_PX) and maps.dtype == np.uint8
    assert np.abs(maps.astype(int).sum(0) - 255).max() <= 3

    class Seen(torch.nn.Module):
        """Hair on the left, cloth on the right."""

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            logits = torch.zeros(1, 19, *x.shape[2:])
            logits[:, 17, :, : x.shape[3] // 2] = 20
            logits[:, 16, :, x.shape[3] // 2 :] = 20
            return (logits,)

    parse._net = Seen()
    maps = dict(zip(LABELS, parse(_picture()), strict=True))
    assert (maps["hair"][:, :64] == 255).all() and (maps["torso"][:, 64:] == 255).all()


def test_a_parsers_person_is_the_mattes() -> None:
    rng = np.random.default_rng(0)
    own = rng.dirichlet(np.ones(6), (8, 8)).transpose(2, 0, 1)
    own = (own * 255).astype(np.uint8)
    own[-1] += (255 - own.astype(int).sum(0)).astype(np.uint8)
    parsed = np.zeros_like(own)
    parsed[LABELS.index("hair"), :4] = 255  # a part of a person above, nothing it knows below
    parsed[-1, 4:] = 255
    found = matte.parsed_labels(parsed, own)
    assert (found.astype(int).sum(0) == 255).all()
    assert np.abs(found[-1].astype(int) - own[-1]).max() <= 5
    hair = found[LABELS.index("hair"), :4].astype(int)
    assert (hair >= 0.97 * (255 - own[-1, :4].astype(int)) - 5).all()
    assert np.abs(found[:, 4:].astype(int) - own[:, 4:]).max() <= 5


@pytest.mark.parametrize("name", ["fan2d", "fan3d"])
def test_landmarks_move_with_the_picture(bring: Bring, name: str) -> None:
    bring(name)
    place = backends.landmarks_of(name)
    picture = _picture()
    with face.FaceMesh() as find:
        mesh = find(picture)
    assert mesh is not None
    found = place(picture, mesh)
    assert found.shape == (68, 2) and np.isfinite(found).all()
    by = np.array([12, 7], np.float32)
    shifted = np.roll(picture, by.astype(int)[::-1], (0, 1))
    moved = mesh + np.append(by, 0).astype(np.float32)
    assert np.abs(place(shifted, moved) - found - by).max() < 1.5  # a pixel of its crop


def test_the_task_mesh_follows_a_face_through_pictures(bring: Bring) -> None:
    """The wheel's model orders its output in another way than the task's: that faces are found and
    lost, and how many points there are, is all that a bundle of it can say."""
    bring("face-landmarker")
    picture = _picture()
    with backends.mesh_of("face-landmarker") as mesh:
        found, lost = mesh(picture), mesh(np.zeros_like(picture))
    assert found is not None and found.shape == (face.N_MESH, 3) and lost is None


def test_points_of_either_mesh_are_brought_to_pixels() -> None:
    class Point:
        x, y, z = 0.5, 0.25, -0.1

    assert face._in_pixels([Point()], _picture()[:128]).tolist() == [
        [128, 32, pytest.approx(-25.6)]
    ]


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("retinaface", backends.detector_of),
        ("bisenet", backends.parser_of),
        ("fan2d", backends.landmarks_of),
        ("fan3d", backends.landmarks_of),
        ("lpips", lambda _: loss_networks.lpips()),
    ],
)
def test_a_file_of_another_shape_is_refused_by_name(
    bring: Bring, name: str, build: Callable[[str], Any]
) -> None:
    state = _random(name)
    key = next(k for k, v in state.items() if v.ndim == 4)
    state[key] = state[key][:1]
    path = bring(name, state)
    with pytest.raises(TalkheadError, match=path.name):
        build(name)
    path.write_bytes(b"no archive")
    with pytest.raises(TalkheadError, match=path.name):
        build(name)


def test_a_bundle_that_is_none_is_refused_by_name(bring: Bring) -> None:
    bring("face-landmarker").write_bytes(b"no bundle")
    with pytest.raises(TalkheadError, match="face_landmarker.task is no face landmarker"):
        backends.mesh_of("face-landmarker")


def test_a_file_with_another_hash_is_refused_at_work(
    bring: Bring, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring("bisenet")
    known = replace(weights.KNOWN["bisenet"], sha256="0" * 64)
    monkeypatch.setitem(weights.KNOWN, "bisenet", known)
    with pytest.raises(TalkheadError, match="is not bisenet"):
        backends.parser_of("bisenet")


def test_lpips_is_a_distance_that_training_can_follow(bring: Bring) -> None:
    bring("lpips")
    distance = loss_networks.lpips()
    picture = torch.from_numpy(_picture(96)).float()[None] / 255
    noisy = (picture + 0.1 * torch.randn_like(picture)).clamp(0, 1).requires_grad_()
    far = distance(noisy, picture)
    assert far.shape == (1,) and float(far.detach()) > 1e-6
    assert float(distance(picture, picture)) == pytest.approx(0, abs=1e-7)
    far.sum().backward()  # type: ignore[no-untyped-call]
    assert noisy.grad is not None and noisy.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())
    assert distance(picture[:, :24, :24], noisy[:, :24, :24]).shape == (1,)  # small patches too


def test_a_film_is_tracked_by_what_is_named(
    bring: Bring, speaker_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed labels; then placed landmarks, which are lifted as the mesh's are."""
    bring("bisenet")
    part: dict[str, Any] = {"start_s": 0.0, "end_s": 3.0}
    told = SilentProgress()
    space = preprocess(speaker_clip, tmp_path, told, name="parsed", **part)
    slow = [note for note in told.notes if "labels by bisenet" in note]
    assert len(slow) == (0 if torch.cuda.is_available() else 1)
    assert space.manifest()["backends"]["labels"] == "bisenet"
    assert (space.labels(40).astype(int).sum(0) == 255).all()
    assert space.load("tracks")["found"].mean() > 0.95

    default = ["labels=colour+motion"]
    plain = preprocess(speaker_clip, tmp_path, SilentProgress(), name="p", wanted=default, **part)
    bring("fan2d")
    monkeypatch.setattr(
        backends, "landmarks_of", lambda _: lambda rgb, mesh: face.to_68(mesh)[:, :2]
    )
    placed = preprocess(
        speaker_clip,
        tmp_path,
        SilentProgress(),
        name="q",
        wanted=[*default, "landmarks=fan2d"],
        **part,
    )
    tracks: dict[str, np.ndarray] = {}
    for made in (plain, placed):
        tracks[made.id] = Workspace.open(tmp_path, made.id).load("tracks")["landmarks"]
    assert np.abs(tracks["p"] - tracks["q"]).max() < 1e-4
    assert placed.manifest()["backends"]["landmarks"] == "fan2d"


def test_tracking_by_the_defaults_is_spared_torch() -> None:
    """It takes three seconds to load, and more memory than the tracking itself."""
    words = "import sys, talkhead_cli.jobs.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], timeout=60).returncode == 0

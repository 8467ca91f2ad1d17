"""Synthetic training clips: each person's avatar, driven by another person's tracked motion.

An avatar is driven by the other's mouth, eyes and head and gets the other's sound, so that lips and
sound belong together as they do in the other's clip.  Films and avatars are kept: the same command
resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from talkhead_cli import media
from talkhead_cli.avatars.lokitalk import LokiTalk
from talkhead_cli.blocks.mouth import Mouth
from talkhead_cli.contracts import SAMPLES_PER_FRAME, Signals, SilentProgress, TalkheadError
from talkhead_cli.jobs import footage
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.footage import head_camera
from talkhead_cli.jobs.player import Player, eight_bits, still_signals
from talkhead_cli.jobs.preprocess import preprocess
from talkhead_cli.store import Workspace

PRESETS = ["lokitalk", "tiny"]
SCALE = 0.3  # of an avatar's training steps
RELATIVE = ("pose", "body", "gaze", "brow")  # transferred relative to own mean and deviation


def cast(home: Path, people: Sequence[str], work: Path) -> list[str]:
    """Make workspaces in which each person moves like the next one; return their names.  Films in
    which no face can be tracked are left out."""
    films = work / "acted"
    films.mkdir(exist_ok=True)
    pairs = list(zip(people, [*people[1:], people[0]], strict=True))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        made = list(pool.map(partial(_acted, home, films), pairs))
    return [name for name in made if name is not None]


def _acted(home: Path, films: Path, pair: tuple[str, str]) -> str | None:
    torch.set_num_threads(1)
    face, act = pair
    name = f"{face}-as-{act}"
    if (home / name / "manifest.json").exists():
        return name
    run = finetune(
        home,
        face,
        SilentProgress(),
        preset_names=PRESETS,
        prior="none",
        device="cpu",
        run_name="acts",
        settings=[f"train.scale={SCALE}", "data.holdout=0"],
    )
    player = Player.load(run, torch.device("cpu"))
    assert isinstance(player.avatar, LokiTalk)
    spaces = [Workspace.open(home, who) for who in pair]
    own, other = (footage.load(s, player.preset.data, SilentProgress()) for s in spaces)
    k = torch.from_numpy(spaces[0].load("tracks")["k"])
    first, last = int(other.train[0]), int(other.train[-1]) + 1
    signals = moved_as(player.avatar, own.signals[own.train], other.signals, k)[slice(first, last)]
    sound = media.read_wav(spaces[1].audio)[first * SAMPLES_PER_FRAME : last * SAMPLES_PER_FRAME]
    film, wav = films / f"{name}.mp4", films / f"{name}.wav"
    media.write_wav(wav, sound)
    with media.VideoWriter(film, (own.size_px,) * 2, audio=wav, crf=8) as out:
        for frame, _ in player.pictures(signals):
            out.write(eight_bits(frame))
    try:
        preprocess(film, home, SilentProgress(), name=name, offset="none")
    except TalkheadError as error:
        print(f"{name}: {error}")
        return None
    return name


def moved_as(avatar: LokiTalk, own: Signals, other: Signals, k: Tensor) -> Signals:
    """Return signals of the avatar's person, with rows `own`, moving as `other` in every row.

    k (3, 3): the person's intrinsics.  Pose, shoulders, gaze and brows keep their distance from the
    mean in units of each person's own standard deviation (up to 2.5); mouths do so per shape; eye
    openness is copied.
    """
    told = {name: _as_own(getattr(other, name), getattr(own, name)) for name in RELATIVE}
    mouth, theirs = avatar.person(own).mouth, Mouth()
    theirs.measure(other, mouth.basis)
    camera = head_camera(told["pose"], k, own.camera.size_px)
    still = still_signals(other.audio, other.moment, camera, eye=other.eye, **told)
    return still.with_(landmarks=mouth.landmarks(theirs.code(other)))


def _as_own(theirs: Tensor, own: Tensor) -> Tensor:
    away = (theirs - theirs.mean(0)) / theirs.std(0).clamp_min(1e-4)
    return own.mean(0) + away.clamp(-2.5, 2.5) * own.std(0)

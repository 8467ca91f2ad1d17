"""The pipeline as Python calls: track a video, train an avatar, render new speech, score it.

    python examples/quickstart.py [FOLDER]

runs it on a synthetic speaker, a few minutes on two cores; FOLDER defaults to build/quickstart.
For your own video call `pipeline`; as on the command line, interrupted jobs resume.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import formant_voice
import synthetic_speaker

from talkhead_cli.cli.console import speaking
from talkhead_cli.contracts import Progress
from talkhead_cli.jobs.evaluate import evaluate
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.preprocess import preprocess
from talkhead_cli.jobs.render import render
from talkhead_cli.media import write_wav


def pipeline(
    video: Path, speech: Path, folder: Path, progress: Progress, **training: Any
) -> tuple[Path, dict[str, Any]]:
    """Return the film of the person in `video` saying `speech`, and the held-out figures;
    `training` are options of `finetune`."""
    home = folder / "avatars"
    person = preprocess(video, home, progress)
    finetune(home, person.id, progress, **training)
    film, *_ = render(home, person.id, speech, progress, out=folder / f"{person.id}-says.mp4")
    figures, _ = evaluate(home, person.id, progress)
    return film, figures


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/quickstart")
    folder.mkdir(parents=True, exist_ok=True)
    video, speech = folder / "speaker.mp4", folder / "speech.wav"
    with speaking(verbose=False) as progress:  # reports to stderr
        synthetic_speaker.film(video, seconds=20)
        write_wav(speech, formant_voice.speak(8, seed=1000).sound)
        quick = {"preset_names": ["lokitalk", "tiny"], "settings": ["train.scale=0.4"]}
        made, figures = pipeline(video, speech, folder, progress, **quick)
    print(f"{made}: {figures['picture']['face_box']['psnr_db']:.1f} dB in the held-out face")

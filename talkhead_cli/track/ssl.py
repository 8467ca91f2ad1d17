"""Self-supervised speech features: HuBERT and wav2vec 2.0 base, through torchaudio.

768 features every 20 ms, interpolated linearly to the 10 ms clock of voice.py.  Sound is
processed in blocks at fixed positions with a margin on either side, so that rows of a part
equal those of the whole and memory does not grow with length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from talkhead_cli.contracts import TalkheadError
from talkhead_cli.track.voice import HOP, RATE_HZ

BLOCK_ROWS = 800  # 8 s
MARGIN_ROWS = 100  # 1 s either side
STRIDE = 320  # samples between the model's frames; its first is centred on sample 200
FIRST = 200


class SslVoice:
    """Speech features of a pretrained encoder's last layer. Same interface as MelVoice."""

    n_features = 768
    rate_hz = RATE_HZ

    def __init__(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """name: hubert or wav2vec2 · state: torchaudio's state dict of that base model."""
        from torchaudio import models

        self.name = name
        build = {"hubert": models.hubert_base, "wav2vec2": models.wav2vec2_base}[name]
        self._model = build()
        try:
            # the fine-tuned file also holds the character output layer, which is not used
            state = {k: v for k, v in state.items() if not k.startswith("aux.")}
            self._model.load_state_dict(state)
        except RuntimeError as error:
            raise TalkheadError(
                f"the file of {name} does not hold its weights as torchaudio lays them out; "
                "fetch the file again"
            ) from error
        self._model.eval()

    @torch.no_grad()
    def features(
        self,
        samples: NDArray[Any],
        n_rows: int | None = None,
        *,
        first: int = 0,
        scale: float = 1.0,
    ) -> NDArray[np.float32]:
        """Return features (n_rows, 768) from row `first` on of mono 16 kHz samples (N,)."""
        n_rows = len(samples) // HOP - first if n_rows is None else n_rows
        out = []
        for block in range(first // BLOCK_ROWS, -(-(first + n_rows) // BLOCK_ROWS)):
            low = max(first, block * BLOCK_ROWS)
            high = min(first + n_rows, (block + 1) * BLOCK_ROWS)
            out.append(self._hear(samples, block, scale)[low % BLOCK_ROWS :][: high - low])
        return np.concatenate(out) if out else np.zeros((0, self.n_features), np.float32)

    def _hear(self, samples: NDArray[Any], block: int, scale: float) -> NDArray[np.float32]:
        begin = (block * BLOCK_ROWS - MARGIN_ROWS) * HOP
        end = ((block + 1) * BLOCK_ROWS + MARGIN_ROWS) * HOP
        piece = np.asarray(samples[max(0, begin) : max(0, end)], np.float32) * scale
        piece = np.pad(piece, (max(0, -begin), 0))
        piece = np.pad(piece, (0, end - begin - len(piece)))
        layers, _ = self._model.extract_features(torch.from_numpy(piece)[None])
        heard = layers[-1][0].numpy()
        at = (np.arange(BLOCK_ROWS) + MARGIN_ROWS) * HOP
        place = (at - FIRST) / STRIDE
        low = np.floor(place).astype(int).clip(0, len(heard) - 2)
        share = (place - low)[:, None]
        return (heard[low] * (1 - share) + heard[low + 1] * share).astype(np.float32)

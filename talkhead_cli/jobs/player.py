"""A finished run, loaded for rendering."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkhead_cli import march
from talkhead_cli.avatars.base import Speaker
from talkhead_cli.blocks.regions import lively_boxes
from talkhead_cli.contracts import (
    Camera,
    Frame,
    Signals,
    TalkheadError,
    repacked,
    unpacked,
)
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs import views
from talkhead_cli.jobs.footage import SpeechStats, read_plate
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.jobs.runs import build_avatar, enrolled, speech_shape_of
from talkhead_cli.store import Run
from talkhead_cli.store.checkpoint import CURE

T = TypeVar("T")
CLOSER = 2  # factor on the samples per ray, for views and poses that were not trained on
PIXELS_AT_ONCE, MAX_ROWS = 2 * 512**2, 8  # limits of one march on a GPU; some 3 GB
MAX_RECORDINGS = 2  # CUDA graphs of a march; each keeps its intermediate tensors
# Half precision where it is faster: on a GPU's tensor cores.  On a CPU the casts cost more.
HALF = {"cuda": torch.float16}
DRIVEN = ("pose", "body", "eye", "gaze", "brow")  # signals that a new film takes from the footage


@dataclass
class Player:
    """A run's person and marcher, with weights loaded and gradients off."""

    run: Run
    preset: Preset
    avatar: Speaker
    marcher: march.Marcher
    plate: Tensor
    device: torch.device
    note: str  # which marcher, and why
    trained: Tensor | None = None  # poses (M, 10) that it was trained on, if the run says so
    records: bool = True  # replay CUDA graphs where rendering has no host syncs
    _recorded: dict[Any, march.Replay[tuple[Frame, Any]]] = field(default_factory=dict)
    _stream: torch.cuda.Stream | None = None  # that a GPU renders on; kept to reuse its memory

    @classmethod
    def load(cls, run: Run, device: torch.device) -> Player:
        """Rebuild a run's avatar from its own files; weights are loaded strictly."""
        text = run.preset_text()
        if text is None:
            raise TalkheadError(f"run '{run.name}' has no preset.yaml; run finetune again")
        preset = presets.from_yaml(text)
        tensors = run.weights()
        aabb = tensors["avatar.aabb"]
        avatar, marcher, why = build_avatar(preset, speech_shape_of(run), aabb.to(device), device)
        for prefix, module in (("avatar.", avatar), ("marcher.", marcher)):
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            try:
                module.load_state_dict(own, strict=True)
            except RuntimeError as error:
                raise TalkheadError(
                    f"run '{run.name}' was made by another version of talkhead "
                    f"({run.meta().get('version')}); train it again with finetune --fresh"
                ) from error
            module.eval()
        plate = read_plate(run.plate_file, preset.data.size_px, cure=CURE)
        speaker = enrolled(avatar, run, device)
        if speaker.neutral is not None:
            marcher.look_closely(lively_boxes(speaker.neutral), preset.march.n_close)
        return cls(run, preset, speaker, marcher, plate, device, why, _trained_poses(run))

    def pictures(
        self, signals: Signals, plate: Tensor | None = None
    ) -> Iterator[tuple[Frame, int]]:
        """Yield a frame (B = 1) and its number of field points per row of `listen`'s output."""
        background = (self.plate if plate is None else plate).reshape(-1, 3).to(self.device)
        n = self.rows_at_once(signals.camera.size_px // self.avatar.magnification)
        n_batches = -(-len(signals) // n)
        signals = signals.to(self.device)  # at once: a copy per batch would wait for the rendering

        def batch(index: int) -> tuple[Frame, Any]:
            rows = signals[slice(index * n, (index + 1) * n)]
            if self.records and self._renders_without_sync and len(rows) == n:
                return self._replayed(rows, background)
            return self._drawn(rows, background)

        for frames, n_points in self._batches(batch, n_batches):
            each = int(n_points) // len(frames.rgb)
            for index in range(len(frames.rgb)):
                yield frames[index], each

    def _batches(
        self, batch: Callable[[int], tuple[Frame, Any]], n: int
    ) -> Iterator[tuple[Frame, Any]]:
        """Yield batch(0) ... batch(n - 1): in parallel on a CPU's cores, one ahead on a GPU."""
        if self.device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(self.device)
            yield from _one_ahead(batch, n, self._stream)
        elif torch.get_num_threads() == 1:
            yield from map(batch, range(n))
        else:
            yield from _side_by_side(batch, n, torch.get_num_threads())

    def rows_at_once(self, size_px: int) -> int:
        """Return how many frames of that side march together; one on a CPU, one frame per core."""
        if self.device.type == "cpu":
            return 1
        return min(MAX_ROWS, max(1, PIXELS_AT_ONCE // size_px**2))

    @property
    def _renders_without_sync(self) -> bool:
        """Whether a picture is rendered without host syncs."""
        return self.avatar.has_kernel and not self.marcher.waits

    def _replayed(self, signals: Signals, background: Tensor) -> tuple[Frame, Any]:
        """Render all rows by replaying a recorded march: the CPU takes longer to launch a picture's
        thousand small operations than the GPU to run them."""
        key = len(signals), signals.camera.size_px, *self.marcher.sampling
        if key not in self._recorded:
            if len(self._recorded) == MAX_RECORDINGS:
                del self._recorded[next(iter(self._recorded))]
            # a copy: the recording would keep the whole film that rows are a view of
            like = repacked(signals, (t.clone() for t in unpacked(signals)))

            def draw(behind: Tensor, *tensors: Tensor) -> tuple[Frame, Any]:
                return self._drawn(repacked(like, iter(tensors)), behind)

            self._recorded[key] = march.Replay(draw, self.device)
        try:
            frames, n_points = self._recorded[key](background, *unpacked(signals))
        except march.CannotRecordError as error:
            warnings.warn(
                f"pictures cannot be recorded ({error}); the GPU waits for the CPU to start their "
                "operations one by one, which takes several times as long",
                stacklevel=2,
            )
            self.records = False
            return self._drawn(signals, background)
        mine = repacked(frames, (t.clone() for t in unpacked(frames)))
        return mine, torch.as_tensor(n_points, device=self.device).clone()

    @torch.no_grad()
    def _drawn(self, signals: Signals, background: Tensor) -> tuple[Frame, Any]:
        """Render all rows in one march."""
        rows = torch.arange(len(signals), device=self.device)
        camera = signals.camera.smaller(self.avatar.magnification)
        rays = march.picture_rays(camera, rows, self.avatar.aabb)
        kind = self.device.type
        with torch.autocast(kind, HALF.get(kind), enabled=kind in HALF):
            rays = self.avatar.aim(signals, rays)
            asked = self.avatar.condition(signals)
            rendered = self._marcher_for(signals).march(asked, rays)
            behind = background.repeat(len(rows), 1)
            frames = self.avatar.compose(rendered, rays, signals, behind)
        return frames, rendered.n_points

    def _marcher_for(self, signals: Signals) -> march.Marcher:
        """Return the marcher, with more samples for rows in poses unlike those trained on.  On a
        GPU, marches are recorded with one number of samples, and to look at poses would wait."""
        on_gpu, known = self.device.type == "cuda", self.trained
        if on_gpu or known is None or not views.are_rare(views.poses_of(signals), known):
            return self.marcher
        return self.marcher.finer(CLOSER * self.preset.march.n_samples)

    def open_views(self, signals: Signals) -> None:
        """Show the marcher poses and views that the footage does not contain."""
        views.open_views(self.avatar, self.marcher, signals, self.device)
        # From new views the guiding grid is coarser than a surface: few samples give speckle.
        self.marcher.sample_more(CLOSER * self.preset.march.n_samples)

    def listen_to_rows(self, signals: Signals, rows: Tensor) -> Signals:
        """Return rows (n,) of a film's signals after `listen` on the stretch that they span."""
        first = max(0, int(rows.min()) - self.avatar.past)
        return self.listen(signals[first : int(rows.max()) + 1])[rows - first]

    def listen(self, signals: Signals) -> Signals:
        """Return consecutive rows with landmarks predicted from speech; the first `avatar.past` of
        them lack their full context."""
        with torch.no_grad():
            return self.avatar.listen(signals.to(self.device)).to("cpu")

    def at_rest(self, signals: Signals) -> Signals:
        """Return rows after `listen` with mouths of somebody who is silent."""
        with torch.no_grad():
            return self.avatar.at_rest(signals.to(self.device)).to("cpu")

    @property
    def stats(self) -> SpeechStats:
        return SpeechStats.stored(self.run.drive())


def _trained_poses(run: Run) -> Tensor | None:
    drive = run.drive()
    if "trained" not in drive or not drive["trained"].any():
        return None
    rows = np.concatenate([drive["pose"], drive["body"]], 1)[drive["trained"]]
    return torch.from_numpy(rows).float()


def _side_by_side(work: Callable[[int], T], n: int, n_threads: int) -> Iterator[T]:
    """Yield work(0) ... work(n - 1) in order, `n_threads` at a time, few ahead of the reader.

    Frames are independent: with one frame per core no core waits, whereas torch's own threads
    synchronise at the end of each of a frame's thousand small operations.
    """
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead: deque[Future[T]] = deque()
        for index in range(n):
            ahead.append(pool.submit(work, index))
            if len(ahead) > n_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _one_ahead(
    work: Callable[[int], tuple[Frame, Any]], n: int, stream: torch.cuda.Stream
) -> Iterator[tuple[Frame, Any]]:
    """Yield work(0) ... work(n - 1) in order; each is launched on the stream before the previous
    one is yielded, so that the GPU renders while the reader copies and encodes."""
    reader = torch.cuda.current_stream(stream.device)
    stream.wait_stream(reader)
    ahead: deque[tuple[tuple[Frame, Any], torch.cuda.Event]] = deque()

    def handed_out() -> tuple[Frame, Any]:
        (frames, n_points), done = ahead.popleft()
        reader.wait_event(done)
        for tensor in (*unpacked(frames), *unpacked(n_points)):
            tensor.record_stream(reader)
        return frames, n_points

    try:
        for index in range(n):
            with torch.cuda.stream(stream):
                ahead.append((work(index), stream.record_event()))
            if len(ahead) > 1:
                yield handed_out()
        while ahead:
            yield handed_out()
    finally:  # tensors that the work reads may be freed from here on
        reader.wait_stream(stream)


def eight_bits(frame: Frame, alpha: bool = False) -> NDArray[np.uint8]:
    """Return one picture for a film: (H, W, 3) or, with straight alpha, (H, W, 4) uint8."""
    rgb = frame.rgb.float()
    if alpha:
        opacity = frame.alpha.float()
        rgb = torch.cat([rgb / opacity.clamp_min(1e-3), opacity], -1)
    return to_bytes(rgb)


def to_bytes(picture: Tensor) -> NDArray[np.uint8]:
    """Convert a picture (1, H, W, C) in [0, 1] to (H, W, C) uint8."""
    return (picture[0].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def still_signals(audio: Tensor, moment: Tensor, camera: Camera, **given: Tensor) -> Signals:
    """Build signals for new speech: audio (T, W, A), moment (T,), camera (T), DRIVEN by name."""
    n = len(audio)
    return Signals(
        audio=audio,
        landmarks=torch.zeros(n, 68, 3),
        landmarks_2d=torch.zeros(n, 68, 2),
        camera=camera,
        person=torch.zeros(n, dtype=torch.long),
        moment=moment,
        **{name: given[name] for name in DRIVEN},
    )

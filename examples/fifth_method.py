"""A method of your own: a canonical head that one small network deforms into every frame's shape.

    x' = x + MLP(frequencies(x), cond)         a point of a frame -> its place in the canonical head
    density, colour = MLP(planes(x'), cond)    cond: mouth and eye codes of the frame, near each

`python examples/fifth_method.py` is the command `talkhead` with this method added; its preset is
fifth_method.yaml, which shows how to use it."""

import torch
from torch import Tensor, nn

from talkhead_cli.avatars import register
from talkhead_cli.avatars.base import PictureResult, distance, shaped
from talkhead_cli.avatars.personal import N_EYES, Person, PersonalAvatar, eyes_told, noisy
from talkhead_cli.blocks.loss import SOLID, solid_losses
from talkhead_cli.blocks.mlp import Mlp, density_of
from talkhead_cli.blocks.mouth import N_CODES
from talkhead_cli.blocks.planes import TriPlanes, frequencies, warped
from talkhead_cli.blocks.rigid import below_chin, moved
from talkhead_cli.blocks.speech import SpeechEncoder
from talkhead_cli.cli.app import main
from talkhead_cli.contracts import Frame, RayBundle, Rendered, Signals


class Fifth(PersonalAvatar):  # brings the speech encoder and mouth landmarks
    loss_names = SOLID | {"speech", "colour", "relief", "rough"}  # that a stage may weight

    def __init__(self, size: str, *, n_steps: int, n_features: int, px: int, n_people: int) -> None:
        ear = SpeechEncoder.of_windows(n_steps, n_features, N_CODES)
        super().__init__([Person() for _ in range(n_people)], ear)
        self.planes = TriPlanes((24, 48, 96, 192), {"tiny": 4, "small": 8, "full": 16}[size])
        self.pull = Mlp(3 * (1 + 2 * 4) + N_CODES + N_EYES, 48, 3, 3, last_scale=0.01)
        self.head = Mlp(self.planes.n_out + N_CODES + N_EYES, 48, 1 + 3)

    def modules_of_parts(self) -> dict[str, list[nn.Module]]:  # names for a stage's `learn`
        return super().modules_of_parts() | {"rest": [self.planes, self.head], "pull": [self.pull]}

    def condition(self, signals: Signals) -> "Field":  # once per T frames, before any ray
        mouth, shoulders = self.person(signals).mouth, self.shoulders(signals)
        noise = self.noise * self.training  # without noise it overfits
        code, eyes = noisy(mouth.code(signals), noise / 4), noisy(eyes_told(signals), noise / 20)
        return Field(self, mouth.neutral, code.clamp(-4, 4), eyes, shoulders)

    def compose(self, marched: Rendered, rays: RayBundle, signals: Signals, plate: Tensor) -> Frame:
        rgb = shaped(marched.feature + (1 - marched.opacity) * plate, rays)
        return Frame(rgb, shaped(marched.opacity, rays), distance(marched, rays), parts={})

    def picture_losses(self, result: PictureResult) -> dict[str, Tensor]:
        truth, marched, face = result.truth, result.rendered, result.truth.labels[:, :1]
        person = 1 - truth.labels[:, 5:]  # everything but background
        relief = self.person(result.signals).relief.loss(marched, result.rays, person[:, 0])
        colour = (result.frame.rgb.reshape(-1, 3) - truth.colour).square().mean()
        losses = {"colour": colour, "relief": relief, "rough": self.planes.roughness()}
        return losses | solid_losses(marched, person, face)


class Field:  # evaluated at points x (N, 3) of frames row (N,), seen along d
    channels, n_detached = 3, 0

    def __init__(self, avatar: Fifth, marks: Tensor, *rows: Tensor) -> None:
        self.avatar, self.aabb, self.n_rows, self.rows = avatar, avatar.aabb, len(rows[0]), rows
        self.chin, self.mouth, self.eyes = marks[8, 1], marks[48:68].mean(0), marks[36:48].mean(0)

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        return self(x, x, row)[0]

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        (code, eyes, shoulders), reach = self.rows, torch.maximum(-self.aabb[:3], self.aabb[3:])
        near = [(-10 * (x - at).square().sum(1, True)).exp() for at in (self.mouth, self.eyes)]
        cond = torch.cat([near[0] * code[row], near[1] * eyes[row]], 1)
        pull = 0.15 * self.avatar.pull(torch.cat([frequencies(x / reach, 4), cond], 1)).tanh()
        x = torch.lerp(x + pull, moved(x, shoulders, row), below_chin(x[:, 1:2], self.chin))
        found = self.avatar.head(torch.cat([self.avatar.planes(warped(x, reach)), cond], 1))
        return density_of(found[:, 0]), found[:, 1:].sigmoid()


register("fifth", Fifth)
if __name__ == "__main__":
    main()

"""Small multi-layer perceptrons."""

from __future__ import annotations

from torch import Tensor, nn

THIN = 1.5  # an output of 0 means density exp(-THIN): space is nearly empty before training


def density_of(raw: Tensor) -> Tensor:
    """Raw network output (N,) -> density per face height; bounded, because float16 overflows at
    65504."""
    return (raw.float() - THIN).clamp(max=7.0).exp()


def raw_density_of(density: Tensor) -> Tensor:
    """The inverse of `density_of`."""
    return (density + 1e-6).log() + THIN


class Mlp(nn.Sequential):
    """Linear layers with ReLU between; `last_scale` shrinks the last layer's initial weights."""

    def __init__(
        self, n_in: int, width: int, n_out: int, n_layers: int = 2, *, last_scale: float = 1.0
    ) -> None:
        layers: list[nn.Module] = []
        for index in range(n_layers):
            first, last = index == 0, index == n_layers - 1
            layers.append(nn.Linear(n_in if first else width, n_out if last else width))
            if not last:
                layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)
        final = layers[-1]
        assert isinstance(final, nn.Linear)
        final.weight.data.mul_(last_scale)
        nn.init.zeros_(final.bias)

    def forward(
        self,
        x: Tensor,
        driven: tuple[Tensor, Tensor] | None = None,
        *,
        told: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x (N, n_in) -> (N, n_out).

        driven: (N, K) and (K, width), an extra input and its weights into the first layer ·
        told: (M, width) and (M,), added to the first layer's output at these indices only
        """
        first, *rest = self
        x = first(x)
        if driven is not None:  # in place: autocast does not cast its arguments
            x = x.addmm_(*(factor.to(x.dtype) for factor in driven))
        if told is not None:
            x = x.index_add_(0, told[1], told[0].to(x.dtype))
        for layer in rest:
            x = layer(x)
        return x


def by_row(weight: Tensor, row: Tensor, n_rows: int) -> Tensor:
    """Scatter weights (N, K) into the column block of each point's row (N,): (N, n_rows K).

    Multiplied by codes (n_rows K, C) it gives the weighted sum of each point's own codes, without
    a copy of the codes for every point.
    """
    if n_rows == 1:
        return weight
    n, k = weight.shape
    place = row[:, None, None].expand(n, 1, k)
    return weight.new_zeros(n, n_rows, k).scatter(1, place, weight[:, None]).view(n, n_rows * k)

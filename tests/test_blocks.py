"""Blocks: planes, encodings, speech maps, losses."""

from __future__ import annotations

import math

import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from talkhead_cli.blocks.loss import gradient_difference, ssim
from talkhead_cli.blocks.mlp import Mlp
from talkhead_cli.blocks.planes import TriPlanes, frequencies
from talkhead_cli.blocks.speech import SpeechEncoder, ridge_by_blocks, ridge_map


def test_planes_are_bilinear_and_keep_their_axes() -> None:
    planes = TriPlanes((5,), 1)
    ramp = torch.linspace(-0.8, 0.8, 5)  # texel centres of five texels in [-1, 1]
    with torch.no_grad():
        for index in range(3):  # first named axis runs along the columns
            planes.levels[0][index, 0] = ramp.expand(5, 5)
    x = torch.tensor([[0.3, -0.5, 0.7], [0.0, 0.1, -0.2]])
    assert torch.allclose(planes(x), x[:, [0, 0, 1]], atol=1e-6)
    assert torch.allclose(planes(torch.tensor([[9.0, 0, 0]]))[:, 0], ramp[-1:])


def test_planes_roughness_is_zero_only_when_flat() -> None:
    planes = TriPlanes((4, 8), 2, spread=0.1)
    assert planes.roughness() > 0
    with torch.no_grad():
        for level in planes.levels:
            level.fill_(0.3)
    assert planes.roughness() == 0


def test_frequencies_keep_the_input_and_have_the_octaves() -> None:
    x = torch.tensor([[0.25, -0.5]])
    encoded = frequencies(x, 3)
    assert encoded.shape == (1, 2 * (1 + 2 * 3))
    assert torch.equal(encoded[:, :2], x)
    wanted = [math.sin(math.pi * 2**k * 0.25) for k in range(3)]
    assert torch.allclose(encoded[0, 2:5], torch.tensor(wanted), atol=1e-6)


def test_small_last_layer_starts_near_zero() -> None:
    x = torch.randn(64, 8)
    assert Mlp(8, 32, 3, 3, last_scale=0.01)(x).abs().mean() < 0.02


def test_ridge_finds_a_linear_map_and_shrinks() -> None:
    x, truth = torch.randn(200, 12), torch.randn(12, 3)
    y = x @ truth + 0.7
    weight, bias = ridge_map(x, y, 1e-6)
    assert torch.allclose(weight, truth, atol=1e-3) and torch.allclose(bias, torch.full((3,), 0.7),
                                                                       atol=1e-3)  # fmt: skip
    shrunk, _ = ridge_map(x, y, 1e4)
    assert shrunk.norm() < 0.2 * truth.norm()


def test_block_validation_prefers_shrinking_when_there_is_nothing_to_learn() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(150, 80), torch.randn(150, 1)
    strong, guess = ridge_by_blocks(x, noise, (1e-2, 1e5))
    assert strong == 1e5 and guess.shape == noise.shape
    weak, guess = ridge_by_blocks(x, x[:, :1] * 2, (1e-2, 1e5))
    assert weak == 1e-2 and torch.corrcoef(torch.cat([guess, x[:, :1]], 1).T)[0, 1] > 0.99


def test_speech_encoder_is_quiet_in_eval_and_noisy_in_training() -> None:
    torch.manual_seed(0)
    encoder = SpeechEncoder(33, 10, 4)
    audio = torch.randn(6, 33, 10)
    encoder.eval()
    assert torch.equal(encoder(audio), encoder(audio)) and encoder(audio).shape == (6, 4)
    encoder.train()
    assert not torch.equal(encoder.votes(audio), encoder.votes(audio))
    code = torch.randn(6, 4)
    encoder.solve(audio, code, 1e-3)
    assert torch.allclose(encoder.linear(audio.flatten(1)), code, atol=1e-2)


def test_ssim_is_one_for_equals_and_falls_with_noise() -> None:
    torch.manual_seed(0)
    a = torch.rand(2, 24, 24, 3)
    assert torch.allclose(ssim(a, a), torch.ones(2), atol=1e-5)
    noisy = (a + 0.2 * torch.randn_like(a)).clamp(0, 1)
    reference = structural_similarity_index_measure(
        a.permute(0, 3, 1, 2), noisy.permute(0, 3, 1, 2), data_range=1.0, gaussian_kernel=False,
        kernel_size=7,
    )  # fmt: skip
    assert abs(float(ssim(a, noisy).mean()) - float(reference)) < 0.03


def test_gradient_difference_ignores_brightness() -> None:
    a = torch.rand(1, 8, 8, 3)
    assert gradient_difference(a, a + 0.1) < 1e-6
    assert gradient_difference(a, a.flip(1)) > 0.1

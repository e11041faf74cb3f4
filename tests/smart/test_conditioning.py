"""FiLM layers, switched norms and noise, against what they are defined to compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smart.conditioning import (
    Film,
    FilmNorm,
    LambdaCode,
    NoisyConv2d,
    NoisySmartConv2d,
    SwitchedBatchNorm2d,
    with_noise,
)
from smart.lambdas import LAMBDAS, Lambdas
from smart.layers import SmartConv2d
from smart_kernels import paths


def test_codes_are_orthogonal_and_mixed_between_neighbours():
    torch.manual_seed(0)
    code = LambdaCode()
    rows = code(torch.tensor(LAMBDAS))
    assert torch.equal(rows, code.codes)
    assert torch.allclose(rows @ rows.T, torch.eye(6), atol=1e-5)
    assert torch.allclose(code(torch.tensor([0.15, 0.7])), (rows[[1, 4]] + rows[[2, 5]]) / 2, atol=1e-6)
    for at in (*LAMBDAS, 0.05, 0.15, 0.7):
        assert torch.allclose(code(at), code(torch.tensor([at])), atol=1e-6)
    assert all(torch.equal(code(at)[0], row) for at, row in zip(LAMBDAS, rows, strict=True))


def test_film_scales_and_shifts_channels_by_lambda():
    torch.manual_seed(0)
    film, x = Film(3, LambdaCode()), torch.randn(2, 3, 4, 4)
    first, second = film.mlp[0], film.mlp[2]
    for row, path in ((0, "clean"), (2, 0.2), (5, "adv")):
        hidden = first.weight @ film.code.codes[row] + first.bias
        out = second.weight @ torch.where(hidden > 0, hidden, 0.01 * hidden) + second.bias
        out = torch.where(out > 0, out, 0.01 * out)
        with paths.running(path):
            assert torch.allclose(film(x), x * out[:3, None, None] + out[3:, None, None], atol=1e-6)


def test_a_batch_of_lambdas_is_what_each_image_is_by_itself():
    torch.manual_seed(0)
    norm, x = FilmNorm(nn.BatchNorm2d(3), LambdaCode()).eval(), torch.randn(4, 3, 4, 4)
    for each in norm.norm.norms.values():
        each.running_mean.normal_()
    alone = []
    for image, at in zip(x, ("clean", "clean", 0.1, "adv"), strict=True):
        with paths.running(at):
            alone.append(norm(image[None]))
    with paths.running(Lambdas(torch.tensor([0, 0, 0.1, 1.0]), 2)):
        assert torch.allclose(norm(x), torch.cat(alone), atol=1e-6)


@pytest.mark.parametrize(("clean", "updates"), [(4, (1, 0)), (1, (1, 1)), (0, (0, 1))])
def test_switched_norms_each_see_their_own_images(clean, updates):
    norm, x = SwitchedBatchNorm2d(nn.BatchNorm2d(2)), torch.randn(4, 2, 3, 3)
    with paths.running(Lambdas(torch.tensor([0.0] * clean + [0.4] * (4 - clean)), clean)):
        y = norm(x)
    assert tuple(int(norm.norms[path].num_batches_tracked) for path in paths.PATHS) == updates
    parts = [part for part in (x[:clean], x[clean:]) if len(part)]
    expected = torch.cat([F.batch_norm(part, None, None, training=True) for part in parts])
    assert torch.allclose(y, expected, atol=1e-6)
    with paths.running(0.4):
        norm(x)
    assert norm.norms["adv"].num_batches_tracked == updates[1] + 1


def test_noise_has_the_deviation_of_the_weights():
    torch.manual_seed(0)
    theta = 0.3 + 2.0 * torch.randn(100_000)
    alpha = torch.tensor(0.25)
    noise = with_noise(theta, alpha, 0.5) - theta
    # 0.5 * 0.25 * 2.
    assert float(noise.std()) == pytest.approx(0.25, rel=0.02) and abs(float(noise.mean())) < 0.005
    assert abs(float(torch.corrcoef(torch.stack([noise, theta]))[0, 1])) < 0.02
    assert not torch.equal(with_noise(theta, alpha, 1.0), with_noise(theta, alpha, 1.0))
    assert with_noise(theta, alpha, 0) is theta


def test_gradients_of_noise():
    theta = torch.randn(50, requires_grad=True)
    alpha = torch.tensor(0.25, requires_grad=True)
    weights = torch.randn(50)
    torch.manual_seed(1)
    (with_noise(theta, alpha, 0.5) * weights).sum().backward()
    torch.manual_seed(1)
    eta = theta.detach().std(correction=0) * torch.randn(50)
    assert torch.equal(theta.grad, weights)
    assert float(alpha.grad) == pytest.approx(float((0.5 * eta * weights).sum()), rel=1e-5)


def test_a_noisy_convolution():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 8, 8)
    noisy = NoisyConv2d.from_conv(conv)
    assert torch.equal(noisy(x), conv(x)) and noisy.alpha.item() == 0.25
    with paths.running("adv"):
        torch.manual_seed(1)
        y = noisy(x)
    torch.manual_seed(1)
    weight = conv.weight + 0.25 * conv.weight.std(correction=0) * torch.randn_like(conv.weight)
    assert torch.allclose(y, F.conv2d(x, weight, conv.bias, 2, 1, groups=2), atol=1e-6)


def test_a_masked_noisy_convolution_has_noise_on_live_weights_only():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
    noisy = NoisySmartConv2d.from_conv(conv)
    mask = torch.rand(conv.weight.shape) < 0.3
    noisy.set_mask("clean", mask)
    noisy.set_mask("adv", mask)
    plain = SmartConv2d.from_conv(conv)
    plain.set_mask("clean", mask)
    assert torch.equal(noisy(x), plain(x))
    torch.manual_seed(1)
    weight = noisy.effective_weight("adv")
    torch.manual_seed(1)
    expected = conv.weight + 0.25 * conv.weight[mask].std(correction=0) * torch.randn_like(conv.weight)
    assert torch.allclose(weight, expected * mask, atol=1e-6) and (weight[~mask] == 0).all()
    # What ranks candidates for regrowth is the gradient with respect to the masked, noisy weight.
    noisy.gradient_sinks = {"adv": torch.zeros_like(conv.weight)}
    (noisy.effective_weight("adv") * expected.detach()).sum().backward()
    assert torch.allclose(noisy.gradient_sinks["adv"], expected, atol=1e-6)
    assert (noisy.weight.grad[~mask] == 0).all()

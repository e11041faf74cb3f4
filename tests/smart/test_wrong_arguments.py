"""Arguments and networks that users arrive with: each works, or is refused in one sentence that says what to do."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import smart

IMAGES, LABELS = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


@pytest.fixture
def plain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@pytest.fixture
def model(plain):
    return smart.convert(plain).eval()


def test_a_weight_that_is_computed_is_not_converted(plain):
    prune.l1_unstructured(plain[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"the weight of 0 is computed before each call.*prune\.remove"):
        smart.convert(plain)
    prune.remove(plain[0], "weight")
    prune.l1_unstructured(plain[5], "weight", 0.5)  # of a layer that stays
    plain(IMAGES)
    assert smart.convert(plain)(IMAGES, path="adv").shape == (4, 4)


def test_hooks_are_not_lost_in_silence(plain):
    plain[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="2 has forward hooks"):
        smart.convert(plain)


def test_channels_of_images_are_those_of_the_first_convolution_of_any_kind(plain):
    parametrizations.weight_norm(plain[0])
    assert smart.convert(plain).in_channels == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: smart.pgd(model, IMAGES.numpy(), LABELS), "x is a ndarray, y a Tensor: give tensors"),
        (lambda model: smart.evaluate(model, (IMAGES, LABELS), "pgd20"), r"attacks is 'pgd20': give a list"),
        (lambda model: smart.evaluate(model, (IMAGES, LABELS), ["clean"], "adv"), r"paths is 'adv': give a list"),
        (
            lambda model: smart.evaluate(model, (IMAGES, LABELS[:2])),
            r"labels have shape \(2,\): give one for each of the 4",
        ),
        (lambda model: smart.train(model, (IMAGES, LABELS)), "data is a tuple: make it with smart.load_data"),
        (lambda model: smart.macs(model, IMAGES), "input_shape is a tensor: give the sizes"),
        (lambda model: smart.save_checkpoint("x.safetensors", model.net), "model is a Sequential: make it with"),
    ],
)
def test_arguments_of_another_kind_are_refused(model, call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=message):
        call(model)
    assert not list(tmp_path.iterdir())

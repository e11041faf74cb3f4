import pytest
import torch
from torch import nn

import smart
from benchmarks.cases import LAYERS, SUITES, layers_of
from smart.layers import SmartConv2d


@pytest.mark.parametrize("network", ["resnet34", "wrn_16_8", "wrn_40_2"])
def test_the_layers_are_those_of_the_networks(network):
    size = next(case.image[1] for case in SUITES["cpu"] if case.network == network)
    model = smart.create_model(network, density=0.2).eval()
    found = set()

    def note(conv, args, output):
        stride, density = conv.stride[0], 0.2 if isinstance(conv, SmartConv2d) else 1.0
        found.add((conv.weight.shape[1], conv.weight.shape[0], conv.kernel_size[0], stride, args[0].shape[2], density))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, SmartConv2d)):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.rand(1, 3, size, size), path="clean")
    wanted = {(c.inputs, c.outputs, c.taps, c.stride, c.size, c.density) for c in layers_of(network)}
    assert wanted == found


def test_layers_have_names_of_their_own():
    assert len({str(case) for case in LAYERS}) == len(LAYERS)
    assert {case.batch for case in LAYERS} == {1, 16}

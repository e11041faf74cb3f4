"""Floors of layers, by hand and for the three networks."""

import functools
import json
from dataclasses import replace

import pytest

from benchmarks import roofline
from benchmarks.roofline import Efficiency, Gpu, Layer, compare, floors, layers_of
from smart_kernels.patterns import parse

GPU = Gpu(tflops=785, plain_tflops=66.9, terabytes_per_s=4.3)  # about what matrix products and copies reach on an H200
LAYER = Layer("conv", (64, 32, 3, 3), uses=100, reads=3200, writes=6400, second=0, residual=6400, masked=True)
PERFECT = Efficiency(1, 1, 0)


@functools.cache
def layers(network):
    return tuple(layers_of(network, roofline.IMAGES.get(network, (3, 32, 32))))


def test_floors_of_one_layer_by_hand():
    gpu = Gpu(tflops=1, plain_tflops=0.1, terabytes_per_s=0.001)
    dense = floors(LAYER, parse("block:64x16"), 1.0, 2, 2, gpu, PERFECT)
    assert dense.arithmetic_us == pytest.approx(2 * 18432 * 100 * 2 / 1e6)
    assert dense.memory_us == pytest.approx((2 * 16000 * 2 + 18432 * 2) / 1e3)
    assert dense.us == dense.expected_us == dense.memory_us

    block = floors(LAYER, parse("block:64x16"), 0.25, 2, 2, gpu, PERFECT)
    assert block.arithmetic_us == pytest.approx(dense.arithmetic_us / 4)
    assert block.memory_us == pytest.approx((2 * 16000 * 2 + 18432 * 2 / 4 + 18432 / 4 / 1024 * 4) / 1e3)

    channel = floors(LAYER, parse("channel"), 0.25, 2, 2, gpu, PERFECT)
    assert channel.arithmetic_us == block.arithmetic_us
    assert channel.memory_us == pytest.approx((2 * 16000 * 2 / 2 + 18432 * 2 / 4) / 1e3)

    semi = floors(LAYER, parse("2:4"), 0.5, 2, 2, gpu, PERFECT)
    assert semi.arithmetic_us == pytest.approx(dense.arithmetic_us / 2)
    assert (semi.memory_us * 1e3 - 2 * 16000 * 2) / (18432 * 2) == pytest.approx(0.5625)  # bytes against dense

    slabs = floors(LAYER, parse("64:2:8"), 0.25, 2, 2, gpu, PERFECT)
    assert slabs.arithmetic_us == pytest.approx(dense.arithmetic_us / 4)
    of_dense = (slabs.memory_us * 1e3 - 2 * 16000 * 2) / (18432 * 2)
    assert of_dense == pytest.approx((0.5625 + 4 / (64 * 16) / 2) / 2)

    plain = floors(LAYER, parse("unstructured"), 0.25, 2, 2, gpu, PERFECT)
    assert plain.arithmetic_us == pytest.approx(dense.arithmetic_us / 4 * 10)


def test_efficiencies_stretch_floors_and_starts_add():
    gpu = Gpu(tflops=1, plain_tflops=0.1, terabytes_per_s=1)
    perfect = floors(LAYER, parse("channel"), 1.0, 16, 2, gpu, PERFECT)
    assert perfect.arithmetic_us > perfect.memory_us
    real = floors(LAYER, parse("channel"), 1.0, 16, 2, gpu, Efficiency(0.5, 0.1, 3))
    assert real.us == perfect.us
    assert real.expected_us == pytest.approx(3 + max(perfect.arithmetic_us / 0.5, perfect.memory_us / 0.1))


def test_layers_that_the_pattern_does_not_fit_stay_dense():
    assert floors(LAYER, parse("block:128x16"), 0.2, 1, 2, GPU, PERFECT) == floors(
        LAYER, parse("block:128x16"), 1.0, 1, 2, GPU, PERFECT
    )
    stem = replace(LAYER, masked=False)
    assert compare([stem], parse("channel"), 0.2, 1, "float16", GPU)["bound"] == 1


def test_layers_are_those_of_the_fused_networks():
    counts = {"resnet34": (36, 16, 0), "wrn_16_8": (16, 6, 6), "wrn_40_2": (40, 18, 18)}
    for network, (convolutions, residuals, seconds) in counts.items():
        found = layers(network)
        assert len(found) == convolutions
        assert sum(layer.residual > 0 for layer in found) == residuals, network
        assert sum(layer.second > 0 for layer in found) >= seconds, network
        assert [layer.name for layer in found if not layer.masked] == ["net.conv1"]
    # Multiplications of an image, as the literature has them for this ResNet-34 on 32x32 pixels.
    macs = sum(layer.weights * layer.uses for layer in layers("resnet34"))
    assert macs == pytest.approx(1.16e9, rel=0.01)


# Ceilings at batch 16 and more that were computed beforehand, by hand, from input and result of each layer alone:
# without residuals and second results.
CEILINGS = {
    "resnet34": {"block:16x16": (2.5, 2.8), "2:4": (1.7, 1.8), "channel": (4.4, 4.4), "unstructured": (0.47, 0.47)},
    "wrn_16_8": {"block:16x16": (3.1, 3.3), "2:4": (1.87, 1.87), "channel": (4.6, 4.6), "unstructured": (0.47, 0.47)},
    "wrn_40_2": {"block:16x16": (1.25, 1.4), "2:4": (1.2, 1.3), "channel": (3.0, 3.0), "unstructured": (0.48, 0.48)},
}
DENSITIES = {"block:16x16": 0.2, "2:4": 0.5, "channel": 0.45**2, "unstructured": 0.2}


@pytest.mark.parametrize("batch", [16, 256])
@pytest.mark.parametrize("network", CEILINGS)
def test_networks_meet_the_ceilings_computed_by_hand(network, batch):
    bare = [replace(layer, residual=0, second=0) for layer in layers(network)]
    for pattern, (low, high) in CEILINGS[network].items():
        bound = compare(bare, parse(pattern), DENSITIES[pattern], batch, "float16", GPU)["bound"]
        tolerance = 0.2 if pattern == "unstructured" else 0.1
        assert low * (1 - tolerance) <= bound <= high * (1 + tolerance), (pattern, bound)
        # What else passes through the memory is the same for both, so that it lowers the ceiling.
        if pattern in ("block:16x16", "2:4"):
            whole = compare(layers(network), parse(pattern), DENSITIES[pattern], batch, "float16", GPU)["bound"]
            assert 1 < whole < bound


def test_the_command_prints_and_writes(capsys, tmp_path):
    file = tmp_path / "roofline.json"
    arguments = ["tiny", "--pattern", "channel", "--batch", "16", "--gpu", "A100", "--image", "1", "8", "8"]
    roofline.main([*arguments, "--json", str(file)])
    printed = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["gpu"] == {"tflops": 312.0, "plain_tflops": 19.5, "terabytes_per_s": 2.039}
    assert f"a bound of {content['bound']:.2f}x" in printed and "Computed, not measured." in printed
    assert [line.split()[0] for line in printed.splitlines()[1:-2]] == [row["layer"] for row in content["layers"]]

    ground = tmp_path / "ground.json"
    ground.write_text(json.dumps({"ground": {"matmul_tflops": 700.0, "copy_terabytes_per_s": 4.0}}))
    roofline.main([*arguments, "--ground", str(ground), "--json", str(file)])
    assert json.loads(file.read_text())["gpu"]["tflops"] == 700


def test_channels_are_counted_as_networks_of_such_masks_have_them():
    layer = floors(LAYER, parse("channel"), 0.2, 2, 2, GPU, PERFECT, (0.5, 0.25))
    dense = floors(LAYER, parse("channel"), 1.0, 2, 2, GPU, PERFECT)
    assert layer.arithmetic_us == pytest.approx(dense.arithmetic_us / 8)
    numbers = 2 * (3200 * 0.5 + 12800 * 0.25) * 2 + 18432 * 2 / 8
    assert layer.memory_us == pytest.approx(numbers / GPU.terabytes_per_s / 1e6)
    found = {name: roofline.channels_of("wrn_40_2", (3, 32, 32), parse(name), 0.2) for name in ("channel", "coupled")}
    # The first stage's stream of 32 channels, and the inside of its first block.
    for name, stream, inside in (("channel", 1.0, 0.5), ("coupled", 0.5, 0.5)):
        assert found[name]["net.stages.0.1.conv1"] == (stream, inside), name
        assert found[name]["net.stages.0.1.conv2"] == (inside, stream), name
    assert found["coupled"]["net.conv1"] == (1.0, 1.0)  # of 16 channels no tensor core takes fewer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "V100"], "unknown GPU 'V100': H200, H100, A100 are known"),
        (["--pattern", "3by3"], "unknown pattern '3by3'"),
        (["--density", "0"], "--density above 0"),
        (["--tflops", "0"], "above 0"),
        (["--ground", "nowhere.json"], "nowhere.json"),
        (["--memory", "0"], "give numbers above 0"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit):
        roofline.main(["tiny", *arguments])
    assert message in capsys.readouterr().err


def test_the_table_of_gpus_is_complete():
    for name, entry in json.loads(roofline.GPUS.read_text()).items():
        assert "data sheet" in entry["source"], name
        for dtype in roofline.DTYPES:
            assert Gpu.of(name, dtype).tflops > 0

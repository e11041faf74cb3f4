"""The configurations of the paper's test bed: each loads, builds its network, and asks for its data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from smart import cli, settings
from smart.costs import macs, nonzeros
from smart.datasets import DATASETS
from smart.methods import METHODS
from smart.settings import Settings

FOLDER = Path(__file__).parent.parent / "configs"
README = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
# Network, classes, side of an image, parameters with two sets of batch norms, multiplications of an image in units of
# a thousand million: as counted by hand from the published definitions.
ROWS = {
    "resnet34_cifar10": ("resnet34", 10, 32, 21_299_146, 1.159),
    "resnet34_cifar100": ("resnet34", 100, 32, 21_299_146 + 90 * 513, 1.159),
    "resnet34_tiny_imagenet": ("resnet34", 200, 64, 21_299_146 + 190 * 513, 4.636),
    "wrn_16_8_svhn": ("wrn_16_8", 10, 32, 10_968_570, 1.548),
    "wrn_40_2_stl10": ("wrn_40_2", 10, 96, 2_248_954, 2.948),
}


def resolved(name):
    return Settings.resolve(settings.read_file(FOLDER / f"{name}.yaml"))


def test_there_is_a_row_for_each_and_a_command_in_the_readme():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(ROWS)
    for name in ROWS:
        assert f"smart train --config configs/{name}.yaml --out runs/{name}" in README


@pytest.mark.parametrize("name", ROWS)
def test_hyper_parameters_are_the_published_ones(name):
    chosen = resolved(name)
    config = chosen.config
    assert (config.epochs, config.batch_size, config.lr, config.lr_schedule) == (200, 128, 0.1, "cosine")
    assert (config.momentum, config.weight_decay) == (0.9, 5e-4)
    assert (config.eps, config.attack_step, config.attack_steps) == (8 / 255, 2 / 255, 7)
    assert (config.crop_padding, config.flip) == ((0, False) if name == "wrn_16_8_svhn" else (4, True))
    assert chosen.model["dropout"] == (0.3 if name.startswith("wrn") else 0)
    assert chosen.model["density"] == {"clean": 0.2, "adv": 0.2} and chosen.data["data"] in DATASETS
    assert chosen.data["val_fraction"] == (5000 / 73257 if name == "wrn_16_8_svhn" else chosen.data["val_fraction"])
    # Only what differs between files, and what is published, is in them: every word is known.
    assert set(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())) <= set(settings.ALL)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "smart"])
def test_a_baseline_differs_from_its_row_in_its_method_alone(method):
    row, baseline = resolved("resnet34_cifar10"), resolved(f"baselines/resnet34_cifar10_{method}")
    assert baseline.model["method"] == method
    assert baseline.data == row.data and baseline.config == row.config
    density = 0.2 if METHODS[method].masks else 1.0
    assert baseline.model["density"] == {"clean": density, "adv": density}
    own = ("method", "density", "overlap")
    assert {key: value for key, value in baseline.model.items() if key not in own} == {
        key: value for key, value in row.model.items() if key not in own
    }


def test_there_is_a_baseline_for_each_method():
    files = (FOLDER / "baselines").glob("*.yaml")
    assert {file.stem.removeprefix("resnet34_cifar10_") for file in files} == METHODS.keys() - {"smart"}


@pytest.mark.parametrize("name", ROWS)
def test_network_is_the_published_one(name):
    network, classes, side, parameters, work = ROWS[name]
    chosen = resolved(name)
    assert chosen.model["model"] == network
    model = chosen.create_model(classes, 3)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    counts = nonzeros(model)
    assert counts["clean"] / counts["dense"] == pytest.approx(0.2, abs=0.01)
    assert macs(model, (3, side, side))["dense"] / 1e9 == pytest.approx(work, abs=0.002)


@pytest.mark.parametrize("name", ROWS)
def test_without_data_the_command_says_where_to_put_it(name, tmp_path, capsys):
    command = ["train", "--config", str(FOLDER / f"{name}.yaml"), "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--data-root", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"looked for {tmp_path}" in said

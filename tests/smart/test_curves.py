from __future__ import annotations

import csv

import pytest
from small import make_data, make_trained

from smart.curves import robustness_curves
from smart.evaluate import evaluate
from smart.plots import ADV, CLEAN
from smart.plots_robustness import plot_comparison, plot_curves


@pytest.fixture(scope="module")
def trained():
    return make_trained()


@pytest.fixture(scope="module")
def curves(trained):
    return robustness_curves(trained, make_data(60).train, [0.3, 0, 0.1, 0.3, 1], "pgd5", lambdas=[0.5], seed=2)


def test_points_are_evaluations_at_their_radius(trained, curves):
    assert list(curves) == ["clean", "adv", "0.5"]
    for name, points in curves.items():
        assert list(points) == [0, 0.1, 0.3, 1]
        table = evaluate(trained, make_data(60).train, ["clean", "pgd5"], lambdas=[0.5], eps=0.3, seed=2)
        assert points[0.3]["accuracy"] == table[name]["pgd5"] and points[0.3]["loss"] == table.losses[name]["pgd5"]
        assert points[0]["accuracy"] == table[name]["clean"]
        accuracies = [point["accuracy"] for point in points.values()]
        assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > 0.9 and accuracies[-1] == 0


def test_csv(curves, tmp_path):
    curves.write_csv(tmp_path / "out" / "c.csv")
    with (tmp_path / "out" / "c.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and rows[0]["n_examples"] == "60" and rows[0]["steps"] == "5"
    assert {(row["evaluated"], float(row["eps"])): float(row["accuracy"]) for row in rows} == {
        (name, eps): point["accuracy"] for name, points in curves.items() for eps, point in points.items()
    }


def test_picture(curves, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    plot_curves(tmp_path / "c.png", curves, "a title", 0.1)
    pixels = image.imread(tmp_path / "c.png")[:, :, :3]
    for colour in (CLEAN, ADV):
        assert (abs(pixels - rgb(colour)).max(axis=2) < 0.02).mean() > 1e-4


def test_picture_of_a_comparison(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    row = {"run": "a", "clean": 0.9, "robust": 0.5, "attack": "PGD-20", "nonzeros_union": 10_000, "macs_adv": 2e6}
    other = {**row, "run": "b", "robust": 0.4, "attack": "AutoAttack", "macs_adv": None}
    plot_comparison(tmp_path / "c.png", [row, other])
    pixels = image.imread(tmp_path / "c.png")[:, :, :3]
    shares = [(abs(pixels - rgb(colour)).max(axis=2) < 0.02).mean() for colour in (CLEAN, ADV)]
    # A dot in each of three panels, of the other run in two of them; and one each in the legend.
    assert shares[0] > 1.2 * shares[1] > 0


def rgb(colour):
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def test_refusals(trained, data):
    with pytest.raises(ValueError, match="no radius to attack at"):
        robustness_curves(trained, data, [])
    with pytest.raises(ValueError, match="8/255"):
        robustness_curves(trained, data, [8])

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

import smart
from benchmarks.studies import cases, dial, run, strong, tables
from benchmarks.studies.cases import CASES, IMAGES, STUDIES
from smart import results
from smart.config import TrainConfig
from smart.costs import nonzeros
from smart.data import ImageData

QUICK = TrainConfig(
    epochs=1, batch_size=16, eps=0.1, attack_step=0.05, attack_steps=1, val_attack_steps=1, crop_padding=0
)


@pytest.fixture(scope="module")
def images():
    """Bright rows of 1x8x8 images tell three classes apart."""
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 3
    pixels = generator.integers(0, 90, (120, 8, 8), dtype=np.uint8)
    for i, label in enumerate(labels):
        pixels[i, 2 * label : 2 * label + 3] += 120
    return pixels, labels


@pytest.fixture
def source(images, tmp_path):
    file = tmp_path / "rows.npz"
    np.savez(file, images=images[0], labels=images[1])
    return file


@pytest.fixture
def data(images):
    pixels, labels = torch.from_numpy(images[0])[:, None], torch.from_numpy(images[1])
    return ImageData("rows", ["a", "b", "c"], *[(pixels, labels)] * 3)


@pytest.fixture
def study(monkeypatch, source, tmp_path):
    """Runs the studies in seconds; gives the results file."""
    threads = torch.get_num_threads()
    for module in (cases, run):
        monkeypatch.setattr(module, "RECIPE", QUICK)
    monkeypatch.setattr(run, "IMAGES", {"train": 63, "val": 9, "test": 12})
    monkeypatch.setattr(run, "ATTACKS", ("clean", "pgd1"))
    monkeypatch.setattr(results, "commit", lambda: "0123456789ab")
    out = tmp_path / "out.json"

    def go(*arguments):
        run.main(["--data", str(source), "--runs", str(tmp_path / "runs"), "--out", str(out), *arguments])
        return results.read(out)

    yield go
    torch.set_num_threads(threads)


def test_a_study_goes_on_where_it_was_stopped(study, capsys):
    first = study("--seeds", "1", "--only", "density 0.1")
    assert [(row["case"], row["seed"]) for row in first["rows"]] == [("SMART, density 0.1", 0)]
    (row,) = first["rows"]
    assert row["method"] == "smart" and row["masks"] == {"density": 0.1} and row["test_n_examples"] == 12
    assert 0 <= row["robust"]["adv"] <= row["accuracy"]["adv"]["pgd1"] <= 1
    assert set(row["transfer"]["pgd1"]) == {"clean", "adv"}
    assert row["nonzeros"]["clean"] / row["nonzeros"]["dense"] == pytest.approx(0.1, abs=0.005)
    second = study("--seeds", "2", "--only", "density 0.1")
    assert second["rows"][0] == row, "a run that is there is not measured again"
    assert [row["seed"] for row in second["rows"]] == [0, 1]
    assert second["command"] == f"{first['command']}; {first['command'].replace('seeds 1', 'seeds 2')}"


def test_a_network_of_one_path_has_the_same_numbers_on_both(study):
    (row,) = study("--seeds", "1", "--only", "PGD-AT")["rows"]
    assert row["accuracy"]["clean"] == row["accuracy"]["adv"] and row["robust"]["clean"] == row["robust"]["adv"]


def test_results_say_what_they_are_of(study, tmp_path):
    content = study("--seeds", "1", "--only", "PGD-AT")
    assert content["data"]["name"] == "rows.npz" and content["data"]["image"] == [1, 8, 8]
    assert {content["data"][split]["images"] for split in IMAGES} == {63, 9, 12}
    assert len({content["data"][split]["sha256"] for split in IMAGES}) == 3
    assert content["recipe"]["eps"] == 0.1 and content["command"].startswith("python -m benchmarks.studies.run")
    assert (tmp_path / "runs").is_dir()


def test_results_of_another_commit_or_recipe_are_not_mixed(study, monkeypatch, capsys):
    study("--seeds", "1", "--only", "PGD-AT")
    monkeypatch.setattr(run, "RECIPE", dataclasses.replace(QUICK, eps=0.2))
    with pytest.raises(SystemExit):
        study("--seeds", "2", "--only", "PGD-AT")
    assert "is of another study: its recipe" in capsys.readouterr().err
    monkeypatch.setattr(run, "RECIPE", QUICK)
    monkeypatch.setattr(results, "commit", lambda: "ba9876543210")
    with pytest.raises(SystemExit):
        study("--seeds", "2", "--only", "PGD-AT")
    assert "commit" in capsys.readouterr().err


def test_stronger_attacks_are_set_on_a_part_of_the_test_images(study, monkeypatch, capsys):
    monkeypatch.setattr(strong, "ATTACKS", ("clean", "pgd1"))
    monkeypatch.setattr(strong, "PGD", ["pgd1"])
    monkeypatch.setattr(strong, "STRONGEST", "pgd9-cw")
    monkeypatch.setattr(smart, "sanity_checks", functools.partial(smart.sanity_checks, steps=1, queries=2))
    content = study("--seeds", "2", "--only", "density 0.1", "--strong", "6")
    assert content["strong"] | {"sha256": None} == {"restarts": strong.RESTARTS, "images": 6, "sha256": None}
    assert content["strong"]["sha256"] != content["data"]["test"]["sha256"]
    first, second = (row["strong"] for row in content["rows"])
    for path in ("clean", "adv"):
        assert 0 <= first["restarts"][path] <= first["pgd"][path] <= first["clean"][path] <= 1
        assert 6 * first["autoattack"][path] == pytest.approx(round(6 * first["autoattack"][path]))
    assert first["sanity"]["n_examples"] == 6 and "sanity" not in second
    clean, adv, *_, note = strong.markdown(content, "methods").splitlines()[2:]
    assert clean.startswith("| SMART, density 0.1 | clean | 2 |") and adv.startswith("| SMART, density 0.1 | adv | 2 |")
    assert adv.endswith(" of 8 |") and note == f"6 of the test images, {strong.RESTARTS} restarts."
    with pytest.raises(SystemExit):
        study("--seeds", "2", "--only", "density 0.1")
    assert "is of another study: its strong" in capsys.readouterr().err


def test_the_dial_is_measured_at_every_position(study, monkeypatch):
    monkeypatch.setattr(dial, "ATTACK", "pgd1")
    content = study("--seeds", "2", "--studies", "dial", "--dial")
    assert [row["training"] for row in content["rows"]] == [{}, {"dial": "sampled"}] * 2
    row = content["rows"][0]
    found = dial.places(row)
    between = [f"lambda {at}" for at in ("0.25", "0.5", "0.75")]
    between += [f"{side} {stages} adversarial" for side in ("first", "last") for stages in ("stage", "2 stages")]
    assert list(found) == ["clean path", *between, "adversarial path"]
    assert found["first 2 stages adversarial"]["path"] == ["adv", "adv", "clean"]
    assert found["last stage adversarial"]["path"] == ["clean", "clean", "adv"]
    assert found["lambda 0.5"]["macs"] == row["macs"]["union"] and found["clean path"]["macs"] == row["macs"]["clean"]
    assert found["clean path"]["clean"] == row["accuracy"]["clean"]["clean"]
    lines = dial.markdown(content).splitlines()
    assert len(lines) == 2 + len(found) and {line.count("|") for line in lines} == {7}


def test_wrong_usage_is_said(study, tmp_path, capsys):
    wrong = {
        "no case's name": ["--only", "nothing"],
        "there is no data": ["--data", str(tmp_path / "no")],
        "give a number of test images": ["--strong", "-1"],
        "invalid choice": ["--studies", "nothing"],
    }
    for said, arguments in wrong.items():
        with pytest.raises(SystemExit) as stopped:
            study(*arguments)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_every_case_is_a_network_that_can_be_trained(data):
    assert len({case.name for study in STUDIES.values() for case in study.cases}) == len(CASES)
    for case in CASES.values():
        assert case.config(1).seed == 1
        model = case.model(data, 0)
        assert model.method == case.method
        assert model(torch.rand(2, 1, 28, 28)).shape == (2, 3)


def test_weights_and_masks_follow_from_the_seed(data):
    first, again, other = (CASES["2:4"].model(data, seed).net.stages[1][0].conv1 for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight) and torch.equal(first.masks["adv"], again.masks["adv"])
    assert not torch.equal(first.weight, other.weight) and not torch.equal(first.masks["adv"], other.masks["adv"])


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "methods"])
def test_cases_of_a_study_of_masks_have_as_many_weights(name, data):
    counts = [nonzeros(case.model(data, 0)) for case in STUDIES[name].cases]
    for path in ("clean", "adv"):
        assert max(count[path] for count in counts) / min(count[path] for count in counts) < 1.03


def test_a_study_that_was_not_run_has_no_table(study):
    content = study("--seeds", "1", "--studies", "patterns at 0.2", "--only", "SMART")
    assert tables.markdown(content, "patterns at 0.2") == "Not measured yet."
    content = study("--seeds", "1", "--studies", "patterns at 0.2", "--only", "channels")
    lines = tables.markdown(content, "patterns at 0.2").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| SMART, density 0.2", "| channels, 0.2"]
    assert tables.markdown(content, "overlap") == "Not measured yet."
    assert len({line.count("|") for line in lines}) == 1


def test_tables_give_means_deviations_and_differences_of_equal_seeds():
    first, second = (
        [{"case": name, "seed": seed, "robust": {"adv": value}} for seed, value in enumerate(values)]
        for name, values in (("a", (0.5, 0.6, 0.7)), ("b", (0.4, 0.6, 0.6)))
    )
    robust = tables.robust_accuracy("adv")
    assert tables.spread(first, robust) == "60.0 ± 10.0"
    assert tables.spread(first[:1], robust) == "50.0"
    assert tables.difference(second, first, robust) == "-6.7 (-10.0 to +0.0)"
    assert tables.difference(second[:1], first, robust) == "-10.0"
    assert tables.difference(second[2:], first[:1], robust) == ""
    assert tables.difference(first, first, robust) == ""
    assert tables.in_common({"nonzeros": {"clean": 10, "adv": 10, "union": 15}}) == 0.5
    assert json.dumps(CASES["2:4"].masks) == '{"density": 0.5, "pattern": "2:4"}'

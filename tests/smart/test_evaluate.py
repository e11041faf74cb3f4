from __future__ import annotations

import csv

import pytest
import torch
from small import assert_same_state, make_data, make_model, make_trained, state_of

from smart.attacks import pgd
from smart.black_box import square
from smart.config import TrainConfig
from smart.evaluate import evaluate
from smart.named_attacks import attack_steps, run_attack
from smart.seeds import derive_seed
from smart.text import attack_name
from smart.train import train


@pytest.fixture(scope="module")
def trained():
    model = make_model()
    train(
        model, make_data(), TrainConfig(epochs=10, batch_size=16, lr=0.05, crop_padding=0, flip=False), progress=False
    )
    return model


def test_table_has_a_row_per_configuration(model, data):
    before, flags = state_of(model.train()), [m.training for m in model.modules()]
    table = evaluate(model, data, ["clean", "fgsm", "pgd3"], lambdas=(0.25,), eps=0.1, batch_size=5, seed=3)
    assert list(table) == ["clean", "adv", "0.25"]
    assert all(list(row) == ["clean", "fgsm", "pgd3"] for row in table.values())
    assert all(0 <= value <= 1 for row in table.values() for value in row.values())
    assert table.settings == {"n_examples": 12, "eps": 0.1, "step": 0.025, "restarts": 1, "seed": 3}
    assert_same_state(before, state_of(model))
    assert flags == [m.training for m in model.modules()]


def test_each_configuration_is_attacked_as_deployed(trained, data):
    x, y = data.test
    table = evaluate(
        trained, (x, y), ["pgd5"], lambdas=(0.5,), eps=0.2, step=0.05, restarts=2, transfer=True, batch_size=100
    )
    for attacked in ("clean", "adv", "0.5"):
        assert table.transfer["pgd5"][attacked][attacked] == table[attacked]["pgd5"]
        assert list(table.transfer["pgd5"][attacked]) == ["clean", "adv", "0.5"]
    matrix = table.transfer["pgd5"]
    assert any(matrix[a][e] != matrix[e][e] for a in matrix for e in matrix)


def test_numbers_by_hand_and_by_seed(trained, data):
    model = trained
    x, y = data.test
    table = evaluate(model, data, ["clean", "pgd4"], ["adv"], eps=0.1, step=0.03, seed=7)
    assert table["adv"]["clean"] == int((model(x, path="adv").argmax(1) == y).sum()) / len(y)
    again = evaluate(model, data, ["clean", "pgd4"], ["clean", "adv"], eps=0.1, step=0.03, seed=7)
    assert again["adv"] == table["adv"]
    everywhere = pgd(model, x, y, "adv", eps=1.0, step=0.2, steps=20)
    assert evaluate(model, (everywhere, y), ["clean"], ["adv"])["adv"]["clean"] < table["adv"]["clean"]


def test_csv_carries_the_settings(model, data, tmp_path):
    table = evaluate(model, data, ["clean", "fgsm"], eps=0.1, transfer=True)
    table.write_csv(tmp_path / "out" / "table.csv")
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    row = next(r for r in rows if (r["attack"], r["attacked"], r["evaluated"]) == ("fgsm", "adv", "adv"))
    assert float(row["accuracy"]) == table["adv"]["fgsm"]
    assert (row["n_examples"], row["eps"], row["seed"]) == ("12", "0.1", "0")
    assert len(evaluate(model, data, ["clean", "fgsm"]).rows()) == 4
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        table.write_csv(tmp_path / "file" / "table.csv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attacks": ["pgd5-mse"]}, "pgdN"),
        ({"attacks": ["square9-cw"]}, "pgdN"),
        ({"attacks": ["pgd0"]}, "pgdN"),
        ({"attacks": ["square"]}, "squareN"),
        ({"attacks": []}, "nothing to evaluate"),
        ({"paths": ["robust"]}, "unknown path"),
        ({"lambdas": [2.0]}, "lambda"),
        ({"eps": 8}, "8/255"),
        ({"batch_size": 0}, "batch_size"),
        ({"data": (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))}, "no images"),
    ],
)
def test_bad_settings_are_refused(model, data, options, words):
    with pytest.raises(ValueError, match=words):
        evaluate(**{"model": model, "data": data, **options})


def test_attack_names():
    names = ("clean", "fgsm", "pgd7", "pgd100-dlr", "square50", "autoattack", "apgd-t")
    assert [attack_steps(name) for name in names] == [0, 1, 7, 100, 50, 100, 100]
    shown = ["no attack", "FGSM", "PGD-7", "PGD-100 DLR", "Square-50", "AutoAttack", "APGD-T"]
    assert [attack_name(name) for name in names] == shown


def test_worst_counts_each_image_with_the_attack_that_fools_it(trained, data):
    x, y = data.test
    attacks = ["clean", "fgsm", "pgd5", "pgd5-cw"]
    table = evaluate(trained, (x, y), attacks, eps=0.2, batch_size=5, seed=1)
    for path in ("clean", "adv"):
        assert table.worst[path] <= min(table[path].values())
        withstood = torch.ones(len(x), dtype=torch.bool)
        for attack in attacks:
            for start in range(0, len(x), 5):
                part, labels = x[start : start + 5], y[start : start + 5]
                seed = derive_seed(1, attack, start)
                adv = run_attack(attack, trained, part, labels, path, 0.2, 0.05, 1, seed)
                withstood[start : start + 5] &= trained(adv, path=path).argmax(1) == labels
        assert table.worst[path] == float(withstood.double().mean())
    across = evaluate(trained, (x, y), attacks, eps=0.2, batch_size=5, seed=1, transfer=True)
    assert all(across.worst[path] <= table.worst[path] for path in table)


def test_black_box():
    model, (x, y) = make_trained(), make_data(60).train
    table = evaluate(model, (x, y), ["clean", "square10", "square60"], ["adv"], eps=0.3, seed=5)
    adv = square(model, x, y, "adv", 0.3, 60, torch.Generator().manual_seed(derive_seed(5, "square60", 0)))
    assert table["adv"]["square60"] == int((model(adv, path="adv").argmax(1) == y).sum()) / 60
    assert table["adv"]["square60"] < table["adv"]["square10"] < table["adv"]["clean"]
    assert [(row["attack"], row["steps"]) for row in table.rows()] == [("clean", 0), ("square10", 10), ("square60", 60)]


def test_parts_add_up_to_the_whole(trained, data):
    options = {"attacks": ["clean", "pgd3"], "eps": 0.2, "batch_size": 5, "seed": 3}
    whole = evaluate(trained, data, **options)
    parts = [evaluate(trained, data, **options, part=(i, 2)) for i in (0, 1)]
    assert len(data.test[0]) == 12  # three batches: two of the first part, one of the second
    for path, row in whole.items():
        for attack, accuracy in row.items():
            assert sum(part[path][attack] for part in parts) == pytest.approx(accuracy)
            assert sum(part.losses[path][attack] for part in parts) == pytest.approx(whole.losses[path][attack])
        assert sum(part.worst[path] for part in parts) == pytest.approx(whole.worst[path])
        assert all(part.worst[path] < 1 for part in parts)

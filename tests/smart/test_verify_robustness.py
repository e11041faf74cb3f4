from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from small import assert_same_state, make_data, make_net, make_trained, state_of
from torch import nn

import smart_kernels
from smart.attacks import pgd
from smart.black_box import square
from smart.evaluate import evaluate
from smart.layers import smart_convs
from smart.seeds import derive_seed
from smart.verify import Row, _row, verify_robustness
from smart_kernels import VerificationError

QUICK = {"eps": 0.35, "steps": 3, "queries": 10}


@pytest.fixture(scope="module")
def trained():
    return make_trained()


@pytest.fixture(scope="module")
def held_out():
    return make_data(120).train


@pytest.fixture(scope="module")
def sparse(trained, held_out):
    return smart_kernels.swap(trained, held_out[0][:4], measure=False)


class OtherwiseOnAttacked(nn.Module):
    """A swapped network that answers with other classes wherever an image is none of those it knows."""

    def __init__(self, sparse, known):
        super().__init__()
        self.sparse, self.paths = sparse, sparse.paths
        self.known = {image.numpy().tobytes() for image in known}

    def forward(self, x, path="clean"):
        logits = self.sparse(x, path=path)
        unknown = torch.tensor([image.numpy().tobytes() not in self.known for image in x])
        return torch.where(unknown[:, None], logits.roll(1, 1), logits)


def test_a_swapped_network_agrees(trained, sparse, held_out):
    found = verify_robustness(trained, sparse, *held_out, **QUICK, batch=50, seed=3)
    assert [(row.path, row.attack) for row in found.rows] == [
        (path, attack) for path in ("clean", "adv") for attack in ("clean", "pgd3", "square10")
    ]
    for row in found.rows:
        assert (row.images, row.differ, row.unexplained) == (120, 0, 0)
        assert row.dense_accuracy == row.sparse_accuracy == row.dense_accuracy_on_same
        assert 0 < row.max_rel_error < 1e-5
    assert set(found.errors) == {"clean", "adv"} and all(0 < error < 1e-5 for error in found.errors.values())
    assert found.settings == {
        "n_examples": 120, "eps": 0.35, "step": 0.0875, "steps": 3, "queries": 10, "seed": 3, "tolerance": 1e-4
    }  # fmt: skip


def test_the_numbers_are_those_of_evaluate(trained, sparse, held_out):
    rows = verify_robustness(trained, sparse, *held_out, **QUICK, batch=50, seed=3).rows
    attacks = ["clean", "pgd3", "square10"]
    table = evaluate(trained, held_out, attacks, eps=0.35, batch_size=50, seed=3)
    assert {(row.path, row.attack): row.dense_accuracy for row in rows} == {
        (path, attack): table[path][attack] for path in table for attack in attacks
    }
    # Neither attack was idle, so that agreement under it means something.
    accuracy = table["clean"]
    assert accuracy["pgd3"] < accuracy["clean"] and accuracy["square10"] < accuracy["clean"]


def test_leaves_the_model_as_it_was(trained, sparse, held_out):
    model = copy.deepcopy(trained).train()
    model.net[1].eval()
    before, flags = state_of(model), [m.training for m in model.modules()]
    verify_robustness(model, sparse, *held_out, **QUICK)
    assert_same_state(before, state_of(model)) and flags == [m.training for m in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_one_changed_weight_is_found(trained, held_out):
    x, y = held_out
    broken = copy.deepcopy(trained)
    conv = next(iter(smart_convs(broken).values()))
    only_adv = (conv.mask_adv & ~conv.mask_clean).nonzero()[0]
    with torch.no_grad():
        conv.weight[tuple(only_adv)] += 30
        flipped = int((broken(x, path="adv").argmax(1) != trained(x, path="adv").argmax(1)).sum())
    assert flipped > 0
    sparse = smart_kernels.swap(broken, x[:4], measure=False)
    with pytest.raises(VerificationError, match=r"differs from the original by adv: \d"):
        verify_robustness(trained, sparse, x, y, **QUICK)
    error = max(smart_kernels.verify(trained, sparse, x, tolerance=1e9).values())
    # Not even a tolerance that lets the logits pass excuses another accuracy.
    found = verify_robustness(trained, sparse, x, y, steps=0, queries=0, tolerance=1.01 * error, strict=False)
    assert [row.differ for row in found.rows] == [0, flipped]
    (clause,) = found.disagreements()
    assert clause.startswith("path 'adv' under no attack: of 120 images the dense network answers 120 rightly")


@pytest.mark.parametrize(("steps", "queries", "words"), [(3, 0, "PGD-3"), (0, 10, "Square-10")])
def test_a_network_that_differs_on_attacked_images_only_is_found(trained, sparse, held_out, steps, queries, words):
    x, y = held_out
    other = OtherwiseOnAttacked(sparse, x)
    verify_robustness(trained, other, x, y, steps=0, queries=0)
    with pytest.raises(VerificationError, match=rf"path 'adv' under {words}: \d+ of 120 predictions differ") as raised:
        verify_robustness(trained, other, x, y, 0.1, steps=steps, queries=queries)
    assert "path 'clean'" in str(raised.value) and "no attack" not in str(raised.value)
    found = verify_robustness(trained, other, x, y, 0.1, steps=steps, queries=queries, strict=False)
    assert found.rows[1].unexplained > 0 and found.as_dict()["disagreements"] == found.disagreements()
    with pytest.raises(VerificationError, match=words):
        found.check()


class Recording(nn.Module):
    """A swapped network that remembers what it was asked."""

    def __init__(self, sparse):
        super().__init__()
        self.sparse, self.paths, self.asked = sparse, sparse.paths, []

    def forward(self, x, path="clean"):
        self.asked.append((path, x))
        return self.sparse(x, path=path)


def test_white_box_images_are_shown_to_both(trained, sparse, held_out):
    x, y = held_out
    recording = Recording(sparse)
    verify_robustness(trained, recording, x, y, 0.3, steps=4, queries=0, paths=["adv"], seed=7)
    made = pgd(trained, x, y, "adv", 0.3, 0.075, 4, generator=torch.Generator().manual_seed(derive_seed(7, "pgd4", 0)))
    # The first two calls are those of smart_kernels.verify.
    (on_clean, clean), (on_attacked, attacked) = recording.asked[2:]
    assert (on_clean, on_attacked) == ("adv", "adv") and torch.equal(clean, x)
    torch.testing.assert_close(attacked, made)


def test_the_black_box_attack_is_on_the_swapped_network_itself(trained, held_out):
    x, y = held_out
    # Coarse logits lead the search elsewhere than the original's do, so it shows whose images are whose.
    recording = Recording(smart_kernels.swap(trained, x[:4], dtype=torch.bfloat16, measure=False))
    verify_robustness(trained, recording, x, y, 0.3, steps=0, queries=40, paths=["adv"])
    asked = [{image.float().numpy().tobytes() for image in images} for _, images in recording.asked]
    assert asked[-1] <= set().union(*asked[3:-1])
    with torch.no_grad():
        of_dense = square(
            trained, x, y, "adv", 0.3, 40, torch.Generator().manual_seed(derive_seed(0, "square40", 0))
        ).bfloat16()
    assert any(image.float().numpy().tobytes() not in asked[-1] for image in of_dense)


def test_what_rounding_explains():
    dense = torch.tensor([[1.0, 0.9999, 0.0], [1.0, 0.9, 0.9999], [0.5, 0.4, 0.0]])
    sparse = torch.tensor([[0.99995, 0.99996, 0.0], [1.0, 1.1, 0.9], [0.5, 0.4, 0.0]])
    own = torch.eye(3)
    row = _row("adv", "clean", dense, sparse, own, torch.tensor([0, 2, 2]), 1e-4)
    # The second image's top two are close, but a third class was chosen.
    assert (row.images, row.differ, row.unexplained) == (3, 2, 1)
    assert (row.dense_accuracy, row.sparse_accuracy, row.dense_accuracy_on_same) == (2 / 3, 0, 1 / 3)
    assert row.max_rel_error == pytest.approx(0.2)
    assert row.disagreement(0.3) == "path 'adv' under no attack: 1 of 3 predictions differ beyond rounding"
    row = dataclasses.replace(row, unexplained=0)
    assert row.disagreement(0.3) is None
    assert row.disagreement(0.1) == "path 'adv' under no attack: logits differ by 2.00e-01, where 1e-01 is accepted"
    assert _row("adv", "clean", dense, dense * torch.nan, dense, None, 1e-4).disagreement(1e-4)


def test_black_box_accuracies_may_differ_a_little():
    row = Row("adv", "square10", 100, 0.5, 0.55, 0.5, 0, 0, 0.0)
    assert row.disagreement(1e-4) is None
    clause = dataclasses.replace(row, sparse_accuracy=0.56).disagreement(1e-4)
    assert "the dense network answers 50 rightly, the swapped one 56, where a difference of 5 is accepted" in clause
    few = dataclasses.replace(row, images=10, sparse_accuracy=0.7)
    assert few.disagreement(1e-4) is None and dataclasses.replace(few, sparse_accuracy=0.8).disagreement(1e-4)


def test_lambdas_and_chosen_paths(trained, sparse, held_out):
    rows = verify_robustness(trained, sparse, *held_out, **QUICK, paths=["adv", 0.5]).rows
    assert [row.path for row in rows] == ["adv"] * 3 + ["0.5"] * 3


def test_half_precision_agrees_within_its_tolerance(trained, held_out):
    sparse = smart_kernels.swap(trained, held_out[0][:4], dtype=torch.bfloat16, measure=False)
    found = verify_robustness(trained, sparse, *held_out, **QUICK)
    assert found.settings["tolerance"] == 2e-1 and all(row.max_rel_error > 1e-4 for row in found.rows)


def test_a_network_pruned_elsewhere(held_out):
    torch.manual_seed(0)
    net = make_net().eval()
    with torch.no_grad():
        net[4].weight[torch.rand(net[4].weight.shape) < 0.8] = 0
    sparse = smart_kernels.swap(net, held_out[0][:4], measure=False)
    rows = verify_robustness(net, sparse, *held_out, **QUICK).rows
    assert [row.attack for row in rows] == ["clean", "pgd3", "square10"] and not any(row.differ for row in rows)


def test_without_labels_nothing_is_attacked(trained, sparse, held_out):
    found = verify_robustness(trained, sparse, held_out[0], None)
    assert [(row.attack, row.dense_accuracy, row.differ) for row in found.rows] == [("clean", None, 0)] * 2
    assert found.table().splitlines()[1].split() == ["clean", "no", "attack", "-", "-", "0"]


def test_progress_sees_every_batch(trained, sparse, held_out):
    seen = []
    verify_robustness(trained, sparse, *held_out, **QUICK, batch=50, progress=lambda work: seen.extend(work) or work)
    assert len(seen) == 2 * 3 * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": torch.zeros(0, 1, 8, 8)}, "no images"),
        ({"labels": torch.zeros(3).long()}, "one integer label"),
        ({"images": torch.full((120, 1, 8, 8), 2.0)}, r"\[0, 1\]"),
        ({"eps": 8}, "8/255"),
        ({"step": 0.0}, "step"),
        ({"steps": -1}, "steps is -1"),
        ({"queries": 1.5}, "queries is 1.5"),
        ({"batch": 0}, "batch is 0"),
        ({"paths": ["robust"]}, "robust"),
    ],
)
def test_bad_settings_are_refused(trained, sparse, held_out, options, words):
    images, labels = held_out
    with pytest.raises(ValueError, match=words):
        verify_robustness(**{"model": trained, "sparse": sparse, "images": images, "labels": labels, **options})

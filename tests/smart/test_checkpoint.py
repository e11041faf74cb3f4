from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import assert_same_state, make_model, make_net, state_of
from torch import nn

from smart.checkpoint import CheckpointError, load_checkpoint, load_into, read_checkpoint, save_checkpoint, save_dense
from smart.layers import DualBatchNorm2d
from smart.models import build, create_model


@pytest.fixture
def saved(tmp_path):
    model = create_model(
        "tiny", num_classes=5, in_channels=1, density={"clean": 0.2, "adv": 0.4}, mean=[0.3], std=[0.4]
    )
    for module in model.modules():
        if isinstance(module, DualBatchNorm2d):
            nn.init.normal_(module.norms["adv"].running_mean)
    save_checkpoint(tmp_path / "m.safetensors", model, {"seed": 3})
    return model, tmp_path / "m.safetensors"


def test_round_trip(saved):
    model, path = saved
    loaded, metadata = load_checkpoint(path)
    assert_same_state(state_of(model), state_of(loaded))
    assert metadata["seed"] == 3 and metadata["versions"]["torch"] == torch.__version__
    assert loaded.spec == model.spec and not loaded.training
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model.eval()(x, path="adv"), loaded(x, path="adv"))


def test_masks_take_a_bit_a_weight(saved):
    model, path = saved
    stored = load_file(path)
    weight = model.net.stages[0][0].conv1.weight
    mask = stored["model.net.stages.0.0.conv1.mask_clean"]
    assert mask.dtype == torch.uint8 and mask.numel() == weight.numel() // 8


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_files_are_refused(saved, cut):
    path = saved[1]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(path)


@pytest.mark.parametrize("place", [0.5, 0.9])
def test_a_flipped_bit_is_refused(saved, place):
    path = saved[1]
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_checkpoint(path)


def resave(path, edit):
    """Writes the file again after ``edit`` of its tensors and metadata, with a SHA-256 that is right."""
    from smart.checkpoint import FORMAT, _digest

    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[FORMAT])
    tensors = load_file(path)
    edit(tensors, metadata)
    text = json.dumps(metadata)
    save_file(tensors, path, metadata={FORMAT: text, "sha256": _digest(tensors, text)})


def wrong_shape(tensors, metadata):
    tensors["model.net.fc.weight"] = torch.zeros(5, 3)


def wrong_mask(tensors, metadata):
    key = "model.net.stages.0.0.conv1.mask_adv"
    tensors[key] = tensors[key][:-1].clone()


def not_finite(tensors, metadata):
    tensors["model.net.fc.weight"][0, 0] = float("nan")


def missing(tensors, metadata):
    del tensors["model.net.fc.weight"]


def surplus(tensors, metadata):
    tensors["model.net.more"] = torch.zeros(1)


def huge(tensors, metadata):
    metadata["model"]["num_classes"] = 10**15


def unknown_model(tensors, metadata):
    metadata["model"]["name"] = "resnet50"


def unknown_argument(tensors, metadata):
    metadata["model"]["colour"] = "red"


def other_version(tensors, metadata):
    metadata["format_version"] = 99


@pytest.mark.parametrize(
    "edit",
    [wrong_shape, wrong_mask, not_finite, missing, surplus, huge, unknown_model, unknown_argument, other_version],
    ids=lambda edit: edit.__name__,
)
def test_tampered_files_are_refused(saved, edit):
    resave(saved[1], edit)
    with pytest.raises(CheckpointError):
        load_checkpoint(saved[1])


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match="not a whole"):
        load_checkpoint(tmp_path / "text.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pt")
    with pytest.raises(CheckpointError, match="not a whole"):
        load_checkpoint(tmp_path / "pickle.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="not written by"):
        load_checkpoint(tmp_path / "plain.safetensors")


def test_converted_networks_load_into_their_like(tmp_path):
    model, other = make_model(seed=0), make_model(seed=1)
    save_checkpoint(tmp_path / "m.safetensors", model, tensors={"optimizer": {"net.0.weight": torch.ones(2)}})
    with pytest.raises(CheckpointError, match="load_into"):
        load_checkpoint(tmp_path / "m.safetensors")
    load_into(other, tmp_path / "m.safetensors")
    assert_same_state(state_of(model), state_of(other))
    assert read_checkpoint(tmp_path / "m.safetensors")[1]["optimizer"]["net.0.weight"].tolist() == [1, 1]


def test_another_architecture_is_refused_and_left_as_it_was(saved):
    other = create_model("tiny", num_classes=6, in_channels=1)
    before = state_of(other)
    with pytest.raises(CheckpointError, match="another network"):
        load_into(other, saved[1])
    assert_same_state(before, state_of(other))


@pytest.mark.parametrize("path", ["clean", "adv"])
def test_dense_twin_is_the_path_in_a_plain_network(saved, tmp_path, path):
    model = saved[0].eval()
    save_dense(tmp_path / "d.safetensors", model, path)
    plain = build("tiny", num_classes=5, in_channels=1).eval()
    plain.load_state_dict(load_file(tmp_path / "d.safetensors"))
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(plain((x - 0.3) / 0.4), model(x, path=path))
    convs = nn.utils.parameters_to_vector(m.weight for m in plain.stages.modules() if isinstance(m, nn.Conv2d))
    assert (convs != 0).float().mean() == pytest.approx({"clean": 0.2, "adv": 0.4}[path], abs=0.01)


def test_dense_twin_of_a_converted_network(tmp_path, x):
    model, plain = make_model(), make_net().eval()
    save_dense(tmp_path / "d.safetensors", model, "adv")
    plain.load_state_dict(load_file(tmp_path / "d.safetensors"))
    torch.testing.assert_close(plain(x), model(x, path="adv"))
    with pytest.raises(ValueError, match="'clean' or 'adv'"):
        save_dense(tmp_path / "e.safetensors", model, "both")


def test_a_file_that_cannot_be_written_leaves_the_old_one(saved, tmp_path, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smart.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, model)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]

"""README's code runs as it stands, on a smaller network and for a shorter time."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import smart
import smart_kernels

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(block, names, **replacements):
    for old, new in replacements.items():
        assert old in block
        block = block.replace(old, new)
    exec(compile(block, str(README), "exec"), names)
    return names


def test_the_api_in_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in BLOCKS if "smart.train" in block)
    block = block.replace("epochs=30", "epochs=1, attack_steps=1").replace('"pgd20"]', '"pgd1"]')
    names = run(block, {}, resnet18="tiny")
    assert names["y"].shape == (16, 10)
    assert (tmp_path / "mine.safetensors").is_file()
    assert (tmp_path / "runs" / "mine" / "best.safetensors").is_file()
    assert set(names["table"]) == {"clean", "adv"}


def test_a_network_of_ones_own():
    (block,) = (block for block in BLOCKS if "smart.convert" in block)
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(3, 4, 3))
    network.add_module("body", nn.Conv2d(4, 8, 3))
    model = run(block, {"my_network": network, "smart": smart})["model"]
    assert type(model.net.stem) is nn.Conv2d
    assert set(model.net.body.masks) == {"clean", "adv"}


def test_a_network_pruned_elsewhere():
    (block,) = (block for block in BLOCKS if "random_unstructured" in block)
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(3, 4, 3))
    names = run(block, {"net": net, "x": torch.rand(1, 3, 8, 8), "torch": torch, "smart_kernels": smart_kernels})
    assert names["sparse"].report()[0]["density"]["clean"] == pytest.approx(0.2, abs=0.01)

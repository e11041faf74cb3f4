import torch

from benchmarks import training
from smart.config import TrainConfig
from smart.models import build


def test_the_plain_loop_makes_the_passes_it_says():
    """The trainer's own are looked at in tests/smart/test_train.py."""
    data = training.random_data((1, 8, 8), 16)
    net = build("tiny", 10, 1)
    seen = []
    net.register_forward_hook(lambda module, args, out: seen.append((len(args[0]), module.training)))
    config = TrainConfig(epochs=1, batch_size=8, crop_padding=1)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    training.plain_loop(net, torch.optim.SGD(net.parameters(), 0.1), data, config)
    assert seen == 2 * ([(4, False)] * 7 + [(4, True)] * 2)
    assert sum(count for count, _ in seen) / 16 == training.PASSES["forward_passes"]
    assert all(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_rows_tell_the_ratio():
    plain, ours = training.measure("tiny", 4, steps=1, rounds=1, device="cpu", amp="bf16")
    assert ours["runner"] == "smart.train" and ours["rewire_s"] > 0 and plain["dtype"] == "bfloat16"
    assert abs(ours["ratio"] - ours["images_per_s"] / plain["images_per_s"]) < 0.01

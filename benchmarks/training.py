"""Images a second of the trainer beside a plain loop of dense PyTorch: ``python -m benchmarks.training``.

The trainer runs SMART: two paths with masks of density 0.2 each, two batch norms, sparse momentum, the loss and the
weights checked, logs and the check on (one) validation image included. The plain loop is adversarial training of the
dense network without masks or second norms, with the same passes over each batch of N images: PGD-7 on the second half,
then one forward and backward pass of both halves. That is 4.5 forward and 4.5 backward passes an image, of which 3.5
backward ones, those of the attack, go to the images only. Batches and augmentation are made by the same code.

Both train in turns, a few steps each; ``ratio`` is the median over turns of the plain loop's time by the trainer's, so
0.9 means that the trainer takes 10 % fewer images a second. What a rewiring takes is in ``rewire_s``, to be compared
with an epoch's length: it happens once in each.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from smart.config import TrainConfig
from smart.data import ImageData, batches
from smart.models import build, create_model
from smart.numerics import AMP, autocast
from smart.results import write_results
from smart.rewire import Rewirer
from smart.train import train

DENSITY = 0.2
DTYPES = {"off": "float32", "bf16": "bfloat16"}
PASSES = {"forward_passes": 4.5, "backward_passes": 4.5, "of_them_to_images_only": 3.5}
# Network, (C, H, W) of its images, batch.
CASES = {"tiny": ((1, 8, 8), 64), "resnet18": ((3, 32, 32), 16), "wrn_40_2": ((3, 32, 32), 16)}


def random_data(shape: tuple[int, int, int], count: int) -> ImageData:
    """Random bytes of 10 classes, with one image to validate on."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 10
    held_out = images[:1], labels[:1]
    return ImageData("random", [str(label) for label in range(10)], (images, labels), held_out, held_out)


def plain_loop(net: nn.Module, optimizer: torch.optim.Optimizer, data: ImageData, config: TrainConfig) -> None:
    """One epoch of adversarial training as one would write it in PyTorch."""
    device = next(net.parameters()).device
    mean, std = (torch.tensor(each, device=device).view(1, -1, 1, 1) for each in (data.mean, data.std))
    images, labels = (tensor.to(device) for tensor in data.train)

    def logits(x: Tensor) -> Tensor:
        return net((x - mean) / std)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        net.eval()
        low, high = (x - config.eps).clamp(0, 1), (x + config.eps).clamp(0, 1)
        adv = (x + config.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        for _ in range(config.attack_steps):
            adv.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits(adv), y), adv)
            adv = torch.clamp(adv.detach() + config.attack_step * gradient.sign(), low, high)
        net.train()
        return adv

    for x, y in batches(images, labels, config.batch_size, None, config.crop_padding, config.flip):
        half = len(x) // 2
        with autocast(config.amp, device):
            adv = attack(x[half:], y[half:])
            loss = 0.5 * F.cross_entropy(logits(x[:half]), y[:half]) + 0.5 * F.cross_entropy(logits(adv), y[half:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def measure(network: str, batch: int, steps: int, rounds: int, device: str, amp: str) -> list[dict[str, Any]]:
    """Both in turns; a row for each."""
    shape, _ = CASES[network]
    data = random_data(shape, batch * steps)
    config = TrainConfig(epochs=1, batch_size=batch, val_attack_steps=1, amp=amp)
    model = create_model(network, 10, shape[0], DENSITY, mean=data.mean, std=data.std).to(device)
    net = build(network, 10, shape[0]).to(device)
    optimizer = torch.optim.SGD(net.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    runners: dict[str, Callable[[], object]] = {
        "plain PyTorch, dense": lambda: plain_loop(net, optimizer, data, config),
        "smart.train": lambda: train(model, data, config, progress=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        # Which goes first changes, so that a drift of the machine favours neither.
        for name in list(runners)[:: 1 if turn % 2 else -1]:
            taken = _seconds(runners[name], device)
            # The first turn is a warm-up.
            if turn:
                seconds[name].append(taken)
    plain, ours = seconds.values()
    common = {"network": network, "pattern": "unstructured", "density": DENSITY, "batch": batch, "dtype": DTYPES[amp]}
    common |= {"device": device, "threads": torch.get_num_threads(), "path": "both", "steps": steps, "rounds": rounds}
    rows = [
        {**common, **PASSES, "runner": name, "images_per_s": round(batch * steps / median(taken), 3)}
        for name, taken in seconds.items()
    ]
    rows[1]["ratio"] = round(median(p / o for p, o in zip(plain, ours, strict=True)), 4)
    rows[1]["rewire_s"] = round(_rewiring(model), 4)
    return rows


def _rewiring(model: nn.Module) -> float:
    rewirer = Rewirer(model)
    for momentum in rewirer.state_dict().values():
        momentum.normal_()
    try:
        return _seconds(lambda: rewirer.rewire(0.1), next(model.parameters()).device.type)
    finally:
        rewirer.close()


def _seconds(work: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def main() -> None:
    """Measures and writes what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*CASES, []], default=[], metavar="NETWORK")
    parser.add_argument("--batch", type=int, help="(default: a small one, for a CPU)")
    parser.add_argument("--steps", type=int, default=4, help="of a turn (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--amp", choices=AMP, default="off", help="(default: off)")
    parser.add_argument("--out", type=Path, help="results file to write")
    arguments = parser.parse_args()
    rows = []
    for network in tqdm(arguments.networks or list(CASES), unit="network", file=sys.stderr):
        batch = arguments.batch or CASES[network][1]
        rows += measure(network, batch, arguments.steps, arguments.rounds, arguments.device, arguments.amp)
        plain, ours = (row["images_per_s"] for row in rows[-2:])
        told = f"plain {plain:.1f}, smart.train {ours:.1f} images/s, ratio {rows[-1]['ratio']:.3f}"
        tqdm.write(f"{network}, batch {batch}: {told}; a rewiring takes {rows[-1]['rewire_s']:.3f} s")
    if arguments.out:
        write_results(rows, arguments.out, shlex.join(["python", "-m", "benchmarks.training", *sys.argv[1:]]))


if __name__ == "__main__":
    main()

"""Trains and attacks every case of the studies: ``python -m benchmarks.studies.run --data fashion_mnist``.

The results file is written after every run of a case, so that a study that is stopped loses only the run it was at; the
same command goes on with it. Runs go seed by seed: what is there at any time has nearly the same seeds in each case.

``--strong N`` sets stronger attacks, AutoAttack among them, on N of the test images: several times as long as the rest.
``--dial`` measures every position of each network's dials.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import smart
from benchmarks.studies import dial, strong
from benchmarks.studies.cases import ATTACKS, CASES, IMAGES, NETWORK, RECIPE, STUDIES, StudyCase
from smart import ImageData, results
from smart.cards import images_sha256
from smart.costs import macs, nonzeros
from smart.data import load_data, stratified_split
from smart.methods import find_method
from smart.named_attacks import check_attack
from smart_kernels.paths import PATHS

RESULTS = Path(__file__).parent.parent / "results" / "studies"
Row = dict[str, Any]
Split = tuple[Tensor, Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs what is not in the results file yet."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    command = f"python -m benchmarks.studies.run {shlex.join(sys.argv[1:] if argv is None else argv)}"
    torch.set_num_threads(arguments.threads)
    commit = results.commit()
    chosen = {case.name: case for name in arguments.studies for case in STUDIES[name].cases}
    runs = [(seed, case) for seed in range(arguments.seeds) for case in chosen.values() if arguments.only in case.name]
    if not runs:
        parser.error(f"no case's name contains {arguments.only!r}: there are {', '.join(chosen)}")
    if arguments.strong < 0:
        parser.error(f"--strong is {arguments.strong}: give a number of test images, or 0 for no stronger attacks")
    try:
        data = subset(load_data(arguments.data, data_root=arguments.data_root))
        about = {"data": describe(data), "threads": arguments.threads, "network": NETWORK, "recipe": RECIPE.to_dict()}
        strong_on = None
        if arguments.strong:
            check_attack(strong.STRONGEST)
            strong_on = _part(data.test, arguments.strong)
            about["strong"] = {"restarts": strong.RESTARTS, **_described(strong_on)}
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    folder = RESULTS / "attacks" if arguments.strong else RESULTS / "dial" if arguments.dial else RESULTS
    file = arguments.out or folder / f"{data.name}-cpu-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    old = _old(file, results.results([], command, commit) | about, parser)
    rows = old["rows"] if old else []
    before = old["command"].split("; ") if old else []
    commands = "; ".join([*(each for each in before if each != command), command])
    done = {(row["seed"], row["case"]) for row in rows}
    left = [(seed, case) for seed, case in runs if (seed, case.name) not in done]
    for seed, case in tqdm(left, unit="run", file=sys.stderr):
        kept = arguments.runs / f"{data.name}-{list(CASES).index(case.name):02d}-seed{seed}"
        row = measure(case, seed, data, kept, strong_on, arguments.dial)
        rows.append(row)
        results.write(results.results(rows, commands, commit) | about, file)
        tqdm.write(f"{case.name}, seed {seed}: {_summary(row)}", file=sys.stderr)
    print(f"{file} holds {len(rows)} runs, of these {len(left)} new ones")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.run",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="as for smart train: a name, a folder of images, an .npz file")
    parser.add_argument("--data-root", default="data", help="folder that holds the published files")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="STUDY", help="to run")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument(
        "--strong", type=int, default=0, metavar="N", help="test images to set stronger attacks on (needs pyautoattack)"
    )
    parser.add_argument("--dial", action="store_true", help="measure every position of the dials, too")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="folder to keep the networks in")
    parser.add_argument(
        "--out",
        type=Path,
        help="results file (default: one of today in benchmarks/results/studies, or its folders attacks and dial)",
    )
    return parser


def subset(data: ImageData) -> ImageData:
    """As many images of each split as the studies use, in each class the same part of them."""
    generator = torch.Generator().manual_seed(0)
    splits = {split: _part(getattr(data, split), count, generator) for split, count in IMAGES.items()}
    return ImageData(data.name, data.class_names, **splits)


def _part(split: Split, count: int, generator: torch.Generator | None = None) -> Split:
    """Of each class the same part, ``count`` images in all; the split itself where it has no more."""
    if count >= len(split[1]):
        return split
    return stratified_split(*split, count / len(split[1]), generator or torch.Generator().manual_seed(0))[1]


def describe(data: ImageData) -> dict[str, Any]:
    """The name, and of each split the number of images and their SHA-256."""
    splits = {split: _described(getattr(data, split)) for split in IMAGES}
    return {"name": data.name, "image": list(data.image_shape), **splits}


def _described(split: Split) -> dict[str, Any]:
    return {"images": len(split[1]), "sha256": images_sha256(*split)}


def _old(file: Path, new: results.Results, parser: argparse.ArgumentParser) -> results.Results | None:
    """What the file holds already, if it is of the same data, recipe, machine, commit and versions."""
    if not file.exists():
        return None
    old = results.read(file)
    why = results.mismatch(old, new)
    for key in ("data", "threads", "network", "recipe", "strong"):
        if old.get(key) != new.get(key):
            why = f"its {key} is {old.get(key)}, here it is {new.get(key)}"
    if why:
        parser.error(f"{file} is of another study: {why}; give another file as --out")
    return old


def measure(
    case: StudyCase, seed: int, data: ImageData, folder: Path, strong_on: Split | None = None, turned: bool = False
) -> Row:
    """Trains a case, and attacks the best epoch on the test images; seconds are those of the processor.

    Args:
        strong_on: images and labels to set stronger attacks on, too.
        turned: whether to measure the dials, too.
    """
    model = case.model(data, seed)
    begin = time.process_time()
    trained = smart.train(model, data, case.config(seed), folder, progress=False, overwrite=True)
    training = time.process_time() - begin
    trained.load_best(model)
    # Without norms of its own each path is the same network.
    paths = PATHS if find_method(case.method).norms != "single" else PATHS[1:]
    table = smart.evaluate(model, data, ATTACKS, paths, eps=RECIPE.eps, seed=seed, transfer=True)
    row = {
        "case": case.name,
        "seed": seed,
        "method": case.method,
        "masks": case.masks,
        "training": case.training,
        "epoch": trained.best["epoch"],
        "val_clean": trained.best["val_clean"],
        "val_adv": trained.best["val_adv"],
        **{f"test_{key}": value for key, value in table.settings.items()},
        "accuracy": _of_both(table),
        "robust": _of_both(table.worst),
        "transfer": table.transfer,
        "nonzeros": nonzeros(model),
        "macs": macs(model, data.image_shape),
        "train_cpu_s": round(training, 1),
        "test_cpu_s": round(time.process_time() - begin - training, 1),
    }
    if strong_on is not None:
        begin = time.process_time()
        row["strong"] = strong.attack(model, *strong_on, paths, seed)
        row["strong_cpu_s"] = round(time.process_time() - begin, 1)
    if turned:
        row["dial"] = dial.turn(model, data, seed)
    return row


def _of_both(found: Mapping[str, Any]) -> dict[str, Any]:
    """What was found for each path; a network without norms of its own was tested on the last alone."""
    return {path: found.get(path, found[PATHS[-1]]) for path in PATHS}


def _summary(row: Row) -> str:
    clean, robust = 100 * row["accuracy"]["clean"]["clean"], 100 * row["robust"]["adv"]
    return f"clean path {clean:.1f} %, adversarial path attacked {robust:.1f} %, {row['train_cpu_s']:.0f} s"


if __name__ == "__main__":
    main()

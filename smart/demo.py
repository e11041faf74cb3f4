"""The whole idea in a few minutes on a CPU: train two paths on real images, skip their zeros, verify, measure."""

from __future__ import annotations

import json
import shlex
import textwrap
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import smart_kernels
from smart import bench, plots, text
from smart.checkpoint import CheckpointError, save_checkpoint, versions
from smart.costs import macs, nonzeros
from smart.data import ImageData
from smart.evaluate import Evaluation, evaluate
from smart.layers import SmartConv2d, SmartNet, smart_convs
from smart.progress import hidden
from smart.recipes import demo_config
from smart.results import write_results
from smart.settings import Settings
from smart.train import TrainResult, train
from smart_kernels.files import write_text
from smart_kernels.paths import PATHS

MODEL = "tiny"
ATTACKS = ("clean", "fgsm", "pgd20")
LAMBDAS = (0.25, 0.5, 0.75)
BATCHES = (1, 16)


def run_demo(
    out: str | Path,
    epochs: int | None = None,
    seed: int = 0,
    density: float | Mapping[str, float] = 0.2,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains ``tiny`` on scikit-learn's digits, evaluates, swaps, verifies, saves and times it; prints a summary.

    A run that was stopped is gone on with by the next call with the same settings; after a finished one, the next
    starts anew. ``report.json`` is written last: where it is, the run is finished.

    Args:
        out: folder of report.json, checkpoint.safetensors, packed.safetensors, benchmark.json, settings.yaml, the
            pictures, and ``training/`` with the run's log and checkpoints.
        epochs: default: the recipe's.
        density: of each path, or {"clean": d, "adv": d}.

    Returns:
        What is in report.json.

    Raises:
        ImportError: scikit-learn is missing.
        OSError: ``out`` cannot be written.
        VerificationError: the swapped network computes something else.
    """
    out, started = Path(out), time.perf_counter()
    config = demo_config(seed=seed, **({"epochs": epochs} if epochs is not None else {}))
    settings = Settings.resolve({"model": MODEL, "density": density, **config.to_dict()})
    data = settings.load_data()

    print(f"1/4  training both paths on {data.name}, {len(data.train[0])} images, {config.epochs} epochs")
    model, result = _train(settings, data, out, progress)
    settings.write(out)
    checkpoint = out / "checkpoint.safetensors"
    save_checkpoint(checkpoint, model, {"config": config.to_dict(), "epoch": result.best["epoch"]})

    print(f"2/4  attacking both paths, and {len(LAMBDAS)} positions of the dial, on {len(data.test[0])} test images")
    table = evaluate(model, data, ATTACKS, PATHS, LAMBDAS, config.eps, seed=seed, progress=progress)

    print("3/4  swapping to sparse kernels, verifying, saving, and verifying what was saved")
    images = data.floats("test")
    sparse = smart_kernels.swap(model, images[: max(BATCHES)])
    errors = [smart_kernels.verify(model, sparse, images)]
    packed = out / "packed.safetensors"
    smart_kernels.save(sparse, packed)
    errors.append(smart_kernels.verify(model, smart_kernels.load(packed), images))

    print(f"4/4  timing it beside dense PyTorch, {torch.get_num_threads()} threads")
    rows = bench.benchmark(
        model,
        sparse,
        images[: max(BATCHES)],
        BATCHES,
        PATHS,
        ("eager", "fused"),
        network=MODEL,
        progress=partial(tqdm, desc="bench", unit="batch", disable=hidden(progress)),
    )
    write_results(rows, out / "benchmark.json", _command(out, settings))

    facts = {
        "file_bytes": packed.stat().st_size,
        "attack": table.settings,
        "epochs": {"trained": len(result.history), "best": result.best["epoch"]},
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    report = {**_report(settings, data, model, sparse, table, rows, errors), **facts}
    pictures = _draw(out, model, report)
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    files = ["report.json", "benchmark.json", checkpoint.name, packed.name, *pictures, "training/"]
    print(f"\n{summary(report)}\n")
    print(textwrap.fill(f"Written in {out}: {', '.join(files)}", 100, subsequent_indent="  ", break_long_words=False))
    return report


def _train(settings: Settings, data: ImageData, out: Path, progress: bool) -> tuple[SmartNet, TrainResult]:
    """Trains in ``out/training``, going on where an unfinished run of the same settings stopped; gives the best."""
    folder = out / "training"
    result = None
    model = settings.create_model_for(data)
    if not (out / "report.json").exists():
        try:
            result = train(model, data, settings.config, folder, resume=True, progress=progress)
        except FileNotFoundError:
            pass  # nothing to go on with
        except (CheckpointError, ValueError) as error:
            print(f"     starting anew: {error}")
            model = settings.create_model_for(data)
    if result is None:
        (out / "report.json").unlink(missing_ok=True)
        result = train(model, data, settings.config, folder, progress=progress, overwrite=True)
    result.load_best(model)
    return model, result


def _command(out: Path, settings: Settings) -> str:
    """What repeats the demo, with every default spelt out."""
    densities = ",".join(f"{each:g}" for each in settings.model["density"].values())
    flags = {"out": out, "epochs": settings.config.epochs, "seed": settings.config.seed, "density": densities}
    return shlex.join(["smart", "demo", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])


def _report(
    settings: Settings,
    data: ImageData,
    model: SmartNet,
    sparse: smart_kernels.SparseModel,
    table: Evaluation,
    rows: Sequence[Mapping[str, Any]],
    errors: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """What was measured, as report.json has it; errors are the worst of ``errors`` for each path."""
    counts, cost = nonzeros(model), macs(model, data.image_shape)
    densities = settings.model["density"]
    return {
        "data": data.name,
        "model": MODEL,
        "seed": settings.config.seed,
        "density": densities["clean"] if len(set(densities.values())) == 1 else densities,
        "eps": settings.config.eps,
        "accuracy": {path: table[path] for path in PATHS},
        "nonzero_params": counts,
        "macs": {key: cost[key] for key in ("dense", *PATHS)},
        "bytes": {"dense": 4 * counts["dense"], "packed": sparse.weight_bytes},
        "latency_ms": {str(batch): _latency(rows, batch, "eager") for batch in BATCHES},
        "max_rel_error": {path: max(each[path] for each in errors) for path in PATHS},
        "lambda": {key: row for key, row in table.items() if key not in PATHS},
        "latency_ms_fused": {str(batch): _latency(rows, batch, "fused")["dense"] for batch in BATCHES},
    }


def _latency(rows: Sequence[Mapping[str, Any]], batch: int, peer: str) -> dict[str, float]:
    """Median milliseconds at a batch size: of a dense peer, and of both sparse paths."""
    median = {(row["runner"], row["path"]): round(row["ms_p50"], 4) for row in rows if row["batch"] == batch}
    return {"dense": median[peer, "clean"], **{path: median[bench.SPARSE, path] for path in PATHS}}


def _draw(out: Path, model: SmartNet, report: Mapping[str, Any]) -> list[str]:
    """Draws the pictures into ``out``; returns their names, none without matplotlib."""
    if why := plots.missing():
        print(f"     no pictures: {why}")
        return []
    title = f"{report['model']} on {report['data']}, density {_density(report)} a path"
    dial = {float(at): row for at, row in report["lambda"].items()}
    plots.plot_accuracy(out / "accuracy.png", report["accuracy"], dial, report["eps"], title)
    # A 1x1 kernel has no inside to look at.
    layers = [(name, layer) for name, layer in smart_convs(model).items() if layer.weight[0, 0].numel() > 1]
    name, layer = max(layers, key=lambda item: _difference(item[1]))
    plots.plot_masks(out / "masks.png", layer.masks, name.removeprefix("net."))
    latency = {
        batch: {
            "dense": case["dense"],
            "dense, norms folded": report["latency_ms_fused"][batch],
            "sparse, clean path": case["clean"],
            "sparse, adv path": case["adv"],
        }
        for batch, case in report["latency_ms"].items()
    }
    dense, held = report["bytes"]["dense"], report["bytes"]["packed"]
    memory = {
        "dense": dense,
        "dense, a copy a path": 2 * dense,
        "sparse, both paths": held,
        "its file, all of it": report["file_bytes"],
    }
    plots.plot_latency(out / "latency.png", latency, memory, f"{title}, {report['threads']} CPU threads")
    return ["accuracy.png", "masks.png", "latency.png"]


def _difference(layer: SmartConv2d) -> float:
    """The share of a layer's weights that live in one path only."""
    return float((layer.mask_clean != layer.mask_adv).double().mean())


def summary(report: Mapping[str, Any]) -> str:
    """The report as text, at most 100 columns wide."""
    clean, adv = ({path: report["accuracy"][path]} for path in PATHS)
    accuracy = text.accuracy_table(clean | report["lambda"] | adv, indent=2)
    counts, cost, size = report["nonzero_params"], report["macs"], report["bytes"]
    work = [["", "dense", "clean", "adv", "both"]]
    for what, row, both in (("non-zero weights", counts, counts["union"]), ("multiplications", cost, None)):
        cells = [text.short(row["dense"])]
        cells += [f"{text.short(row[path])} ({row['dense'] / row[path]:.1f}x fewer)" for path in PATHS]
        work.append([what, *cells, f"{text.short(both)} ({row['dense'] / both:.1f}x fewer)" if both else ""])
    packed = f"{text.size(size['packed'])} ({text.compare(size['packed'], size['dense'], 'smaller', 'larger')})"
    work.append(["weight memory", text.size(size["dense"]), "", "", packed])

    times = [["batch", "dense", "norms folded", "sparse clean", "sparse adv"]]
    for batch, case in report["latency_ms"].items():
        fused = report["latency_ms_fused"][batch]
        cells = [
            f"{value:.2f} ms ({text.compare(value, case['dense'], 'faster', 'slower')})"
            for value in (fused, case["clean"], case["adv"])
        ]
        times.append([batch, f"{case['dense']:.2f} ms", *cells])

    errors = ", ".join(f"{path} {error:.0e}" for path, error in report["max_rel_error"].items())
    heading = (
        f"{report['model']} on {report['data']}: {report['attack']['n_examples']} test images, density "
        f"{_density(report)} a path, trained {report['epochs']['trained']} epochs, {report['seconds']:.0f} s in all"
    )
    parts = [
        heading,
        f"Accuracy, attacked within L-infinity eps {report['eps']:g}; lambda is the dial between the paths\n{accuracy}",
        f"Convolutions\n{text.align(work, indent=2)}",
        f"Latency, medians of interleaved runs, {report['threads']} threads\n{text.align(times, indent=2)}",
        f"Largest relative error of the sparse network, before and after saving: {errors}",
    ]
    return "\n\n".join(parts)


def _density(report: Mapping[str, Any]) -> str:
    density = report["density"]
    return f"{density:g}" if isinstance(density, float) else " and ".join(f"{d:g}" for d in density.values())

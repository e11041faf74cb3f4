"""Pictures of a trained and measured network. They need matplotlib; :func:`missing` says whether it is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smart.bench_tables import Case, cases
from smart.text import attack_name, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers too.
CLEAN, ADV, BOTH, NEITHER, DENSE, OTHER = "#0072B2", "#D55E00", "#2B2B2B", "#ECECEC", "#8C8C8C", "#BDBDBD"
# In the order of the number clean + 2 * adv.
KINDS = {"neither path": NEITHER, "clean path only": CLEAN, "adversarial path only": ADV, "both paths": BOTH}
# Of the same palette: no attack, and ever stronger ones.
ATTACKS = ("#009E73", "#E69F00", "#CC79A7", "#56B4E9")
# Dense runners: PyTorch's in greys, other runtimes in light colours.
RUNNERS = {
    "eager": "#DDDDDD",
    "fused": "#BFBFBF",
    "compile": "#9A9A9A",
    "onnxruntime": "#F0D58C",
    "openvino": "#9FD8C4",
    "openvino-bf16": "#5FB79A",
    "ncnn": "#E3BBD1",
    "deepsparse": "#B9DDF1",
    "sparse, clean path": CLEAN,
    "sparse, adv path": ADV,
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
DPI = 150


def missing() -> str | None:
    """Why no pictures can be drawn, in one sentence; None if they can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install matplotlib"
    return None


@contextmanager
def picture(file: str | Path, size: tuple[float, float], title: str, comment: str | None = None) -> Iterator[Figure]:
    """A figure of ``size`` inches that is written to ``file`` when the block ends; ``comment`` goes into the file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: nothing global changes, and no window system is looked for.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontweight="bold")
        yield figure
        # Without the writer's name and version: the same picture is the same file.
        figure.savefig(file, dpi=DPI, metadata={"Software": None, "Comment": comment})


def plot_accuracy(
    file: str | Path,
    paths: Mapping[str, Mapping[str, float]],
    dial: Mapping[float, Mapping[str, float]],
    eps: float,
    title: str,
) -> None:
    """Bars of both paths under each attack, and beside them what the lambda dial does between the paths.

    Args:
        paths: path -> attack -> accuracy in [0, 1], for ``"clean"`` and ``"adv"``.
        dial: lambda -> attack -> accuracy, strictly between the paths.
        eps: L-infinity radius of the attacks.
    """
    with picture(file, (9.6, 4.2), title) as figure:
        bars, curves = figure.subplots(1, 2, sharey=True)
        _accuracy_bars(bars, paths, eps)
        _dial_curves(curves, {0.0: paths["clean"], **dial, 1.0: paths["adv"]})


def _accuracy_bars(axes: Axes, paths: Mapping[str, Mapping[str, float]], eps: float) -> None:
    attacks = list(paths["clean"])
    for shift, (path, colour, label) in zip(
        (-0.2, 0.2), (("clean", CLEAN, "clean path"), ("adv", ADV, "adversarial path")), strict=True
    ):
        heights = [100 * paths[path][attack] for attack in attacks]
        drawn = axes.bar([i + shift for i in range(len(attacks))], heights, 0.38, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.1f", padding=2)
    axes.set_xticks(range(len(attacks)), [attack_name(attack) for attack in attacks])
    axes.set(ylim=(0, 118), yticks=range(0, 101, 20), ylabel="test accuracy (%)")
    axes.set_title(f"Each path, attacked at L$_\\infty$ eps = {eps:.3g}")
    axes.grid(axis="y", color="#E5E5E5")
    axes.legend(loc="upper center", ncols=2)


def _dial_curves(axes: Axes, points: Mapping[float, Mapping[str, float]]) -> None:
    positions = sorted(points)
    for attack, colour in zip(points[0.0], ATTACKS, strict=False):
        heights = [100 * points[at][attack] for at in positions]
        axes.plot(positions, heights, color=colour, marker="o", markersize=4)
        axes.annotate(
            attack_name(attack),
            (positions[-1], heights[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    names = {0.0: "0\nclean path", 1.0: "1\nadversarial path"}
    axes.set_xticks(positions, [names.get(at, f"{at:g}") for at in positions])
    axes.set(xlim=(-0.08, 1.25), xlabel="lambda")
    axes.set_title("The dial between them: one network, no retraining")
    axes.grid(axis="y", color="#E5E5E5")


def plot_masks(file: str | Path, masks: Mapping[str, Tensor], name: str, corner: int = 8, whole: int = 32) -> None:
    """Where the two masks of one layer lie: the layer, a corner of it enlarged, and the shares as a bar.

    Args:
        masks: ``"clean"`` and ``"adv"``, bool (K, C, R, S).
        name: of the layer.
        corner: output and input channels of the enlarged corner.
        whole: as many of a wide layer; with more, single weights could not be seen.
    """
    clean, adv = (masks[path].cpu() for path in ("clean", "adv"))
    kinds = clean.int() + 2 * adv.int()
    k, c, r, s = kinds.shape
    title = f"Where the paths' weights lie in {name}: {k} x {c} kernels of {r} x {s}"
    with picture(file, (9.6, 5.4), title) as figure:
        panels = figure.subplot_mosaic([["whole", "corner"], ["share", "share"]], height_ratios=(9, 1))
        for panel, count, gap in (("whole", whole, 0), ("corner", corner, 1)):
            part = kinds[:count, :count]
            _draw_mosaic(panels[panel], part, gap)
            all_of_it = part.numel() == kinds.numel()
            panels[panel].set_title("All kernels" if all_of_it else f"The first {len(part)} x {part.shape[1]} kernels")
        _draw_shares(panels["share"], kinds)


def _draw_mosaic(axes: Axes, kinds: Tensor, gap: int) -> None:
    """Kernels side by side, output channels down and input channels to the right, ``gap`` white cells between them."""
    from matplotlib.colors import ListedColormap

    k, c, r, s = kinds.shape
    canvas = torch.full((k, c, r + gap, s + gap), len(KINDS))
    canvas[:, :, :r, :s] = kinds
    image = canvas.permute(0, 2, 1, 3).reshape(k * (r + gap), c * (s + gap))
    image = image[: image.shape[0] - gap, : image.shape[1] - gap]
    colours = ListedColormap([*KINDS.values(), "white"])
    axes.imshow(image.numpy(), cmap=colours, vmin=0, vmax=len(KINDS), interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlabel=f"{c} input channels", ylabel=f"{k} output channels")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_shares(axes: Axes, kinds: Tensor) -> None:
    start = 0.0
    labels = list(KINDS)
    # Both paths between the two: so each path is one stretch of the bar.
    for kind in (1, 3, 2, 0):
        share = 100 * float((kinds == kind).double().mean())
        axes.barh(0, share, left=start, color=KINDS[labels[kind]], label=f"{labels[kind]} {share:.1f} %")
        start += share
    axes.set(xlim=(0, 100), ylim=(-0.4, 0.4), yticks=[], xlabel="share of the layer's weights (%)")
    axes.spines["left"].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)


def plot_latency(
    file: str | Path, latency: Mapping[int, Mapping[str, float]], memory: Mapping[str, float], title: str
) -> None:
    """Bars of latency for each batch size, and of the bytes that the weights take.

    Args:
        latency: batch -> runner -> median milliseconds; the others are compared with the first runner.
        memory: what -> bytes; the others are compared with the first.
    """
    with picture(file, (9.6, 2.5 * (len(latency) + 1)), title) as figure:
        *upper, last = figure.subplots(len(latency) + 1, 1)
        for axes, (batch, case) in zip(upper, latency.items(), strict=True):
            _compared_bars(axes, case, f"Latency of a batch of {batch} (ms)", ("faster", "slower"))
        kibibytes = {name: count / 1024 for name, count in memory.items()}
        _compared_bars(last, kibibytes, "Memory of the convolution weights (KiB)", ("smaller", "larger"))


def _compared_bars(axes: Axes, values: Mapping[str, float], heading: str, words: tuple[str, str]) -> None:
    reference, *_ = values.values()
    drawn = axes.barh(list(values), list(values.values()), color=[_colour(name) for name in values], height=0.7)
    notes = [f"{value:.2f}" if value < 100 else f"{value:,.0f}" for value in values.values()]
    notes[1:] = [
        f"{note}, {compare(value, reference, *words)}"
        for note, value in zip(notes[1:], list(values.values())[1:], strict=True)
    ]
    axes.bar_label(drawn, notes, padding=4)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.25 * max(values.values())))
    axes.set_title(heading, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#E5E5E5")


def _colour(name: str) -> str:
    for word, colour in (("clean", CLEAN), ("adv", ADV), ("sparse", BOTH), (",", OTHER)):
        if word in name:
            return colour
    return DENSE


def plot_benchmark(file: str | Path, results: Mapping[str, Any], comment: str | None = None) -> None:
    """Bars of images per second, a panel for each network: every dense peer, and the sparse paths beside them.

    Args:
        results: as in a results file (:mod:`smart.results`).
        comment: goes into the file, unseen.
    """
    panels: dict[str, list[Case]] = {}
    for case in cases(results["rows"]):
        panels.setdefault(case.first["network"], []).append(case)
    counts = sorted({row["threads"] for row in results["rows"]})
    threads = f"{' or '.join(map(str, counts))} thread{'s' if counts[-1] > 1 else ''}"
    machine = results["machine"]["gpu"] or results["machine"]["cpu"]
    title = f"Images per second, sparse beside dense: {machine}, {threads}"
    with picture(file, (9.6, 1.1 + 2.1 * len(panels)), title, comment) as figure:
        grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (network, found) in zip(grid, panels.items(), strict=True):
            _throughput_bars(axes, found, len(counts) > 1)
            axes.set_title(network, loc="left")
        handles = {label: bar for axes in grid for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        note = (
            "Numbers: the slower sparse path against the fastest dense runner of its precision.\n"
            "Thin lines: from the 20th to the 80th percentile."
        )
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, title=note)


def _throughput_bars(axes: Axes, found: Sequence[Case], show_threads: bool) -> None:
    """A group of bars for each case; over it, how the slower sparse path compares with the fastest dense runner."""
    bars = list(dict.fromkeys(name for case in found for name in (*case.dense, *_sparse_bars(case))))
    width = 0.84 / len(bars)
    for i, name in enumerate(bars):
        drawn = [(at, row) for at, case in enumerate(found) if (row := (case.dense | _sparse_bars(case)).get(name))]
        places = [at + (i - (len(bars) - 1) / 2) * width for at, _ in drawn]
        # The time below which 80 % of the runs lie gives the lower rate.
        low, rates, high = ([_rate(row, key) for _, row in drawn] for key in ("ms_p80", "ms_p50", "ms_p20"))
        spread = [[rate - least for rate, least in zip(rates, low, strict=True)]]
        spread.append([most - rate for rate, most in zip(rates, high, strict=True)])
        line = {"elinewidth": 0.7, "ecolor": BOTH}
        axes.bar(places, rates, width, yerr=spread, error_kw=line, color=RUNNERS.get(name, OTHER), label=name)
    for at, case in enumerate(found):
        if ratios := [ratio for row in case.sparse.values() if (ratio := case.speed_up(row))]:
            top = max(_rate(row, "ms_p20") for row in case.sparse.values())
            place = at + (len(bars) - len(case.sparse)) / 2 * width
            note = f"{min(ratios):.2f}x"
            axes.annotate(note, (place, top), (0, 3), textcoords="offset points", ha="center", fontweight="bold")
    labels = [f"batch {case.first['batch']}\ndensity {case.first['density']:.2g}" for case in found]
    if show_threads:
        labels = [f"{label}\n{case.first['threads']} threads" for label, case in zip(labels, found, strict=True)]
    axes.set_xticks(range(len(found)), labels)
    axes.set(xlim=(-0.5, len(found) - 0.5), ylabel="images / s")
    axes.margins(y=0.15)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#E5E5E5")


def _rate(row: Mapping[str, Any], milliseconds: str) -> float:
    return 1e3 * row["batch"] / row[milliseconds]


def _sparse_bars(case: Case) -> dict[str, Mapping[str, Any]]:
    return {f"sparse, {path} path": row for path, row in case.sparse.items()}

"""`smart curve`: accuracy of a checkpoint's paths against the radius of the attack."""

from __future__ import annotations

import argparse

from smart import readers, text
from smart.checkpoint import load_checkpoint
from smart.commands import flags
from smart.commands.shared import DEFAULT_EPS, check_outputs, data_for, say_written
from smart.curves import FACTORS, robustness_curves
from smart.plots_robustness import plot_curves


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=flags.CHECKPOINT)
    flags.data(parser)
    parser.add_argument(
        "--eps",
        nargs="+",
        type=flags.checked(readers.radius),
        help=f"L-infinity radii (default: that of the training times {', '.join(map(str, FACTORS))})",
    )
    flags.one_attack(parser)
    flags.paths(parser)
    flags.lambdas(parser)
    flags.effort(parser)
    flags.outputs(parser, csv="write one row a point", plot="draw the curves")
    flags.progress(parser)
    flags.device(parser, "auto")


def run(args: argparse.Namespace) -> None:
    check_outputs(args)
    model, metadata = load_checkpoint(args.checkpoint, args.device)
    data = data_for(args, model)
    images, labels = (tensor[: args.limit] for tensor in data.test)
    trained = metadata.get("config", {}).get("eps", DEFAULT_EPS)
    curves = robustness_curves(
        model,
        (images, labels),
        args.eps or [min(1.0, factor * trained) for factor in FACTORS],
        args.attack,
        args.paths,
        args.lambdas,
        args.restarts,
        seed=args.seed,
        progress=args.progress,
    )
    used = curves.settings
    print(
        f"{data.name}, {used['n_examples']} test images; {text.attack_name(args.attack)}, restarts {used['restarts']}, "
        f"seed {used['seed']}; accuracy by L-infinity eps"
    )
    lines = [["path", *(text.show(eps) for eps in next(iter(curves.values())))]]
    for name, points in curves.items():
        lines.append([text.path_name(name), *(f"{100 * point['accuracy']:.1f} %" for point in points.values())])
    print(text.align(lines))
    if args.csv:
        curves.write_csv(args.csv)
    if args.plot:
        plot_curves(args.plot, curves, f"{data.name}: accuracy under {text.attack_name(args.attack)}", trained)
    say_written(args.csv, args.plot)

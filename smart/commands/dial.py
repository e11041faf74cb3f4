"""`smart dial`: the trade-off between accuracy and robustness of a checkpoint, at every position of its dials."""

from __future__ import annotations

import argparse
import json

from smart import text
from smart.checkpoint import load_checkpoint
from smart.commands import flags
from smart.commands.shared import attack_eps, check_outputs, data_for, say_written
from smart.dial import DIALS, LAMBDAS, trade_off
from smart.plots_dial import plot_trade_off
from smart_kernels.files import write_text


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=flags.CHECKPOINT)
    flags.data(parser)
    parser.add_argument(
        "--dials",
        nargs="+",
        choices=DIALS,
        help="weights, lambda; first_stages, last_stages: so many of them adversarial (default: all the network has)",
    )
    parser.add_argument(
        "--lambdas",
        nargs="+",
        type=flags.checked(flags.dial),
        default=list(LAMBDAS),
        help=f"of the dial weights, 0 clean to 1 adv (default: {' '.join(f'{at:g}' for at in LAMBDAS)})",
    )
    flags.one_attack(parser)
    flags.radius(parser)
    flags.effort(parser)
    flags.outputs(
        parser, csv="write one row a position", json="write the rows and the settings", plot="draw the curves"
    )
    flags.progress(parser)
    flags.device(parser, "auto")


def run(args: argparse.Namespace) -> None:
    check_outputs(args)
    model, metadata = load_checkpoint(args.checkpoint, args.device)
    data = data_for(args, model)
    table = trade_off(
        model,
        tuple(tensor[: args.limit] for tensor in data.test),
        list(dict.fromkeys(("clean", args.attack))),
        args.dials,
        args.lambdas,
        attack_eps(args, metadata),
        args.step,
        args.restarts,
        seed=args.seed,
        progress=args.progress,
    )
    used = table.settings
    print(
        f"{data.name}, {used['n_examples']} test images; L-infinity eps {text.show(used['eps'])}, PGD step "
        f"{text.show(used['step'])}, restarts {used['restarts']}, seed {used['seed']}; each position attacked itself"
    )
    lines = [["dial", "position", "no attack", text.attack_name(args.attack), "multiplications", "non-zero weights"]]
    for row in table:
        accuracies = [f"{100 * row[attack]:.1f} %" for attack in ("clean", args.attack)]
        costs = [text.short(row["macs"]), text.short(row["nonzeros"])]
        lines.append([row["dial"], f"{row['position']:.3g}", *accuracies, *costs])
    print(text.align(lines))
    if args.csv:
        table.write_csv(args.csv)
    if args.json:
        content = {"checkpoint": args.checkpoint, "data": data.name, **used, "rows": list(table)}
        write_text(args.json, json.dumps(content, indent=2) + "\n")
    if args.plot:
        plot_trade_off(args.plot, table, args.attack, f"{data.name}: one network, every trade-off")
    say_written(args.csv, args.json, args.plot)

"""`smart eval`: accuracy of a checkpoint's paths, clean and attacked."""

from __future__ import annotations

import argparse
import json

from smart import text
from smart.cards import card_path, make_card, write_card
from smart.checkpoint import load_checkpoint
from smart.commands import flags
from smart.commands.shared import attack_eps, check_file, data_for, say_written
from smart.evaluate import evaluate
from smart_kernels.files import write_text


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=flags.CHECKPOINT)
    flags.data(parser)
    flags.attacks(parser, "clean", "fgsm", "pgd20")
    flags.paths(parser)
    flags.lambdas(parser)
    flags.radius(parser)
    flags.number(parser, "--restarts", 1, "of PGD")
    parser.add_argument(
        "--transfer", action="store_true", help="also show each configuration the images made against the others"
    )
    flags.number(parser, "--limit", None, "use only the first so many test images")
    flags.seed(parser)
    flags.outputs(parser, csv="write one row a number", json="write the table and the settings")
    parser.add_argument(
        "--card",
        action="store_true",
        help="write what was measured beside the checkpoint, as JSON",
    )
    flags.progress(parser)
    flags.device(parser, "auto")


def run(args: argparse.Namespace) -> None:
    for file in (args.csv, args.json, card_path(args.checkpoint) if args.card else None):
        check_file(file)
    model, metadata = load_checkpoint(args.checkpoint, args.device)
    data = data_for(args, model)
    images, labels = (tensor[: args.limit] for tensor in data.test)
    eps = attack_eps(args, metadata)
    table = evaluate(
        model,
        (images, labels),
        args.attacks,
        args.paths,
        args.lambdas,
        eps,
        args.step,
        args.restarts,
        seed=args.seed,
        transfer=args.transfer,
        progress=args.progress,
    )
    used = table.settings
    print(
        f"{data.name}, {used['n_examples']} test images; L-infinity eps {text.show(eps)}, "
        f"PGD step {text.show(used['step'])}, restarts {used['restarts']}, seed {used['seed']}"
    )
    print(text.accuracy_table(table, worst=table.worst if len(args.attacks) > 2 else None))
    for attack, matrix in table.transfer.items():
        print(f"\n{text.attack_name(attack)}: made against (line), shown to (column)")
        lines = [[text.path_name(name), *(f"{100 * a:.1f} %" for a in row.values())] for name, row in matrix.items()]
        print(text.align([["", *map(text.path_name, matrix)], *lines]))
    if args.csv:
        table.write_csv(args.csv)
    if args.json:
        content = {"checkpoint": args.checkpoint, "data": data.name, **used, "accuracy": table, "worst": table.worst}
        content |= {"transfer": table.transfer} if table.transfer else {}
        write_text(args.json, json.dumps(content, indent=2) + "\n")
    card = None
    if args.card:
        measured = (data.name, images, labels)
        made = make_card(args.checkpoint, model, metadata, measured, table, args.command_line)
        card = write_card(made, args.checkpoint)
    say_written(args.csv, args.json, card)

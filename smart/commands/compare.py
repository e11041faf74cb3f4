"""`smart compare`: runs beside each other: accuracy, robustness, non-zero weights, multiplications."""

from __future__ import annotations

import argparse
import sys

from smart.commands import flags
from smart.commands.shared import check_outputs, say_written
from smart.compare import compare_runs
from smart.plots_robustness import plot_comparison
from smart_kernels.files import write_text


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that smart train wrote, such as runs/*")
    flags.outputs(parser, csv="write one row a run", markdown="write the table", plot="draw the trade-offs")


def run(args: argparse.Namespace) -> None:
    check_outputs(args)
    found = compare_runs(args.runs)
    print(found.table())
    for remark in found.remarks():
        print(f"smart: {remark}", file=sys.stderr)
    if args.csv:
        found.write_csv(args.csv)
    if args.markdown:
        write_text(args.markdown, found.markdown() + "\n")
    if args.plot:
        plot_comparison(args.plot, found.rows)
    say_written(args.csv, args.markdown, args.plot)

"""`smart compare`: runs beside each other: accuracy, robustness, non-zero weights, multiplications."""

from __future__ import annotations

import argparse
import sys

from smart.commands.shared import check_file, check_plot, say_written
from smart.compare import compare_runs
from smart.plots_robustness import plot_comparison
from smart_kernels.files import write_text


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that smart train wrote, such as runs/*")
    parser.add_argument("--csv", metavar="FILE", help="write one row a run")
    parser.add_argument("--markdown", metavar="FILE", help="write the table")
    parser.add_argument("--plot", metavar="FILE", help="draw the trade-offs, a .png; needs matplotlib")


def run(args: argparse.Namespace) -> None:
    for file in (args.csv, args.markdown, args.plot):
        check_file(file)
    check_plot(args.plot)
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

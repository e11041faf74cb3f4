"""`smart info`: versions, this machine, and which backends load."""

from __future__ import annotations

import argparse

from smart.info import describe


def add_flags(parser: argparse.ArgumentParser) -> None:
    """No flags of its own."""


def run(args: argparse.Namespace) -> None:
    print(describe())

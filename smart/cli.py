"""The command line of `smart`: its commands by name, and what becomes of their errors."""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import smart_kernels
from smart import commands
from smart.commands.shared import Stopped
from smart.conversion import PatternWarning
from smart.settings import UsageError
from smart.version import __version__

# What a user can cause. Anything else is a defect of ours, and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, smart_kernels.VerificationError)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of after a page of flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"smart: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `smart`; the parsed ``command`` is the name of the command, ``run`` its function."""
    parser = Parser(
        prog="smart",
        description="Trains networks with two expert paths, clean and adversarial, and skips their zeros at inference.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"smart {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="on an error, show where in the code it arose")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in commands.COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        command = commands.module(name)
        flags = subparsers.add_parser(name, help=summary, description=description, parents=[common])
        command.add_flags(flags)
        flags.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    args = build_parser().parse_args(argv)
    args.command_line = shlex.join(["smart", *(sys.argv[1:] if argv is None else argv)])
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has enough; nothing is left to be written when Python exits.
        sys.stdout = None
    except UsageError as error:
        return _fail(args, error, 2)
    except USER_ERRORS as error:
        return _fail(args, error, 1)
    except (Stopped, KeyboardInterrupt) as error:
        print(f"\nsmart: {str(error) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


def _fail(args: argparse.Namespace, error: Exception, code: int) -> int:
    if args.traceback:
        traceback.print_exc()
    print(f"smart: error: {_sentence(error)}", file=sys.stderr)
    return code


def _warn(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Ours in one line, as errors are; others as ever."""
    if issubclass(category, PatternWarning):
        print(f"smart: warning: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *place[:2]))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__

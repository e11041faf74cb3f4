"""Plain text for people: aligned tables, short numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any


def align(rows: Sequence[Sequence[str]], indent: int = 0, left: int = 1) -> str:
    """Columns two spaces apart, the first ``left`` of them flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def accuracy_table(
    table: Mapping[str, Mapping[str, float]], indent: int = 0, worst: Mapping[str, float] | None = None
) -> str:
    """Accuracies in percent, a line for each path or lambda and a column for each attack; and one for ``worst``."""
    attacks = list(next(iter(table.values())))
    rows = [["path", *(attack_name(attack) for attack in attacks), *(["all of them"] if worst else [])]]
    for name, row in table.items():
        shares = [row[attack] for attack in attacks] + ([worst[name]] if worst else [])
        rows.append([path_name(name), *(f"{100 * share:.1f} %" for share in shares)])
    return align(rows, indent)


def path_name(name: str) -> str:
    """What to call a path or a lambda."""
    return name if name.isalpha() else f"lambda {name}"


def attack_name(attack: str) -> str:
    """The customary name: no attack, FGSM, PGD-20, PGD-20 CW, Square-100, AutoAttack."""
    if attack == "clean":
        return "no attack"
    if attack == "autoattack":
        return "AutoAttack"
    attack, _, loss = attack.partition("-") if attack.startswith("pgd") else (attack, "", "")
    if loss:
        return f"{attack_name(attack)} {loss.upper()}"
    if attack.startswith("square"):
        return f"Square-{attack.removeprefix('square')}"
    return f"PGD-{attack[3:]}" if attack.startswith("pgd") else attack.upper()


def size(count: float) -> str:
    """Bytes in KiB or MiB."""
    return f"{count / 2**20:.1f} MiB" if count >= 10 * 2**20 else f"{count / 2**10:.1f} KiB"


def short(count: float) -> str:
    """A count in thousands, millions or billions."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.3g}"


def compare(value: float, reference: float, less: str, more: str) -> str:
    """How many times below or above ``reference``: ``"1.62x faster"``."""
    return f"{reference / value:.2f}x {less}" if value <= reference else f"{value / reference:.2f}x {more}"


def show(value: Any) -> str:
    """A value as one would type it: 8/255, not 0.031372549."""
    if not isinstance(value, float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    levels = Fraction(value * 255).limit_denominator(1000)
    # Attack radii are customarily given in grey levels; 0.2, 51 of them, is hardly meant so.
    if levels.denominator == 1 and 0 < levels.numerator <= 16:
        return f"{levels.numerator}/255"
    return f"{value:g}"

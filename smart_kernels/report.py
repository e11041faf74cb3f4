"""What a swap did, layer by layer: rows for programs, a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass
class Row:
    """One convolution or fully connected layer of a swapped network.

    Attributes:
        name: of the layer in the original; a layer used several times has a row for each use, numbered.
        weights: how many the layer has, kept or not.
        density: the share of them that each path keeps.
        backend: what runs it; ``"original"`` for a layer that was left as it was.
        bytes: memory of the packed weight, all paths together; 0 where an earlier row's weight is used again.
        dense_us, sparse_us: medians measured on the example's shape; None where not measured.
    """

    name: str
    pattern: str
    weights: int
    density: dict[str, float]
    backend: str
    why: str
    bytes: int
    dense_us: float | None = None
    sparse_us: float | None = None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Report(list[dict[str, object]]):
    """Rows as dicts; printed, they are a table."""

    def __str__(self) -> str:
        return format_table(self)


def format_table(rows: Sequence[dict[str, object]]) -> str:
    """The rows of ``sparse.report()`` as a text table."""
    header = ("layer", "pattern", "density", "backend", "KiB", "dense us", "sparse us", "why")
    lines = [header]
    for row in rows:
        density = "/".join(f"{value:.2f}" for value in row["density"].values())
        times = ("-" if row[key] is None else f"{row[key]:.0f}" for key in ("dense_us", "sparse_us"))
        lines.append(
            (row["name"], row["pattern"], density, row["backend"], f"{row['bytes'] / 1024:.1f}", *times, row["why"])
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    text = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in lines
    ]
    text.insert(1, "-" * max(len(line) for line in text))
    return "\n".join(text)

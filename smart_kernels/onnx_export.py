"""Dense networks as ONNX files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INPUT, OUTPUT = "images", "output"


def write_onnx(
    network: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: tuple[dict[int, Any], ...], file: Path
) -> None:
    """Writes a network of plain torch layers, and has the result checked by onnx.

    Args:
        inputs, dynamic_shapes: as torch.export.export takes them.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: ONNX cannot express the network.
    """
    check = _checker()
    try:
        with _quiet():
            torch.onnx.export(
                network,
                inputs,
                file,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                input_names=[INPUT],
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        raise ValueError(f"torch cannot write the network as ONNX: {first_line(error)}") from error
    check(str(file), full_check=True)


def _checker() -> Callable[..., None]:
    try:
        import onnx
        import onnxscript  # noqa: F401 (what torch writes ONNX with)
    except ImportError as error:
        raise ImportError(
            f"format 'onnx' needs {error.name}: pip install onnx onnxscript, or this package with the extra [onnx]"
        ) from error
    return onnx.checker.check_model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about its own calls, and about operators of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def first_line(error: Exception) -> str:
    """An error's kind and the first line of what it says: torch's go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

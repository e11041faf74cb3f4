"""The Square Attack: an L-infinity attack that asks for logits only, so that it also attacks a swapped network."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from smart.attacks import check_count, check_eps, check_images
from smart.modes import eval_mode

# Share of the image that the first squares cover; AutoAttack's choice, meant for adversarially trained networks.
FIRST_SHARE = 0.8
# The share is halved after each of these queries, of 10,000; other numbers of queries scale them.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    model: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    path: str | float | Tensor = "clean",
    eps: float = 8 / 255,
    queries: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random search without gradients (Andriushchenko et al. 2020, the L-infinity version), within ``eps`` and [0, 1].

    Starts from vertical stripes of +-eps, then sets one random square of each image to +-eps per channel, and keeps it
    where it lowers the margin between the true class and the best other one. An image is done, and asked about no
    more, once it fools the model; one that does so from the start is returned as it is. What an image is tried with
    depends on ``generator`` and its place in the batch, not on how the other images fare.

    Args:
        model: called as ``model(x, path=path)`` without gradients; returns logits (N, classes). A module runs in eval
            mode and is left as it was; a :class:`smart_kernels.SparseModel` or a function does as well.
        x: (N, C, H, W), float in [0, 1].
        y: true labels (N,), integers.
        path: the path attacked, of any kind that the model accepts.
        eps: radius in units of the [0, 1] range.
        queries: attacked images that the model is asked about, for each image; the image itself is not counted.
        generator: of the stripes and squares; default: torch's global random state.

    Returns:
        Attacked images like ``x``, without a gradient history.

    Raises:
        ValueError: eps outside [0, 1]; queries not positive; x outside [0, 1] or no batch of images; labels of another
            shape.
    """
    check_eps(eps)
    check_count("queries", queries)
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}: give images (N, C, H, W)")
    check_images(x, y)
    still = eval_mode(model) if isinstance(model, nn.Module) else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), still:
        x, y = x.detach().clone(), y.long()
        best = x.clone()
        _, fooled = _ask(model, x, y, path)
        # The stripes are where the search starts, whatever they do to the margin.
        margin = torch.full(y.shape, math.inf, device=x.device)
        for query in range(queries):
            left = (~fooled).nonzero().flatten()
            if not len(left):
                break
            if query == 0:
                tried = _stripes(x, eps, generator)
            else:
                tried = _with_square(best, x, eps, _side(query - 1, queries, x.shape), generator)
            new_margin, new_fooled = _ask(model, tried[left], y[left], path[left] if isinstance(path, Tensor) else path)
            # Where two classes tie, a fooled model need not have a lower margin.
            better = (new_margin < margin[left]) | new_fooled
            kept = left[better]
            best[kept], margin[kept], fooled[kept] = tried[kept], new_margin[better], new_fooled[better]
        return best


def _ask(model: Callable[..., Tensor], x: Tensor, y: Tensor, path: str | float | Tensor) -> tuple[Tensor, Tensor]:
    """Per sample: the logit of the true class less the highest other one, float32, and whether the model is fooled."""
    logits = model(x, path=path)
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return (logits.gather(1, y[:, None])[:, 0] - others).float(), logits.argmax(1) != y


def _side(step: int, queries: int, shape: torch.Size) -> int:
    """Side of the square that the published schedule tries at ``step``, counted from 0, on images of this shape."""
    height, width = shape[2:]
    share = FIRST_SHARE / 2 ** bisect_left(HALVED_AFTER, step * 10_000 // queries)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def _stripes(x: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    """Each column of each channel of ``x`` moved by +eps or by -eps."""
    n, channels, _, width = x.shape
    return (x + eps * _signs((n, channels, 1, width), x, generator)).clamp(0, 1)


def _with_square(best: Tensor, x: Tensor, eps: float, side: int, generator: torch.Generator | None) -> Tensor:
    """``best`` with one random square of each image set to ``x`` +-eps, one sign per channel."""
    n, channels, height, width = x.shape
    rows = _interval(height, side, n, generator, x.device)
    columns = _interval(width, side, n, generator, x.device)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    shift = eps * _signs((n, channels, 1, 1), x, generator)
    tried = torch.where(inside, (x + shift).clamp(0, 1), best)
    # Asking about the same image again would waste the query; the opposite signs do change it.
    idle = (tried == best).flatten(1).all(1)[:, None, None, None]
    return torch.where(inside & idle, (x - shift).clamp(0, 1), tried)


def _interval(length: int, side: int, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """For each of ``n`` images the positions of a random interval of ``side`` among ``length``, bool (n, length)."""
    source = generator.device if generator is not None else device
    first = torch.randint(0, length - side + 1, (n, 1), generator=generator, device=source).to(device)
    position = torch.arange(length, device=device)
    return (position >= first) & (position < first + side)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """+1 and -1, equally likely, of the dtype and on the device of ``like``."""
    source = generator.device if generator is not None else like.device
    draw = torch.randint(0, 2, shape, generator=generator, device=source)
    return (2 * draw - 1).to(like.device, like.dtype)

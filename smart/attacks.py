"""L-infinity attacks on one path by its gradients: FGSM and PGD.

Both run with every module in eval mode, compute the gradient with respect to the images only, and leave buffers,
``training`` flags and parameter gradients as they were. While they run, the model's flags are changed: another thread
must not train the same model meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smart.attack_losses import AttackLoss, attack_loss
from smart.layers import held_weights
from smart.modes import eval_mode


def fgsm(model: nn.Module, x: Tensor, y: Tensor, path: str | float | Tensor = "clean", eps: float = 8 / 255) -> Tensor:
    """One step of size ``eps`` along the gradient's sign (Goodfellow et al. 2015).

    Args, result and errors as for :func:`pgd`.
    """
    return pgd(model, x, y, path, eps, step=max(eps, 1e-9), steps=1, random_start=False)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    path: str | float | Tensor = "clean",
    eps: float = 8 / 255,
    step: float = 2 / 255,
    steps: int = 7,
    restarts: int = 1,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    loss: str = "ce",
    start: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018), within ``eps`` of ``x`` and within [0, 1].

    Args:
        model: called as ``model(x, path=path)``; returns logits (N, classes).
        x: (N, C, H, W), float in [0, 1].
        y: true labels (N,), integers.
        path: the path attacked, of any kind that the model accepts.
        eps, step: radius and step size in units of the [0, 1] range.
        steps: gradient steps of one run.
        restarts: runs; for each sample the one that fools the model is kept, among equals the one of highest loss.
        random_start: start from a uniform point of the ball instead of ``x``.
        generator: of the random starts; default: torch's global random state.
        loss: that is raised, ``"ce"`` (cross-entropy), ``"cw"`` (margin), ``"dlr"`` or ``"kl"``, see
            :mod:`smart.attack_losses`.
        start: points like ``x`` that the first run starts from instead.

    Returns:
        Attacked images like ``x``, without a gradient history.

    Raises:
        ValueError: eps outside [0, 1]; step, steps or restarts not positive; x outside [0, 1]; labels of another shape;
            an unknown loss, or one that needs a random start.
    """
    check_settings(eps, step, steps, restarts)
    check_images(x, y)
    measure = attack_loss(loss)
    if loss == "kl" and not random_start:
        raise ValueError("the loss 'kl' has no gradient at the image itself: start from a random point")
    # Tensors made in inference mode can never enter autograd, so leave it and work on copies.
    with torch.inference_mode(False), torch.enable_grad(), eval_mode(model), held_weights():
        x, y = x.detach().clone(), y.clone()
        low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        before = _logits(model, x, path) if loss == "kl" else x.new_empty(0)

        def run(adv: Tensor | None = None) -> Tensor:
            if adv is None:
                adv = random_point(x, eps, generator) if random_start else x
            adv = adv.clamp(low, high)
            for _ in range(steps):
                adv = adv.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(measure(model(adv, path=path), y, before).sum(), adv)
                adv = (adv.detach() + step * gradient.sign()).clamp(low, high)
            return adv

        best = run(start)
        if restarts == 1:
            return best
        best_fooled, best_loss = _outcome(model, best, y, path, measure, before)
        for _ in range(restarts - 1):
            adv = run()
            fooled, reached = _outcome(model, adv, y, path, measure, before)
            better = (fooled & ~best_fooled) | ((fooled == best_fooled) & (reached > best_loss))
            best = torch.where(better[:, None, None, None], adv, best)
            best_fooled, best_loss = best_fooled | fooled, torch.where(better, reached, best_loss)
        return best


def random_point(x: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    """Each pixel of ``x`` moved by a uniform draw from [-eps, eps]."""
    device = generator.device if generator is not None else x.device
    draw = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    return x + eps * (2 * draw - 1)


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor, path: str | float | Tensor) -> Tensor:
    return model(x, path=path)


def _outcome(
    model: nn.Module, x: Tensor, y: Tensor, path: str | float | Tensor, measure: AttackLoss, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Per sample: does it fool the model, and its loss; both (N,)."""
    logits = _logits(model, x, path)
    return logits.argmax(1) != y, measure(logits, y, before)


def check_settings(eps: float, step: float, steps: int, restarts: int) -> None:
    """Raises ValueError where the settings of an attack make no sense."""
    check_eps(eps)
    if not 0 < step <= 1:
        raise ValueError(f"the attack's step is {step}: give a part of the [0, 1] range above 0, such as 2/255")
    check_count("steps", steps)
    check_count("restarts", restarts)


def check_eps(eps: float) -> None:
    """Raises ValueError where ``eps`` is no radius within the [0, 1] range."""
    if not 0 <= eps <= 1:
        meant = f"did you mean {eps:g}/255?" if 1 < eps <= 255 else "such as 8/255 for 8 of 255 grey levels"
        raise ValueError(f"eps is {eps}: give a part of the [0, 1] range, {meant}")


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless ``value``, called ``name``, is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: give an integer of at least 1")


def check_images(x: Tensor, y: Tensor) -> None:
    """Raises ValueError, or TypeError for other than tensors, unless ``x`` are images in [0, 1], ``y`` their labels."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, y a {type(y).__name__}: give tensors, such as torch.from_numpy(x)")
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(
            f"y has dtype {y.dtype} and shape {tuple(y.shape)}: give one integer label for each of the {len(x)} images"
        )
    if x.numel() and not (x.amin() >= 0 and x.amax() <= 1):
        raise ValueError(
            "x has values outside [0, 1] or NaN: attacks work on images in [0, 1], normalise inside the model"
        )

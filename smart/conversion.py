"""Any network as a two-path network: masks in its convolutions, two batch norms in the place of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from smart.conditioning import (
    FilmNorm,
    LambdaCode,
    NoisyConv2d,
    NoisySmartConv2d,
    SwitchedBatchNorm2d,
    conditioned_norms,
)
from smart.coupled_masks import CoupledLayers, apply_coupled_masks
from smart.layer_policy import select_layers
from smart.layers import DualBatchNorm2d, SmartConv2d, SmartNet, smart_convs
from smart.mask_plan import MaskPlan
from smart.masks import apply_random_masks, one_mask
from smart.methods import Method, find_method, read_plan
from smart.seeds import derive_seed, seeded
from smart.stages import find_stages, stage_of_each
from smart_kernels.coupling import Stream, find_streams
from smart_kernels.patterns import Channel, Coupled
from smart_kernels.protocol import is_hooked
from smart_kernels.settle import private_copy


class PatternWarning(UserWarning):
    """Layers stay dense because their channels do not divide by the pattern, or are not coupled as it wants."""


def convert(
    module: nn.Module,
    density: float | Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    overlap: str | float = "independent",
    filter_fn: Callable[[nn.Module, str], bool] = lambda module, name: True,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    allocation: str = "uniform",
    masked_layers: str | Sequence[str] = "all",
    dedicated_layers: str | Sequence[str] = "all",
    stages: Sequence[str] | None = None,
    strict: bool = False,
    method: str = "smart",
) -> SmartNet:
    """Puts two masks into the convolutions of a network and two batch norms in the place of each.

    For another method than SMART it puts in what that needs instead: see :mod:`smart.methods`.

    ``module`` itself is not changed. Layers used in several places stay shared. Subclasses of ``nn.Conv2d`` and
    ``nn.BatchNorm2d`` compute something of their own and are left as they are.

    Args:
        module: any network whose forward takes one batch (N, C, H, W).
        density: the part of the masked layers' weights that lives, in (0, 1]; a number, or {"clean": d, "adv": d}.
            Default: 0.2; for N:M and V:N:M n/m, and nothing else is accepted.
        pattern: of the masks: ``"unstructured"``, N:M such as ``"2:4"``, V:N:M such as ``"64:2:8"``,
            ``"block:64x16"``, ``"channel"``, or ``"coupled"``, channels that all layers agree on whose outputs are
            added or that read them. A layer whose channels do not divide by it stays dense, with a warning
            that names it; a network that cannot be traced gets ``"channel"`` for ``"coupled"``, with a warning.
        overlap: ``"independent"`` (or ``"free"``), ``"disjoint"``, ``"shared"``, ``"nested"``, or the wanted
            |clean & adv| / min(|clean|, |adv|) as a number in [0, 1]. All but the first hold throughout training
            (so disjoint masks that fill a layer cannot move).
        filter_fn: called with each convolution and its name; False leaves it dense.
        seed: of the masks.
        mean, std: normalisation inside the network, one number per image channel; default: none. Without them the
            channel count is that of the first registered convolution.
        allocation: how density is divided among layers: ``"uniform"``; ``"erk"``, more to small layers (Evci et al.,
            arXiv 1911.11134); ``"global"``, as many as a layer has among the network's largest weights, or blocks.
        masked_layers: of those that ``filter_fn`` accepts: ``"all"``, ``"last_stages"`` (the last two), a name, a
            regular expression that matches whole names, or several of these.
        dedicated_layers: those with a mask for each path, chosen alike, or ``"none"``; others have one for both.
        stages: names of the modules that are the network's stages, in their order; default: the children of
            ``.stages``, or ``.layer1``, ``.layer2`` ...
        strict: a layer whose channels do not divide is an error, and so is a network that cannot be traced.
        method: that the network will be trained by; those without masks take no choice of masks.

    Raises:
        ValueError: no convolution to mask, a layer with hooks or a computed weight, a choice outside what is accepted,
            choices that contradict one another.
        TypeError: ``module`` is not an ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: give an nn.Module")
    if smart_convs(module) or any(isinstance(layer, DualBatchNorm2d) for layer in module.modules()):
        raise ValueError(f"{type(module).__name__} has two paths already: convert a network that has one")
    plan = read_plan(
        method,
        {
            "density": density,
            "pattern": pattern,
            "overlap": overlap,
            "allocation": allocation,
            "masked_layers": masked_layers,
            "dedicated_layers": dedicated_layers,
        },
    )
    convs = {name: m for name, m in module.named_modules() if type(m) is nn.Conv2d}
    accepted = {name for name, conv in convs.items() if filter_fn(conv, name)}
    if not accepted:
        raise ValueError(
            f"{type(module).__name__} has {len(convs)} nn.Conv2d and filter_fn accepts none of them: "
            "give a plain network with convolutions, and a filter that returns True for some"
        )
    _check_own_weights(module)
    names = find_stages(module) if stages is None else list(stages)
    stage = stage_of_each(module, names)
    by_stage = {name: stage[name] for name in convs if name in accepted}
    chosen = select_layers(plan.masked_layers, by_stage, len(names), "masked_layers")
    chosen = _dividing({name: convs[name] for name in by_stage if name in chosen}, plan, strict)
    by_stage = {name: stage[name] for name in by_stage if name in chosen}
    dedicated = select_layers(plan.dedicated_layers, by_stage, len(names), "dedicated_layers")

    if mean is None or std is None:
        channels = len(mean or std or ()) or next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels
        mean = mean if mean is not None else [0.0] * channels
        std = std if std is not None else [1.0] * channels
    how = find_method(method)
    net = private_copy(module)
    with seeded(derive_seed(seed, method), next(net.parameters()).device):
        net = _replace_layers(net, how, chosen if how.masks else set(), stage, names)
    for name, layer in smart_convs(net).items():
        layer.shares_mask = name not in dedicated or one_mask(plan.overlap, plan.density)
    pattern = plan.pattern
    streams = _streams(net, strict) if how.masks and isinstance(pattern, Coupled) else None
    if streams is not None:
        coupled = CoupledLayers(smart_convs(net), streams)
        apply_coupled_masks(coupled, plan.density, plan.overlap, seed, pattern.multiple)
    elif how.masks:
        pattern = Channel() if isinstance(pattern, Coupled) else pattern
        apply_random_masks(smart_convs(net), plan.density, plan.overlap, seed, pattern, plan.allocation)
    smart = SmartNet(net, mean, std, None, str(pattern), plan.overlap, len(names), method, how.film)
    smart.training = module.training
    return smart


def _check_own_weights(module: nn.Module) -> None:
    """Raises ValueError where a layer would lose what it does beside its forward, when another takes its place."""
    for name, layer in module.named_modules():
        if type(layer) not in (nn.Conv2d, nn.BatchNorm2d):
            continue
        if layer.weight is not None and not isinstance(layer.weight, nn.Parameter):
            raise ValueError(
                f"the weight of {name} is computed before each call, as torch.nn.utils.prune and weight_norm do: make "
                "it plain first, by torch.nn.utils.prune.remove or remove_weight_norm"
            )
        if is_hooked(layer):
            raise ValueError(f"{name} has forward hooks, which the layer in its place would lack: remove them, convert")


def _dividing(convs: Mapping[str, nn.Conv2d], plan: MaskPlan, strict: bool) -> set[str]:
    """The layers that can have the pattern; says which cannot.

    Raises:
        ValueError: none can, or with ``strict`` not all.
    """
    misfits = {name: why for name, conv in convs.items() if (why := plan.pattern.misfit(conv.weight.shape))}
    if misfits:
        reasons = dict.fromkeys(misfits.values())
        listing = "; ".join(f"{', '.join(n for n in misfits if misfits[n] == why)}: {why}" for why in reasons)
        message = f"{len(misfits)} of {len(convs)} layers cannot have pattern {plan.pattern}: {listing}"
        if strict or len(misfits) == len(convs):
            raise ValueError(f"{message}. Take a pattern that divides them, or choose others by masked_layers")
        warnings.warn(f"{message}. They stay dense", PatternWarning, stacklevel=3)
    return convs.keys() - misfits.keys()


def _streams(net: nn.Module, strict: bool) -> list[Stream] | None:
    """The streams of the layers' channels; None, with a warning, if the network cannot be traced.

    Raises:
        ValueError: so it is, and ``strict``.
    """
    try:
        return find_streams(net)
    except Exception as error:
        message = (
            f"which channels are coupled cannot be told, as the network cannot be traced ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
        )
        if strict:
            raise ValueError(f"{message}. Take pattern 'channel', or a forward that torch.fx can trace") from error
        warnings.warn(f"{message}. Each layer gets channels of its own: pattern 'channel'", PatternWarning, 3)
        return None


def _replace_layers(
    net: nn.Module, method: Method, masked: set[str], stage: Mapping[str, int], stages: Sequence[str]
) -> nn.Module:
    """Swaps the convolutions and all batch norms of ``net`` for the layers that a method needs, in place."""
    norms = [name for name, layer in net.named_modules() if type(layer) is nn.BatchNorm2d]
    code = LambdaCode() if method.film else None
    conditioned = conditioned_norms(net, norms, stages) if method.film else set()
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in net.named_modules():
        if type(layer) is nn.Conv2d and (name in masked or method.noise):
            replacements[layer] = _conv_for(method, layer, name in masked)
        elif type(layer) is nn.BatchNorm2d:
            replacements[layer] = _norm_for(method, layer, code if name in conditioned else None)
        if layer in replacements:
            for part in replacements[layer].modules():
                if hasattr(part, "stage"):
                    part.stage = stage[name]
    for parent in list(net.modules()):
        for key, child in parent._modules.items():
            if child in replacements:
                parent._modules[key] = replacements[child]
    return replacements.get(net, net)


def _conv_for(method: Method, conv: nn.Conv2d, masked: bool) -> nn.Conv2d:
    if masked:
        return (NoisySmartConv2d if method.noise else SmartConv2d).from_conv(conv)
    return NoisyConv2d.from_conv(conv)


def _norm_for(method: Method, norm: nn.BatchNorm2d, code: LambdaCode | None) -> nn.Module:
    """In the place of a batch norm; with FiLM after it if there is a code to condition it on."""
    if code is not None:
        # Its weights are made on the CPU, from the same draws whatever the device.
        return FilmNorm(norm, code).to(next(norm.parameters(), norm.running_mean).device)
    if method.norms == "switched":
        return SwitchedBatchNorm2d(norm)
    return DualBatchNorm2d(norm, shared=method.norms == "single")

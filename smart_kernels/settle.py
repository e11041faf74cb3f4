"""Makes weights that are computed before each call plain: pruning, parametrizations, weight and spectral norm.

All of these recompute a weight from others whenever their module runs. A swapped network is for inference: the weight
such a module would compute in eval mode becomes its weight.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from smart_kernels.protocol import is_conv, is_linear


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that keep a computed tensor as an attribute, as torch.nn.utils.prune's do."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    computed = (value for value in attributes if isinstance(value, Tensor) and not value.is_leaf)
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside what torch.compile, nn.DataParallel or DistributedDataParallel made of it.

    A bare convolution or fully connected layer becomes a network of one layer.
    """
    if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
        return unwrapped(compiled)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    return nn.Sequential(model) if is_conv(model) or is_linear(model) else model


def settle(model: nn.Module) -> None:
    """Removes all of these from a model in eval mode, in place; its weights keep their values."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            _remove_parametrizations(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif isinstance(hook, (WeightNorm, SpectralNorm)):
                remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
                with warnings.catch_warnings():
                    # Removing what is deprecated is not using it.
                    warnings.simplefilter("ignore")
                    remove(module, hook.name)


@torch.no_grad()
def _remove_parametrizations(module: nn.Module) -> None:
    # torch's own removal deletes the property from a class that a deep copy shares with the original.
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))

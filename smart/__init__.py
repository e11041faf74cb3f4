"""Trains networks with a clean and an adversarial expert path in one sparse weight (SMART, arXiv 2302.03523)."""

from smart.attacks import fgsm, pgd
from smart.auto_attack import auto_attack
from smart.black_box import square
from smart.checkpoint import CheckpointError, load_checkpoint, load_into, save_checkpoint, save_dense
from smart.conversion import convert
from smart.costs import macs, nonzeros
from smart.curves import robustness_curves
from smart.data import ImageData, load_data
from smart.dial import trade_off
from smart.evaluate import Evaluation, evaluate
from smart.layers import DualBatchNorm2d, SmartConv2d, SmartNet
from smart.methods import METHODS
from smart.models import create_model, list_models
from smart.objectives import adversarial_loss, dial_loss, oat_loss, smart_loss, standard_loss, trades_loss
from smart.recipes import demo_config
from smart.rewire import Rewirer
from smart.sanity import sanity_checks
from smart.train import TrainConfig, TrainResult, train
from smart.verify import verify_robustness
from smart.version import __version__

__all__ = [
    "METHODS",
    "CheckpointError",
    "DualBatchNorm2d",
    "Evaluation",
    "ImageData",
    "Rewirer",
    "SmartConv2d",
    "SmartNet",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "adversarial_loss",
    "auto_attack",
    "convert",
    "create_model",
    "demo_config",
    "dial_loss",
    "evaluate",
    "fgsm",
    "list_models",
    "load_checkpoint",
    "load_data",
    "load_into",
    "macs",
    "nonzeros",
    "oat_loss",
    "pgd",
    "robustness_curves",
    "sanity_checks",
    "save_checkpoint",
    "save_dense",
    "smart_loss",
    "square",
    "standard_loss",
    "trade_off",
    "trades_loss",
    "train",
    "verify_robustness",
]

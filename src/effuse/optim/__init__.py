"""Optimizers: drop-in `torch.optim.Optimizer`s with the published update, many tensors a call."""

from .adam_r import AdamR
from .adamp import SGDP, AdamP
from .diffgrad import DiffGrad
from .sgd_sai import SGDSaI

__all__ = ["SGDP", "AdamP", "AdamR", "DiffGrad", "SGDSaI"]

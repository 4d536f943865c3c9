"""Fine-tuning without choosing a learning rate: local quadratic approximation (LQA) for Transformers and PyTorch."""

from .adamw import LQAAdamW, LQACallback
from .checkpoint import ProbeRecord
from .optimizer import LQA
from .quadratic import Fit, Verdict, fit_losses
from .registration import register
from .replay import ReplayedLoss
from .trainer import LQASeq2SeqTrainer, LQATrainer, LQATrainerMixin

__all__ = [
    "LQA",
    "Fit",
    "LQAAdamW",
    "LQACallback",
    "LQASeq2SeqTrainer",
    "LQATrainer",
    "LQATrainerMixin",
    "ProbeRecord",
    "ReplayedLoss",
    "Verdict",
    "fit_losses",
]

__version__ = "0.1.0"

register()

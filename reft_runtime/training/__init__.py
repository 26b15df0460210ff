"""How an intervention is made and judged: training, evaluation, steering directions."""

from reft_runtime.training.check import Check, check
from reft_runtime.training.direction import direction
from reft_runtime.training.evaluate import evaluate
from reft_runtime.training.norms import in_norms
from reft_runtime.training.outcomes import Score
from reft_runtime.training.report import Report
from reft_runtime.training.separation import Separation, separations
from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.train import Trained, train

__all__ = [
    "Check",
    "Report",
    "Score",
    "Separation",
    "TrainSettings",
    "Trained",
    "check",
    "direction",
    "evaluate",
    "in_norms",
    "separations",
    "train",
]

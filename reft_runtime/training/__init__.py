"""How an intervention is made and judged: training, evaluation, steering directions."""

from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.train import Trained, train

__all__ = ["TrainSettings", "Trained", "train"]

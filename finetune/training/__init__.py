"""Training a model on the run's rows: `run_training` is the loop, the other modules are its parts."""

from finetune.training.loop import Trained, run_training

__all__ = ["Trained", "run_training"]

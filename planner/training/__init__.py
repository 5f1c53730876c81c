"""The training run that is tried: model, data, optimizer and the step, for the real and the virtual device alike."""

from planner.training.models import build_model
from planner.training.schedule import phases
from planner.training.step import Training, check_tf32

__all__ = ["Training", "build_model", "check_tf32", "phases"]

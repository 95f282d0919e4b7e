"""What a model weighs and costs, from its config alone: parameters, FLOPs per token, cache bytes per token."""

from glm5_hal.params.config import ModelConfig, load
from glm5_hal.params.report import render, report

__all__ = ["ModelConfig", "load", "render", "report"]

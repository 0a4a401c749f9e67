"""Questions put to a model, and how well it answers them."""

from microtome.evaluation.score import accuracy, score

__all__ = ["accuracy", "score"]

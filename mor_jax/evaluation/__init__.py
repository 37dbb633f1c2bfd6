"""Losses of a trained or imported model on text: `mor evaluate`. docs/evaluation.md."""

from mor_jax.evaluation.eval_config import EvalRequest, config_for
from mor_jax.evaluation.perplexity import Evaluation, TextEvaluation, evaluate

__all__ = ["EvalRequest", "Evaluation", "TextEvaluation", "config_for", "evaluate"]

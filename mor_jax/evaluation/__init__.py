"""What a trained or imported model loses on text: `launch/evaluate.py`. docs/evaluation.md."""

from mor_jax.evaluation.eval_config import Asked, config_for
from mor_jax.evaluation.perplexity import Evaluation, TextEvaluation, evaluate

__all__ = ["Asked", "Evaluation", "TextEvaluation", "config_for", "evaluate"]

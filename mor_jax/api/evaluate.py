"""`mor_jax.evaluate`: losses of a run or an export on text, scores on tasks."""

import os
from collections.abc import Sequence
from typing import Any

from mor_jax.api.source import run_directory
from mor_jax.runtime import platform


def evaluate(
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    sources: Sequence[str] | None = None,
    seq_len: int | None = None,
    batches: int | None = None,
    batch_size: int | None = None,
    calibration: str | None = None,
    recursions: int | None = None,
    tasks: Sequence[str] = (),
    task_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates weights on text, or on tasks of lm-evaluation-harness; the same as `mor evaluate`.

    Args:
        source: a run directory, or an export as `load` takes it.
        step: of the checkpoint; None for the newest good one.
        sources: texts, written like `data.sources`, such as `text:docs/*.md`; None for the
            validation part of the run's own text.
        seq_len, batches, batch_size: of the text; None for those of the run.
        calibration: name or file of thresholds for causal routing.
        recursions: to run instead of those trained.
        tasks: names of lm-evaluation-harness; without `sources` they replace the text.
        task_options: further options of its command, such as `["--num_fewshot=5"]`.

    Returns:
        As `mor evaluate --json` prints it: `loss_causal` (nats per token), `loss_topk` and `leak`
        of routed models, perplexities, bits per byte, accuracies, depths; with tasks their results
        under `tasks`.

    Raises:
        ValueError: no weights, or text or tasks that do not fit them.
    """
    platform.use_cpu_without_accelerator()
    from mor_jax.checkpoint.load_weights import load_run
    from mor_jax.evaluation import EvalRequest
    from mor_jax.evaluation.eval_runner import EvalRunner, Tasks

    request = EvalRequest(
        sources=None if sources is None else tuple(sources),
        length=seq_len,
        batches=batches,
        batch_size=batch_size,
        calibration=calibration,
        recursions=recursions,
    )
    names = Tasks(names=tuple(tasks), options=tuple(task_options)) if tasks else None
    with run_directory(source) as directory:
        weights = load_run(directory, step)
        on_text = names is None or sources is not None
        return EvalRunner(weights.cfg, request, on_text, names)(weights).to_dict()

"""Runs an evaluation: losses on text, tasks of lm-evaluation-harness, or both."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mor_jax.checkpoint.load_weights import RunWeights
from mor_jax.config import TrainConfig
from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check
from mor_jax.evaluation.eval_config import EvalRequest
from mor_jax.evaluation.perplexity import Evaluation, TextEvaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks of lm-evaluation-harness.

    names: as in `--tasks`. options: other options of lm-eval's own command. batch_size: sequences,
    or auto.
    """

    names: tuple[str, ...]
    options: tuple[str, ...] = ()
    batch_size: str | None = None


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Results of one checkpoint. tasks: as `lm_eval.simple_evaluate` returns them."""

    found: RunWeights
    text: Evaluation | None
    tasks: dict[str, Any] | None

    def record(self) -> dict[str, Any]:
        """JSON values for a file of many results: `text` and `tasks`, as requested."""
        made: dict[str, Any] = {} if self.text is None else {"text": self.text.to_dict()}
        if self.tasks is not None:
            made |= {"tasks": self.tasks["results"], "groups": self.tasks.get("groups", {})}
        return made

    def to_dict(self) -> dict[str, Any]:
        """JSON values of this result alone: those of the text, or of text and tasks."""
        if self.tasks is None:
            assert self.text is not None
            return self.text.to_dict()
        facts = {"workdir": str(self.found.path), "step": self.found.step}
        rest = {k: v for k, v in self.tasks.items() if k not in ("results", "groups", "configs")}
        return {**facts, **self.record(), "harness": rest}

    def lines(self) -> list[str]:
        """Tables for a terminal."""
        made = [] if self.text is None else self.text.lines()
        if self.tasks is not None:
            from mor_jax.evaluation.lm_eval import command

            made += [""] if made else [str(self.found)]
            made += ["", *command.lines(self.tasks)]
        return made


class EvalRunner:
    """Runs the same evaluation on every checkpoint of a run; reads text and loads tasks once."""

    def __init__(
        self, cfg: TrainConfig, asked: EvalRequest, text: bool, tasks: Tasks | None
    ) -> None:
        """cfg: of the run. text: whether to evaluate on it.

        Raises `ValueError` if the text or the tasks cannot be loaded, or lm-eval is not installed.
        """
        self._asked, self._tasks = asked, tasks
        self._text = TextEvaluation(cfg, asked) if text else None
        self._cfg = cfg
        self._harness: Any = None
        if tasks is not None:
            rule = "must be 1 with tasks: every device holds all parameters"
            check(asked.fsdp == 1, "fsdp", asked.fsdp, rule, "Leave it out")
            require_package("lm_eval", "tasks", ",".join(tasks.names))
            from mor_jax.evaluation.lm_eval import command

            self._harness = command.prepare(tasks.names, tasks.options, tasks.batch_size)

    def __call__(self, found: RunWeights) -> EvalResult:
        """Raises `ValueError` if the weights do not fit the request."""
        if self._text is not None and found.cfg != self._cfg:
            # The run resumed with other settings.
            self._text, self._cfg = TextEvaluation(found.cfg, self._asked), found.cfg
        text = None if self._text is None else self._text(found)
        tasks = None
        if self._harness is not None:
            given = {name: getattr(self._asked, name) for name in ("calibration", "recursions")}
            given = {name: value for name, value in given.items() if value is not None}
            tasks = self._harness({"path": str(found.path), "step": found.step, **given})
        return EvalResult(found, text, tasks)

    def result(self) -> dict[str, Any]:
        """The request as JSON values; identifies its results in a file of many."""
        made = dataclasses.asdict(self._asked)
        made["text"] = self._text is not None
        return made | ({} if self._tasks is None else {"tasks": dataclasses.asdict(self._tasks)})


def line(record: Mapping[str, Any]) -> str:
    """One record as a line for a terminal."""
    parts = []
    text = record.get("text")
    if text is not None:
        losses = [f"causal {text['loss_causal']:.4f}"] if "loss_topk" in text else []
        if losses:
            losses += [f"top-k {text['loss_topk']:.4f}", f"leak {text['leak']:+.4f}"]
        parts.append(f"loss {', '.join(losses) or format(text['loss_causal'], '.4f')}")
        if text["bits_per_byte_causal"] is not None:
            parts.append(f"bits/byte {text['bits_per_byte_causal']:.4f}")
    for task, found in record.get("tasks", {}).items():
        for name, value in found.items():
            metric = name.partition(",")[0]
            if isinstance(value, float) and not metric.endswith("_stderr"):
                parts.append(f"{task} {metric} {value:.4f}")
    return f"step {record['step']}: {'; '.join(parts)}"

"""lm-eval's command on a run, with its own options, defaults, tables and files."""

import argparse
import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval
from lm_eval._cli.run import Run
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker, TrackioLogger, WandbLogger
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table, setup_logging

from mor_jax.config.parsing import check, fail, parse
from mor_jax.evaluation.lm_eval import generation, tasks
from mor_jax.evaluation.lm_eval.model import ModelArgs, rows_of

_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


@dataclasses.dataclass(frozen=True)
class Harness:
    """Loaded tasks and evaluation settings, for any number of models."""

    cfg: EvaluatorConfig
    tasks: list[Any]
    manager: TaskManager

    def __call__(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Results of the model with these `model_args`, as `simple_evaluate` returns them.

        Also written to `--output_path`. Raises `ValueError` as the model, or if the request
        does not fit the tasks.
        """
        cfg = self.cfg
        log = dict(cfg.hf_hub_log_args)
        if cfg.output_path:
            log["output_path"] = cfg.output_path
        tracker = EvaluationTracker(**log)
        loggers = _loggers(cfg)
        found = lm_eval.simple_evaluate(**self._arguments(model), evaluation_tracker=tracker)
        assert found is not None
        samples = found.pop("samples", None)
        for logger in loggers:
            logger.post_init(found)
            logger.log_eval_result()
            if samples:
                logger.log_eval_samples(samples)
        tracker.save_results_aggregated(results=found, samples=samples)
        for name in found["configs"] if samples else ():
            tracker.save_results_samples(task_name=name, samples=samples[name])
        return plain(found)

    def _arguments(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that command and function have under one name, and the remaining ones."""
        cfg = self.cfg
        known = inspect.signature(lm_eval.simple_evaluate).parameters
        same = {name: getattr(cfg, name) for name in known if hasattr(cfg, name)}
        cache = ("cache_requests", "rewrite_requests_cache", "delete_requests_cache")
        seeds = zip(_SEEDS, cfg.seed or [None] * 4, strict=True)
        return {
            **same,
            **{name: cfg.cache_requests.get(name, False) for name in cache},
            **dict(seeds),
            "model": "mor_jax",
            "model_args": {**cfg.model_args, **model},
            "tasks": self.tasks,
            "task_manager": self.manager,
        }


def prepare(names: Sequence[str], options: Sequence[str], batch_size: str | None) -> Harness:
    """Loads tasks. names: of `--tasks`. options: other options of lm-eval's command.

    Raises:
        ValueError: an option or a task is unknown, or its data cannot be loaded.
    """
    setup_logging("WARNING")
    cfg = configured(tasks.expanded(names), options, batch_size)
    manager, specs = tasks.resolved(cfg.tasks, cfg.include_path, cfg.metadata)
    ready = tasks.loaded(specs, manager)
    for settings in tasks.generation_settings(ready, manager):
        generation.check_names(settings)
    return Harness(cfg, ready, manager)


def configured(
    names: Sequence[str], options: Sequence[str], batch_size: str | None
) -> EvaluatorConfig:
    """lm-eval's settings from its own parser. Raises `ValueError` as `prepare`."""
    check(bool(names), "tasks", list(names), "names no task", "Try --tasks=lambada_openai")
    rows_of(batch_size)
    parser = argparse.ArgumentParser(prog="mor evaluate")
    Run(parser.add_subparsers())
    size = ["--batch_size", batch_size or "auto"]
    given = parser.parse_args(["run", "--tasks", *names, *size, *options])
    for name in ("model", "device"):
        value = getattr(given, name)
        rule = "cannot be set: the model is the run, and JAX chooses its devices"
        check(value is None, name, value, rule, "Leave it out")
    try:
        cfg = EvaluatorConfig.from_cli(given)
    except (OSError, TypeError) as error:
        fail("config", given.config, f"cannot be read ({error})", "Check the file")
    parse(ModelArgs, cfg.model_args, "model_args.")
    generation.check_names(cfg.gen_kwargs)
    return cfg


def plain(results: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values."""
    return json.loads(json.dumps(results, default=handle_non_serializable, ensure_ascii=False))


def lines(results: Mapping[str, Any]) -> list[str]:
    """lm-eval's tables."""
    made = make_table(results).rstrip().splitlines()
    if results.get("groups"):
        made += ["", *make_table(results, "groups").rstrip().splitlines()]
    cut = results["config"]["truncated_contexts"]
    if cut:
        made += [
            "",
            f"{cut} contexts exceeded the maximum length and were truncated on the left",
        ]
    return made


def _loggers(cfg: EvaluatorConfig) -> list[Any]:
    made: list[Any] = []
    if cfg.wandb_args:
        made.append(WandbLogger(cfg.wandb_args, cfg.wandb_config_args))
    if cfg.trackio_args:
        made.append(TrackioLogger(cfg.trackio_args))
    return made

"""Scaling studies at equal training FLOPs: plan, run, fit, report. Tutorial: docs/isoflop.md.

    mor isoflop plan --study=studies/small --architectures=plain,mor-2 \\
        --sizes=w32,w48,w64 --budgets=1e12,2e12,4e12 --config.batch_size=4
    mor isoflop run --study=studies/small --jobs=2
    mor isoflop status --study=studies/small
    mor isoflop fit --study=studies/small
    mor isoflop report --study=studies/small

Every command can be repeated. plan takes settings of the runs as --config.NAME=VALUE.
"""

import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from mor_jax.cli import option_names
from mor_jax.cli.parser import CommandParser
from mor_jax.config.shipped import CHECKOUT, CONFIGS, TRAIN
from mor_jax.runtime import exit_codes, platform
from mor_jax.runtime.preemption import Signals

FOLLOWING = ("run", "fit", "report")


def main(argv: list[str] | None = None) -> int:
    options, rest = _parser().parse_known_args(argv)
    options.given = sys.argv[1:] if argv is None else argv
    # Shells leave the ~ of --study=~/x alone.
    options.study = os.path.expanduser(options.study)
    platform.use_cpu_without_accelerator()
    try:
        option_names.check_filled(options, "study", "output")
        return options.call(options, rest)
    except ValueError as error:
        typed = option_names.options(options) | option_names.words(rest)
        print(f"error: {option_names.as_typed(error, typed)}", file=sys.stderr)
        return exit_codes.of(error)
    except (OSError, ImportError) as error:
        # A disk, its permissions, or what an object store needs installed.
        print(f"error: study={options.study!r}: cannot be used: {error}", file=sys.stderr)
        return exit_codes.ERROR


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    from mor_jax.scaling.runs.show import plan_lines, plan_table
    from mor_jax.scaling.study.manifest import read, write
    from mor_jax.scaling.study.plan import make_plan

    manifest = make_plan(_asked(options, rest), CONFIGS)
    again = [f"mor isoflop {name} --study={options.study}" for name in FOLLOWING]
    planned = shlex.join(["mor", "isoflop", *options.given])
    manifest = dataclasses.replace(manifest, reproduce=(planned, *again))
    new = False
    if not options.dry_run:
        new = write(options.study, manifest)
        manifest = read(options.study)
    _console().print(plan_table(manifest))
    print("\n".join(plan_lines(manifest)))
    if not options.dry_run:
        print(f"{'planned' if new else 'planned before'}: {options.study}/manifest.json")
    return exit_codes.OK


def _asked(options: argparse.Namespace, rest: list[str]) -> Any:
    from mor_jax.scaling.study.architectures import Shapes
    from mor_jax.scaling.study.plan import Rules, StudyRequest

    rules = {name: getattr(options, name) for name in Rules.__dataclass_fields__}
    shapes = {name: getattr(options, name) for name in Shapes.__dataclass_fields__}
    return StudyRequest(
        study=Path(options.study).name or Path(options.study).resolve().name,
        architectures=_words(options.architectures),
        sizes=_words(options.sizes),
        budgets=_numbers("budgets", options.budgets),
        unit=options.unit,
        seeds=options.seeds,
        noise=options.noise,
        noise_seeds=options.noise_seeds,
        drop=_words(options.drop),
        overrides=_settings(rest),
        rules=Rules(**rules),
        shapes=Shapes(**shapes),
        speed=_speed(options),
    )


def _speed(options: argparse.Namespace) -> float | None:
    """FLOP/s that a device is expected to reach."""
    from mor_jax.config.parsing import check
    from mor_jax.runtime.hardware import CHIPS

    check(0 < options.mfu <= 1, "mfu", options.mfu, "must be in (0, 1]", "Try 0.4")
    if options.speed is not None or options.device is None:
        return options.speed
    fix = f"Give --speed in FLOP/s, or one of {', '.join(CHIPS)}"
    check(options.device in CHIPS, "device", options.device, "has no published peak here", fix)
    return CHIPS[options.device].peak * options.mfu


def _settings(rest: list[str]) -> dict[str, Any]:
    """`--config.optim.b2=0.99` and the like; values are read as Python has them, else as text."""
    import ast

    found: dict[str, Any] = {}
    for word in rest:
        name, equals, text = word.partition("=")
        if not name.startswith("--config.") or not equals:
            fix = "--help lists the flags; settings of the runs are --config.NAME=VALUE"
            raise ValueError(f"{word}: is no flag of this command. {fix}")
        try:
            found[name.removeprefix("--config.")] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name.removeprefix("--config.")] = text
    return found


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from mor_jax.config.parsing import check
    from mor_jax.scaling.study.manifest import read

    manifest, only = read(options.study), _words(options.only)
    fix = "Leave it out to run all"
    check(options.only is None or bool(only), "only", options.only, "names nothing", fix)
    settings = [word for word in rest if word.startswith("--config.") and "=" in word]
    flags = [word for word in rest if word not in settings]
    if options.on == "local":
        _none(flags)
        return _locally(options, manifest, settings)
    from mor_jax.scaling.runs.cluster import Cluster, submit

    for name in ("jobs", "retries", "gpus"):
        value, rule = getattr(options, name), "is of --on=local; the cluster has its own"
        check(value in (1, None), name, value, rule, "Leave it out")
    flags = flags[1:] if flags[:1] == ["--"] else flags
    to = Cluster(where=options.on, root=_checkout(), flags=flags, only=only, settings=settings)
    for line in submit(options.study, manifest, to):
        print(line)
    return exit_codes.OK


def _checkout() -> Path:
    from mor_jax.config.parsing import check

    rule = "needs the launch scripts of a checkout, and this is an installed package"
    check(CHECKOUT is not None, "on", "a cluster", rule, "Run it from a clone of the repository")
    assert CHECKOUT is not None
    return CHECKOUT


def _locally(options: argparse.Namespace, manifest: Any, settings: list[str]) -> int:
    from mor_jax.scaling.runs.local import LocalOptions, StudyStopped, run_local
    from mor_jax.scaling.runs.watch import Watch

    how = LocalOptions(
        train=TRAIN,
        jobs=options.jobs,
        retries=options.retries,
        gpus=None if options.gpus is None else _words(options.gpus),
        only=_words(options.only),
        settings=settings,
    )
    try:
        with Watch(options.study, manifest, _console()) as watch:
            failed = run_local(options.study, manifest, how, watch.tell)
    except StudyStopped as stopped:
        print(stopped, file=sys.stderr)
        return exit_codes.STOPPED
    for name, said in failed.items():
        print(f"failed: {name}: {said}", file=sys.stderr)
    return exit_codes.ERROR if failed else exit_codes.OK


def _status(options: argparse.Namespace, rest: list[str]) -> int:
    from mor_jax.scaling.runs.watch import show_status
    from mor_jax.scaling.study.manifest import read

    _none(rest)
    return show_status(options.study, read(options.study), _console(), options.watch)


def _fit(options: argparse.Namespace, rest: list[str]) -> int:
    from mor_jax.scaling.fit.tables import show

    _none(rest)
    fitted, _, _ = _fitted(options)
    show(fitted, _console(), options.loss, options.size)
    return exit_codes.OK


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    from etils import epath

    from mor_jax.scaling.report.report import write_report

    _none(rest)
    fitted, points, manifest = _fitted(options)
    folder = epath.Path(options.output or f"{options.study}/report")
    for path in write_report(fitted, points, manifest.to_dict(), folder):
        print(path)
    return exit_codes.OK


def _fitted(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    from etils import epath

    from mor_jax.config.parsing import check
    from mor_jax.scaling.fit.fit import FitOptions, fit, save
    from mor_jax.scaling.runs.collect import progress
    from mor_jax.scaling.runs.points import read_points
    from mor_jax.scaling.study.manifest import read

    manifest = read(options.study)
    missing = [each for each in progress(options.study, manifest) if each.state != "done"]
    listed = ", ".join(f"{each.run.name} ({each.problem or each.state})" for each in missing[:8])
    rule = f"{len(missing)} of {len(manifest.runs)} runs have no result: {listed}"
    fix = "Run them: mor isoflop run; or fit those that are there: --partial"
    check(not missing or options.partial, "study", options.study, rule, fix)
    points = read_points(options.study)
    fitted = fit(points, FitOptions())
    save(fitted, epath.Path(options.study))
    return fitted, points, manifest


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (text or "").split(",")))


def _numbers(name: str, text: str) -> tuple[float, ...]:
    from mor_jax.config.parsing import fail

    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        fail(name, text, "must be numbers with commas between", "Try 1e12,2e12,4e12")


def _none(rest: list[str]) -> None:
    from mor_jax.config.parsing import check

    fix = "mor isoflop --help lists the flags; settings of runs belong to plan"
    check(not rest, "arguments", rest, "are no flags of this subcommand", fix)


def _console() -> Any:
    from rich.console import Console

    # Outside a terminal, lines must not wrap at 80 columns.
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)


def _parser() -> CommandParser:
    parser = CommandParser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _plan_flags(_command(commands, "plan", _plan, "choose the runs and write the manifest"))
    run = _command(commands, "run", _run, "train the runs that are not complete")
    run.add_argument("--on", choices=["local", "slurm", "gke"], default="local")
    run.add_argument("--jobs", type=int, default=1, help="runs in parallel on this machine")
    run.add_argument("--retries", type=int, default=1, help="retries of a failed run")
    run.add_argument("--gpus", help="GPU indices to distribute over the jobs: 0,1,2,3")
    run.add_argument("--only", help="comma-separated architectures, sizes or run names")
    status = _command(commands, "status", _status, "progress of the study")
    status.add_argument(
        "--watch", type=float, metavar="SECONDS", help="print again at this interval"
    )
    fit = _command(commands, "fit", _fit, "fit minima, power laws and a parametric loss")
    fit.add_argument("--loss", choices=["causal", "topk"], default="causal")
    fit.add_argument("--size", choices=["unique", "effective"], default="unique")
    report = _command(commands, "report", _report, "write the figures and the report page")
    report.add_argument("--output", help="directory; default: STUDY/report")
    for command in (fit, report):
        command.add_argument("--partial", action="store_true", help="fit although runs are missing")
    return parser


def _command(commands: Any, name: str, call: Any, about: str) -> CommandParser:
    command = commands.add_parser(name, help=about, description=about)
    command.set_defaults(call=call)
    command.add_argument("--study", required=True, help="directory of the study")
    return command


def _plan_flags(plan: CommandParser) -> None:
    add = plan.add_argument
    add("--architectures", required=True, help="plain,recursive-3,mor-2,mor-3-shared,token-3,...")
    add("--sizes", required=True, help="135m,360m,... or hidden sizes w32,w48,...")
    add("--budgets", required=True, help="training FLOPs: 2e18,5e18,16.5e18")
    add(
        "--unit",
        choices=["training", "paper"],
        default="training",
        help="which FLOPs the budgets count",
    )
    add("--seeds", type=int, default=1, help="seeds per point")
    add("--noise", metavar="SIZE@BUDGET", help="a point with more seeds, for the seed noise")
    add("--noise_seeds", type=int, default=3, help="seeds of the --noise point")
    add("--drop", help="comma-separated points SIZE@BUDGET to leave out")
    add("--lr", type=float, help="learning rate at --lr_width; default: the configuration's")
    add("--lr_width", type=int, default=128)
    add(
        "--lr_power",
        type=float,
        default=0.5,
        help="learning rate is proportional to width ** -POWER",
    )
    add(
        "--warmup",
        type=float,
        default=0.1,
        help="warm-up, as a fraction of the smallest budget's steps",
    )
    add("--decay", type=float, default=0.2, help="share of a run's steps")
    add("--min_steps", type=int, default=100, help="fewer are refused")
    add("--tokens_per_parameter", type=float, default=20.0, help="where minima are expected")
    add("--head_dim", type=int, default=32, help="of sizes that are widths")
    add("--layers", type=int, help="of sizes that are widths")
    add("--aspect", type=float, default=16.0, help="width / layers, without --layers")
    add("--device", help="for the expected time, such as 'NVIDIA H100 80GB HBM3'")
    add("--mfu", type=float, default=0.4, help="share of the device's peak that is expected")
    add("--speed", type=float, help="FLOP/s expected of a device, in place of the last two")
    add("--dry_run", action="store_true", help="show the plan, write nothing")


if __name__ == "__main__":
    with Signals("no training was under way"):
        sys.exit(main())

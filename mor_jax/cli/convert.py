"""Converts checkpoints: to Hugging Face, Llama and the reference, and from those and GGUF.

    mor convert export --to=hf --workdir=runs/mor --output=exports/mor
    mor convert export --to=llama --workdir=runs/recursive --output=DIR --unroll
    mor convert export --to=reference --workdir=runs/mor --output=DIR
    mor convert import --from=hf --source=PATH_OR_NAME --workdir=runs/smollm2
    mor convert import --from=gguf --source=FILE.gguf --workdir=runs/smollm2 \\
        --upcycle=recursions=3,sharing=middle_cycle,init=stepwise
    mor convert import --from=reference --source=DIR --workdir=runs/theirs
    mor convert refresh --path=exports/mor

The output is complete or absent; an existing directory is refused. docs/conversion.md.
"""

import argparse
import os
import shlex
import signal
import sys

# Nothing runs on a device; accelerators of this machine stay free.
os.environ["JAX_PLATFORMS"] = "cpu"

from mor_jax.cli.parser import CommandParser
from mor_jax.runtime import exit_codes, host_memory


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    host_memory.share_freed_memory()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, _stop)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.of(error)


def _stop(*_: object) -> None:
    """Ends at once and removes unfinished output. An exception could surface inside any library."""
    files = sys.modules.get("mor_jax.files")
    if files is None or files.remove_drafts():
        os.write(2, b"error: stopped; nothing was written\n")
        os._exit(exit_codes.STOPPED)


def _parser() -> CommandParser:
    parser = CommandParser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="export|import|refresh")
    out = commands.add_parser("export", help="write the weights of a run for other programs")
    out.set_defaults(run=_export)
    out.add_argument("--to", required=True, choices=("hf", "llama", "reference"))
    out.add_argument("--workdir", required=True, help="run directory")
    out.add_argument("--output", required=True, help="directory to write; must not exist")
    out.add_argument(
        "--step", type=int, help="step of the checkpoint; default: the newest good one"
    )
    out.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    out.add_argument("--max_shard_size", default="2GB", help="largest safetensors file")
    out.add_argument(
        "--unroll",
        action="store_true",
        help="repeat the shared block for every recursion (--to=llama)",
    )
    out.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    inn = commands.add_parser("import", help="make a run from weights of another program")
    inn.set_defaults(run=_import)
    inn.add_argument("--from", required=True, dest="origin", choices=("hf", "reference", "gguf"))
    inn.add_argument(
        "--source", required=True, help="file, directory, or (hf) repository on the hub"
    )
    inn.add_argument("--workdir", required=True, help="run directory to make")
    inn.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="compute dtype of training; weights stay float32",
    )
    inn.add_argument("--tokenizer", help="bytes, or a path; default: that of the source")
    inn.add_argument("--upcycle", metavar="KEY=VALUE,...", help="recursions=3,sharing=...,init=...")
    inn.add_argument("--reference_config", help="YAML configuration of the reference run")
    inn.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    renew = commands.add_parser("refresh", help="update the modeling file of an older export")
    renew.set_defaults(run=_refresh)
    renew.add_argument("--path", required=True, help="export made with --to=hf")
    renew.add_argument("--force", action="store_true", help="also if the file was edited")
    return parser


def _export(options: argparse.Namespace) -> int:
    from mor_jax.config.parsing import parse_bytes
    from mor_jax.convert.exports import ExportOptions, export
    from mor_jax.convert.run_source import open_run

    chosen = ExportOptions(
        output=options.output,
        dtype=options.dtype,
        shard_bytes=parse_bytes("max_shard_size", options.max_shard_size),
        unroll=options.unroll,
        replace=options.overwrite,
    )
    chosen.validate()
    run = open_run(options.workdir, options.step)
    written = export(run, options.to, chosen)
    rate = written.size / written.seconds / 1e9
    print(f"{run.params.where} -> {written.output}")
    print(
        f"{written.stored:,} numbers in {options.dtype}, {written.size / 1e6:,.1f} MB "
        f"in {written.seconds:.1f} s ({rate:.2f} GB/s)"
    )
    print("files: " + " ".join(written.files))
    return exit_codes.OK


def _import(options: argparse.Namespace) -> int:
    from mor_jax.convert.imports import ImportOptions, import_run

    chosen = ImportOptions(
        workdir=options.workdir,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        upcycle=options.upcycle,
        config=options.reference_config,
        replace=options.overwrite,
    )
    written = import_run(options.origin, options.source, chosen)
    model = written.cfg.model
    print(f"{options.source} -> {written.workdir}")
    print(
        f"{written.stored:,} parameters, {model.num_layers} layers of width {model.hidden_size}, "
        f"sharing={model.sharing}, router={model.router.kind}, in {written.seconds:.1f} s"
    )
    for note in written.notes:
        print(f"note: {note}")
    # An absolute path: the line works wherever it is pasted.
    config = shlex.quote(f"--config=from_workdir:{written.workdir}")
    workdir = shlex.quote(f"--workdir={written.workdir}")
    print(f"train from it: mor train {config} {workdir}")
    return exit_codes.OK


def _refresh(options: argparse.Namespace) -> int:
    from mor_jax.convert.modeling_file import MODELING, refresh

    done = refresh(options.path, force=options.force)
    if not done.changed:
        print(f"{done.path}: {MODELING} is current, {done.after}; nothing to do")
        return exit_codes.OK
    backup = "" if done.backup is None else f"; the changed file is now {done.backup.name}"
    print(f"{done.path}: {MODELING} refreshed, from {done.before} to {done.after}{backup}")
    return exit_codes.OK


if __name__ == "__main__":
    sys.exit(main())

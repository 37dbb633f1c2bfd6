"""`mor_jax.export`: writes a run's weights for other programs."""

import os

from mor_jax.api.source import check_path
from mor_jax.config.parsing import parse_bytes
from mor_jax.convert import exports
from mor_jax.convert.exports import ExportOptions, ExportResult, Target
from mor_jax.convert.run_source import open_run
from mor_jax.convert.shards import Dtype


def export(
    workdir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: Target = "hf",
    step: int | None = None,
    dtype: Dtype = "float32",
    max_shard_size: str = "2GB",
    unroll: bool = False,
    overwrite: bool = False,
) -> ExportResult:
    """Writes a run's weights for other programs; the same as `mor convert export`.

    Args:
        workdir: the run directory.
        output: the directory to write. It is complete or absent.
        to: `hf`, a directory that transformers loads with `trust_remote_code`; `llama`, a plain
            Llama; `reference`, a checkpoint of the paper authors' code.
        step: of the checkpoint; None for the newest good one.
        dtype: of the weights: `float32`, `bfloat16` or `float16`.
        max_shard_size: of one safetensors file.
        unroll: for `llama`: writes the shared block once for every recursion.
        overwrite: an earlier export in `output` is replaced.

    Returns:
        What was written: `output`, `files`, `stored` (numbers), `size` (bytes), `seconds`.

    Raises:
        ValueError: no weights, a model that cannot be expressed there, a directory that is taken,
            or a weight that is not finite. Nothing is written then.
    """
    check_path("workdir", workdir)
    check_path("output", output)
    options = ExportOptions(
        output=output,
        dtype=dtype,
        shard_bytes=parse_bytes("max_shard_size", max_shard_size),
        unroll=unroll,
        replace=overwrite,
    )
    options.validate()
    return exports.export(open_run(os.fspath(workdir), step), to, options)

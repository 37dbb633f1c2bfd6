"""What a process has to load: the trainer no plots, converter or server; the server no trainer."""

import subprocess
import sys

import pytest

LOADED = "import sys, {}; print(*sys.modules)"


def loaded_by(*modules):
    command = [sys.executable, "-c", LOADED.format(", ".join(modules))]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    ("modules", "folders", "packages"),
    [
        (
            ["mor_jax.training.trainer"],
            ["plotting", "convert", "inference", "analysis", "evaluation", "scaling", "planning"],
            ["matplotlib", "transformers", "torch", "starlette", "uvicorn"],
        ),
        (
            ["mor_jax.inference.server.api_server", "mor_jax.inference.server.startup"],
            ["training", "plotting", "convert", "analysis", "evaluation", "scaling", "planning"],
            ["matplotlib", "orbax.checkpoint", "grain", "transformers", "torch"],
        ),
    ],
    ids=["trainer", "server"],
)
def test_no_more_is_loaded_than_is_used(modules, folders, packages):
    loaded = loaded_by(*modules)
    assert set(modules) <= loaded
    unwanted = {f"mor_jax.{folder}" for folder in folders} | set(packages)
    assert not unwanted & loaded

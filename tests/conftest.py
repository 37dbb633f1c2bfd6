"""What holds for every test: fake devices, strict broadcasting, checked shapes, golden files.

All of it must be in place before mor_jax is imported and before JAX starts its backend, so it
happens at import of this file.
"""

import importlib.metadata
import json
import os
from pathlib import Path

# The suite compiles far more than it computes. Fewer optimisations cut the time of compiling by a
# third to three quarters; the cache gives it to the next worker and the next run. Its size is
# limited because writers take a lock only then. Processes that tests start inherit all of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older code generator takes a third of the time. A version that does not know a flag would
    # end the process, so others do without.
    faster = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {faster}"

import jax
import pytest
import support.typecheck  # noqa: F401 (the hook below looks it up by its name)
from jaxtyping import install_import_hook

# Set through jax.config rather than XLA_FLAGS, so that processes started by a test see one device
# unless that test asks for more.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("mor_jax", "support.typecheck.check")

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/goldens")


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """`golden("configs/mor.json", value)` compares a JSON value with its file, or rewrites it."""

    def compare(name: str, value: object) -> None:
        path = GOLDENS / name
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing: run pytest --update-goldens and commit the file"
        assert json.loads(text) == json.loads(path.read_text()), (
            f"differs from {path}; if that is meant, run pytest --update-goldens"
        )

    return compare

"""JAX is kept to the CPU exactly where no accelerator has a device file."""

import os

import pytest

from mor_jax.runtime.platform import use_cpu_without_accelerator


@pytest.mark.parametrize(
    ("files", "said", "expected"),
    [
        ((), "", "cpu"),
        (("null", "vfio/vfio"), "", "cpu"),
        (("accel0",), "", ""),
        (("vfio/0",), "", ""),
        (("nvidiactl",), "", ""),
        ((), "cuda", "cuda"),
    ],
)
def test_what_is_absent_is_not_looked_for(files, said, expected, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("JAX_PLATFORMS", said)
    use_cpu_without_accelerator(tmp_path)
    assert os.environ["JAX_PLATFORMS"] == expected

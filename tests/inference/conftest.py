"""A small engine and its server, once for the tests of a file."""

import pytest
from support.http_server import engine_of, serving


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with engine_of(tmp_path_factory.mktemp("http") / "small") as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine) as server:
        yield server

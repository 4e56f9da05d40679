import shutil

import pytest

from tests.engine.cuda.host_kernels import compile_host


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """Return a function that compiles the library of host_<name>.cpp."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    return lambda name: compile_host(name, tmp_path_factory.mktemp("host"))

"""Errors of the file system during a download say what to do."""

import errno

import pytest

from daemon.models.hub.errors import explain, is_temporary
from daemon.models.hub.name import HubName


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "became full during the download of o/m; free some space and start again"),
        (errno.EDQUOT, "became full"),
        (errno.EROFS, "Read-only file system (/cache/x); set HF_HOME"),
        (errno.EIO, "cannot download o/m: Input/output error"),
    ],
)
def test_errors_of_the_disk(number, advice):
    error = OSError(number, "Input/output error", "/cache/x")
    assert advice in explain(error, HubName("o/m"))
    assert not is_temporary(error)

"""The soft limit of open files is raised to the hard one before any process starts."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import resource
from daemon.machine import raise_descriptor_limit
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
raise_descriptor_limit()
soft, after = resource.getrlimit(resource.RLIMIT_NOFILE)
assert after == hard and soft == (min(hard, 1 << 17) if hard != resource.RLIM_INFINITY else 1 << 17), (soft, hard)
"""


def test_soft_limit_is_raised_to_the_hard_one():
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[1], check=True)

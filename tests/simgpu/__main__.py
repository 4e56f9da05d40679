"""Run this Python with arguments on the simulated GPU: python -m tests.simgpu -m pytest tests/gpu"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.simgpu.build import BuildError, build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Two processes on two processors, each with as many threads, would only wait for one another.
ENVIRONMENT = {"SIMGPU": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        libraries = build()
    except BuildError as e:
        sys.exit(f"simgpu: {e}")
    env = os.environ | ENVIRONMENT
    env["LD_PRELOAD"] = " ".join(map(str, libraries))
    env["PYTHONPATH"] = os.pathsep.join([str(HERE / "hook"), str(ROOT), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env["PATH"] = f"{HERE / 'bin'}{os.pathsep}{env.get('PATH', os.defpath)}"
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], env)


if __name__ == "__main__":
    main()

"""Run this Python with arguments on the simulated GPU: python -m tools.simgpu [--launch-only] -m pytest tests/gpu

--launch-only: nothing is computed, so tokens have no meaning. Use it to measure the time of the host.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tools.simgpu.build import BuildError, build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# More threads than CPUs would slow the processes of a test down.
COMPUTING = {"SIMGPU": "1", "OMP_NUM_THREADS": "1"}
LAUNCHING = {"SIMGPU_MIB": "6144"}
# A simulated device has no times, so engines need not measure products. Tests of that change this.
DEFAULTS = {"LLUMD_PRODUCTS": "torch"}


def main() -> None:
    arguments = sys.argv[1:]
    launch_only = arguments[:1] == ["--launch-only"]
    if len(arguments) < 1 + launch_only:
        sys.exit(__doc__)
    try:
        libraries = build()
    except BuildError as e:
        sys.exit(f"simgpu: {e}")
    env = DEFAULTS | os.environ | (LAUNCHING if launch_only else COMPUTING)
    env["LD_PRELOAD"] = " ".join(map(str, libraries))
    env["PYTHONPATH"] = os.pathsep.join([str(HERE / "hook"), str(ROOT), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env["PATH"] = f"{HERE / 'bin'}{os.pathsep}{env.get('PATH', os.defpath)}"
    os.execve(sys.executable, [sys.executable, *arguments[launch_only:]], env)


if __name__ == "__main__":
    main()

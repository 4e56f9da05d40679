"""Run real coding agents, the command lines of Claude Code and Codex, against a daemon that plays a written script.

    python -m bench.clients.agents [--cache DIR]

It is a test of the protocols, not of a model: the script says which tool to call, and what to answer to its result.
The agents come from npm, and run one command in an empty directory. The exit status is 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.live import Daemon, serving
from daemon.models import store

_PACKAGES = ("@anthropic-ai/claude-code", "@openai/codex")
_CONTEXT = 1 << 18  # tokens: the agents' own prompts are longer than the context of the demo model
_COMMAND = "echo hello-from-$((6*7))-tool"
_PROMPT = "Please RUN-THE-TOOL and tell me what it says."
_RESULT = "hello-from-42-tool"  # only a shell makes it of the command
_ANSWER = f"The tool said {_RESULT}. Done."
_TIMEOUT = 120.0  # seconds for one agent
_CODEX = """
model = "{model}"
model_provider = "llumd"
approval_policy = "never"
sandbox_mode = "danger-full-access"
[model_providers.llumd]
name = "llumd"
base_url = "{url}/v1"
env_key = "LLUMD_KEY"
wire_api = "responses"
"""


def script() -> list[dict[str, str]]:
    """Return what the engine says: a call of the agent's own tool, then an answer."""

    def call(name: str, **arguments: Any) -> str:
        return f"I run it.\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"

    return [
        {"when": _RESULT, "say": _ANSWER},
        {"when": "exec_command.*RUN-THE-TOOL", "say": call("exec_command", cmd=_COMMAND)},
        {"when": "RUN-THE-TOOL", "say": call("Bash", command=_COMMAND, description="Say hello")},
        {"say": "OK."},
    ]


def long_model(directory: Path) -> Path:
    """Write the demo model without its weights, and with a longer context. Return its path."""
    source = store.resolve("demo", "dummy", print)
    path = Path(shutil.copytree(source, directory / "agent", ignore=shutil.ignore_patterns("*.safetensors")))
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": _CONTEXT}
    (path / "config.json").write_text(json.dumps(config))
    return path


def run_agents(daemon: Daemon, programs: Path, home: Path) -> dict[str, str]:
    """Run both agents, with `home` as their home, and return what each has printed."""
    work = home / "work"
    work.mkdir(parents=True)
    (home / "config.toml").write_text(_CODEX.format(model=daemon.model, url=daemon.url))
    environ = os.environ | {
        "HOME": str(home), "CODEX_HOME": str(home), "LLUMD_KEY": "any",
        "ANTHROPIC_BASE_URL": daemon.url, "ANTHROPIC_API_KEY": "any", "ANTHROPIC_MODEL": daemon.model,
        "ANTHROPIC_SMALL_FAST_MODEL": daemon.model, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }  # fmt: skip
    commands = {
        "claude": [str(programs / "claude"), "-p", _PROMPT, "--allowedTools", "Bash"],
        "codex": [str(programs / "codex"), "exec", "--skip-git-repo-check", _PROMPT],
    }
    found = {}
    for name, command in commands.items():
        done = subprocess.run(
            command, cwd=work, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_TIMEOUT, check=False,
        )  # fmt: skip
        found[name] = done.stdout + ("" if _ANSWER in done.stdout else done.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "llumd" / "clients")
    cache = parser.parse_args().cache / "agents"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "package.json").write_text('{"private": true}')
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent", *_PACKAGES], cwd=cache, check=True)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "script.json"
        file.write_text(json.dumps(script()))
        model = str(long_model(Path(directory)))
        options = ("--engine", "script", "--script", str(file), "--stub-step", "2ms", "--tool-format", "hermes")
        with serving("--model", model, *options) as daemon:
            printed = run_agents(daemon, cache / "node_modules" / ".bin", Path(directory) / "home")
    for name, text in printed.items():
        print("ok  " if _ANSWER in text else "FAIL", name, "" if _ANSWER in text else text[-1000:])
    sys.exit(any(_ANSWER not in text for text in printed.values()))


if __name__ == "__main__":
    main()

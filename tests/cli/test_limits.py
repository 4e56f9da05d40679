"""Limits of options that depend on the model or on the machine."""

from __future__ import annotations

import re

import pytest

from daemon.cli.limits import (
    check_machine_limits,
    check_model_limits,
    default_frontends,
    kept_connections_warning,
)
from daemon.config import ConfigError, load
from daemon.machine import Machine
from tests.cli.test_memory_budget import MODEL_CONFIG

MIB, GIB = 1 << 20, 1 << 30
MACHINE = Machine(cpus=2, memory=8 * GIB, shared_memory=4 * GIB, descriptors=512)
LENGTH = MODEL_CONFIG.max_position


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": LENGTH + 1}, rf"^max_model_len \(test\): {LENGTH + 1} is above {LENGTH}, the limit of m "),
        ({"max_prompt_tokens": LENGTH}, rf"^max_prompt_tokens \(test\): must be below {LENGTH}"),
        ({"max_output_tokens": LENGTH}, rf"^max_output_tokens \(test\): must be below {LENGTH}"),
    ],
)
def test_lengths_that_the_model_does_not_have(settings: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        check_model_limits(load({}, None, {}).replace(settings, "test"), MODEL_CONFIG)


def test_lengths_that_the_model_has():
    for settings in ({}, {"max_model_len": LENGTH}, {"max_prompt_tokens": LENGTH - 1}):
        check_model_limits(load(settings, None, {}), MODEL_CONFIG)


def test_the_journal_must_hold_the_longest_request():
    import dataclasses

    long = dataclasses.replace(MODEL_CONFIG, max_position=1 << 20)
    with pytest.raises(ConfigError, match=r"^journal_memory .* 1 MiB cannot hold .* at least 8 MiB"):
        check_model_limits(load({"journal_memory": "1MiB"}, None, {}), long)
    check_model_limits(load({"journal_memory": "8MiB"}, None, {}), long)
    check_model_limits(load({"journal_memory": "1MiB", "max_model_len": 1 << 17}, None, {}), long)


@pytest.mark.parametrize(
    ("settings", "pool", "message"),
    [
        ({"threads": 3}, MIB, r"^threads .*: 3 is above 2, the number of CPUs"),
        ({}, 5 * GIB, "KV cache and .* do not fit into the 8192 MiB of memory"),
        ({"frontends": 16, "journal_memory": "1GiB"}, MIB, "16384 MiB of journals, with .* do not fit"),
        ({}, 2 * GIB, r"^/dev/shm has no room for .* only for 4096 MiB; make it larger"),
        ({"body_memory": "9GiB"}, MIB, "with 9216 MiB for request bodies, do not fit"),
        ({"max_connections": 500}, MIB, "^the limit of open files is 512, and 4 processes need at least 660"),
        ({"frontends": 16, "devices": ["cpu"] * 64}, MIB, "^the limit of open files is 512, and 81 processes need"),
    ],
)
def test_what_the_machine_does_not_have(settings: dict[str, object], pool: int, message: str):
    config = load({"devices": ["cpu", "cpu"]} | settings, None, {})
    with pytest.raises(ConfigError, match=message):
        check_machine_limits(config, MACHINE, pool)


def test_what_the_machine_has():
    check_machine_limits(load({"devices": "cpu,cpu", "threads": 2}, None, {}), MACHINE, GIB)


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"max_connections": 352}, ""),
        ({"max_connections": 0, "frontends": 16}, ""),  # the default follows the limit
        (
            {"max_connections": 353},
            "warning: max_connections is 353, but with 512 open files only 352 connections of ",
        ),
        (
            {"max_connections": 200, "frontends": 2},
            "warning: max_connections is 200, but .* only 172 connections of ",
        ),
    ],
)
def test_connections_that_the_supervisor_cannot_keep(settings: dict[str, int], warning: str):
    config = load({"devices": ["cpu", "cpu"]} | settings, None, {})
    found = kept_connections_warning(config, MACHINE)
    assert re.match(warning, found) if warning else not found


@pytest.mark.parametrize(
    ("gpus", "cpus", "expected"), [(1, 64, 2), (2, 64, 4), (8, 128, 4), (8, 12, 3), (1, 4, 1), (4, 1, 1)]
)
def test_frontends_on_gpus(gpus: int, cpus: int, expected: int):
    config = load({"devices": [f"cuda:{i}" for i in range(gpus)]}, None, {}).for_gpus()
    assert default_frontends(config, cpus) == expected

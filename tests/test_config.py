"""Options: precedence of their sources, parsing, limits and error messages."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.config import Config, ConfigError, load, options
from daemon.directories import cache_dir, run_dir
from daemon.option import allowed
from daemon.units import format_value, parse_seconds, parse_size, parse_value

UNITS = {"bytes", "seconds", "tokens", "requests", "choices", "engines", "connections", "messages", "tools", ""}
# Numbers whose name is their unit.
NO_UNIT = {"threads", "port", "frontends", "memory_share", "max_resumes", "max_stops"}


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "llumd.toml"
    file.write_text(text)
    return file


# -- the options themselves --------------------------------------------------------------------


@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_every_option_is_described(option):
    meaning = option.metadata["meaning"]
    assert meaning[0].isupper() and meaning.endswith(".")
    assert option.metadata["group"] in {"model", "engine", "scheduling", "http", "daemon"}
    assert option.metadata["unit"] in UNITS
    default = getattr(Config(), option.name)
    if isinstance(default, int | float) and not isinstance(default, bool) and option.name not in NO_UNIT:
        assert option.metadata["unit"]
    if option.metadata["choices"]:
        assert default in option.metadata["choices"]
    if isinstance(default, int | float) and not isinstance(default, bool):
        assert allowed(option)


@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_every_number_is_limited_on_both_sides(option):
    default, limits = getattr(Config(), option.name), option.metadata["limits"]
    if isinstance(default, int | float) and not isinstance(default, bool) and not option.metadata["choices"]:
        assert limits.keys() & {"at_least", "above"} and limits.keys() & {"at_most", "below"}
        assert all(math.isfinite(bound) for bound in limits.values())


def test_the_defaults_pass_the_check():
    assert load({}, None, {}) == Config()


@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_every_default_can_be_written_as_text(option):
    default = getattr(Config(), option.name)
    plain = ",".join(default) if isinstance(default, list) else str(default)
    for text in (plain, format_value(default, option.metadata["unit"])):
        assert getattr(load({option.name: text}, None, {}), option.name) == default


@given(st.integers(0, 2**50))
def test_formatted_sizes_parse_to_the_same_value(size: int):
    assert parse_value(int, "bytes", format_value(size, "bytes")) == size


def test_a_config_can_be_pickled():
    config = load({"port": "9"}, None, {"LLUMD_DEVICES": "cpu"})
    assert pickle.loads(pickle.dumps(config)) == config


# -- precedence --------------------------------------------------------------------------------


def test_precedence_is_flag_environment_file_default(tmp_path: Path):
    file = toml(tmp_path, 'port = 1\nmax_queued = 11\nmodel = "m"\nkv_memory = "1GiB"')
    environ = {"LLUMD_PORT": "2", "LLUMD_MAX_QUEUED": "22", "PORT": "9"}
    settings = load({"port": "3"}, file, environ)
    assert (settings.port, settings.max_queued, settings.model, settings.threads) == (3, 22, "m", 0)
    assert settings.kv_memory == 1 << 30
    assert settings.origin == {
        "port": "command line",
        "max_queued": "environment LLUMD_MAX_QUEUED",
        "model": str(file),
        "kv_memory": str(file),
    }


def test_names_may_be_written_with_dashes():
    assert load({"max-queued": "7"}, None, {}).max_queued == 7


def test_other_environment_variables_are_ignored():
    assert load({}, None, {"LLUMD_CACHE": "/x", "LLUMD_ORIGIN": "y", "LLUMD_NOTHING": "1"}) == Config()


def test_replace_does_not_change_the_original():
    before = Config()
    after = before.replace({"port": 5}, "test")
    assert (before.port, before.origin, after.port) == (8000, {}, 5)
    assert after.devices is before.devices or after.devices == before.devices


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512MiB", 512 << 20), ("512M", 512 * 10**6), ("2g", 2 * 10**9), ("1.5Gi", 3 << 29), (" 7 kb ", 7000),
     ("1TiB", 1 << 40), ("64b", 64), (17, 17), (".5k", 500)],
)  # fmt: skip
def test_sizes(text: str | int, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "1.2.3", "5x", "-5", "5i", "5ib", "1e9", "MiB", "5 5"])
def test_invalid_sizes(text: str):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("30s", 30), ("250ms", 0.25), ("5m", 300), ("5min", 300), ("1.5h", 5400), (2, 2), (0.5, 0.5)],
)
def test_durations(text: str | float, seconds: float):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "-1", "1d", "s", "nan", "inf"])
def test_invalid_durations(text: str):
    with pytest.raises(ValueError, match="not a duration"):
        parse_seconds(text)


@given(st.integers(0, 2**50), st.sampled_from(["", "k", "Mi", "GiB"]))
def test_sizes_scale(number: int, unit: str):
    assert parse_size(f"{number}{unit}") == pytest.approx(number * parse_size(f"1{unit}"), rel=1e-12)


def test_lists_and_booleans(tmp_path: Path):
    assert load({"devices": " cuda:0, cuda:1 ,"}, None, {}).devices == ["cuda:0", "cuda:1"]
    assert load({}, toml(tmp_path, 'devices = ["cpu", "cpu"]'), {}).devices == ["cpu", "cpu"]
    for word, value in (("yes", True), ("ON", True), ("1", True), (True, True), ("false", False), ("0", False)):
        assert load({"prefix_caching": word}, None, {}).prefix_caching is value


# -- errors ------------------------------------------------------------------------------------

REFUSED = [
    ("port", "many"), ("port", "70000"), ("port", "-1"), ("port", 1.5), ("port", True),
    ("dtype", "fp8"), ("engine", "toy"), ("load_format", "gguf"), ("log_level", "loud"),
    ("block_size", "17"), ("block_size", "0"), ("max_num_seqs", "0"), ("max_batch_tokens", "0"),
    ("frontends", "0"), ("frontends", "17"), ("max_queued", "0"), ("max_choices", "0"), ("max_output_tokens", "0"),
    ("threads", "-1"), ("max_model_len", "-1"), ("max_prompt_tokens", "-2"),
    ("kv_memory", -1), ("kv_memory", "lots"), ("kv_memory", True), ("kv_memory", "5i"), ("kv_memory", [1]),
    ("max_body", "10"), ("journal_memory", "1000"), ("journal_memory", "4GiB"),
    ("devices", "gpu0"), ("devices", "cpu,cuda"), ("devices", "cpu,cuda:0"), ("devices", 3),
    ("devices", ",".join(["cpu"] * 65)),
    ("prefix_caching", "perhaps"), ("prefix_caching", 2),
    ("drain_timeout", "soon"), ("drain_timeout", -1), ("load_timeout", float("inf")), ("hang_timeout", float("nan")),
    ("request_deadline", True), ("request_deadline", [1]),
    ("min_engines", "-1"), ("max_engines", "some"), ("scale_period", -1),
    ("memory_share", 0), ("memory_share", "1.1"), ("memory_share", "nan"), ("kv_dtype", "int8"),
    ("itl_target", -0.1),
    # beyond every sense: years, zero periods, counts and sizes that no machine has
    ("max_model_len", "1"), ("max_model_len", 2**40), ("threads", "99999"), ("kv_memory", "1"),
    ("kv_memory", "99TiB"), ("max_num_seqs", 10**6), ("max_batch_tokens", 10**9), ("itl_target", "1h"),
    ("stub_step", "5m"),
    ("rebalance_period", "0"), ("rebalance_period", "1h"), ("ideal_tokens", 10**12), ("min_engines", 65),
    ("max_resumes", 10**9), ("scale_period", "999h"), ("max_body", "2GiB"), ("max_queued", 10**7),
    ("max_choices", 10**5), ("request_deadline", "1ms"), ("request_deadline", 3e7), ("heartbeat", "1ms"),
    ("drain_timeout", 3e7), ("load_timeout", "0"), ("hang_timeout", 1e300),
    # numbers that only Python writes so
    ("port", "8_000"), ("port", "\uff18\uff10"), ("port", "0x10"), ("port", "1e3"), ("port", "9" * 5000),
    ("port", [1]),
    ("memory_share", "0_1"), ("memory_share", "9" * 5000), ("kv_memory", "9" * 5000), ("drain_timeout", "9" * 5000),
    ("devices", f"cuda:{'9' * 5000}"), ("devices", "cuda:\uff11"), ("devices", [0, 1]),
    # text that is none
    ("model", 5), ("model", ["demo"]), ("model", "a\0b"), ("served_name", True),
    ("served_name", [1]), ("host", "a\nb"), ("run_dir", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_errors_name_option_and_source_in_plain_words(name: str, value: object):
    with pytest.raises(ConfigError, match=rf"^{name} \(command line\): ") as error:
        load({name: value}, None, {})
    assert "invalid literal" not in str(error.value) and "could not convert" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("port", "many", "'many' is not a whole number"),
        ("port", "70000", "70000 is not allowed; it must be from 0 to 65535"),
        ("max_num_seqs", 0, "0 is not allowed; it must be from 1 to 8192"),
        ("block_size", "17", "'17' is not one of 8, 16, 32, 64, 128"),
        ("dtype", "int3", "'int3' is not one of auto, bf16, fp32"),
        ("journal_memory", "4GiB", "4GiB is not allowed; it must be at least 1MiB and below 4GiB"),
        ("memory_share", "1.5", "1.5 is not allowed; it must be above 0 and at most 1"),
        ("kv_memory", "lots", "'lots' is not a size; write for example 512MiB, 2GiB or a number of bytes"),
        ("drain_timeout", "soon", "'soon' is not a duration; write for example 30s, 250ms or 5m"),
        ("max_model_len", "1", "1 is not allowed; it must be 0 or from 2 to 16777216"),
        ("port", "9" * 5000, f"'{'9' * 40}...' is not a whole number"),
        ("host", ["a"], "['a'] is not text; put it in quotes"),
        ("load_timeout", float("inf"), "inf is not allowed; it must be from 1 to 86400"),
    ],
)
def test_error_messages(name: str, value: object, message: str):
    with pytest.raises(ConfigError) as error:
        load({name: value}, None, {})
    assert str(error.value) == f"{name} (command line): {message}"


@pytest.mark.parametrize("settings", [{"block_size": 17}, {"dtype": "int3"}, {"port": -1}, {"frontends": 17}])
def test_values_set_in_code_are_checked_too(settings: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"^{next(iter(settings))}: .* is not allowed; it must be "):
        Config(**settings).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_engines": 3, "devices": "cpu,cpu"}, r"min_engines \(command line\): must be at most 2"),
        ({"max_engines": 3, "devices": "cpu,cpu"}, r"max_engines \(command line\): must be at most 2"),
        (
            {"min_engines": 3, "max_engines": 2},
            r"min_engines \(command line\): must be at most 2, the value of max_engines",
        ),
    ],
)
def test_scaling_limits_need_enough_engines(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        load(settings, None, {})
    assert load({"min_engines": 2, "max_engines": 2}, None, {}).devices == []  # unknown until the GPUs are detected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": "cuda:0", "dtype": "fp32"}, r"dtype \(command line\): GPUs compute in bf16"),
        ({"devices": "cuda:0", "deterministic": True}, r"deterministic \(command line\): is for the CPU"),
        ({"devices": "cpu", "kv_dtype": "fp8"}, r"kv_dtype \(command line\): fp8 is for GPUs"),
    ],
)
def test_options_that_the_device_does_not_support(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        load(settings, None, {})
    assert load(settings | {"devices": ""}, None, {}).devices == []  # unknown until the GPUs are detected
    assert load(settings | {"engine": "stub"}, None, {}).engine == "stub"  # does not use these options


def test_a_script_and_the_engine_that_plays_it_belong_together():
    with pytest.raises(ConfigError, match="script: names no file"):
        load({"engine": "script"}, None, {})
    with pytest.raises(ConfigError, match="has no effect on the engine `hash`"):
        load({"engine": "hash", "script": "s.json"}, None, {})
    assert load({"engine": "script", "script": "s.json"}, None, {}).script == "s.json"


def test_gpu_defaults_apply_to_options_that_no_source_has_set():
    # Limits are judged with the defaults that GPUs have: max_batch_tokens is larger there.
    assert load({"devices": "cuda:0", "max_num_seqs": "512"}, None, {}).max_num_seqs == 512
    settings = load({"max_num_seqs": "64"}, None, {"LLUMD_ITL_TARGET": "0"}).for_gpus()
    assert (settings.max_num_seqs, settings.itl_target) == (64, 0)
    assert settings.max_batch_tokens == 8192
    everything = load({}, None, {}).for_gpus()
    changed = {o.name for o in options() if getattr(everything, o.name) != getattr(Config(), o.name)}
    assert changed == {"max_num_seqs", "max_batch_tokens", "itl_target", "frontends"}
    everything.check()


def test_errors_name_the_source(tmp_path: Path):
    with pytest.raises(ConfigError, match="environment LLUMD_PORT"):
        load({}, None, {"LLUMD_PORT": "x"})
    file = toml(tmp_path, 'dtype = "int3"')
    with pytest.raises(ConfigError, match=str(file)):
        load({}, file, {})
    with pytest.raises(ConfigError, match="command line"):
        load({"dtype": "int3"}, None, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deterministic": True, "dtype": "bf16"}, r"deterministic \(command line\): needs fp32"),
        (
            {"prefix_affinity": True, "prefix_caching": False},
            r"prefix_affinity \(command line\): needs prefix_caching",
        ),
        ({"max_choices": 8, "max_queued": 4}, r"max_choices \(command line\): must be at most 4, the value of max_q"),
        (
            {"max_num_seqs": 300, "devices": "cpu"},
            r"max_num_seqs \(command line\): must be at most 256, the value of max_batch_tokens",
        ),
        ({"body_memory": "1MiB"}, r"body_memory \(command line\): must be at least 8388608, the value of max_body"),
        ({"max_engines": 2}, r"max_engines \(command line\): has no effect while min_engines is 0"),
        ({"max_prompt_tokens": 64, "max_model_len": 64}, r"max_prompt_tokens \(command line\): must be below 64"),
        ({"max_output_tokens": 99, "max_model_len": 64}, r"max_output_tokens \(command line\): must be below 64"),
    ],
)
def test_options_that_contradict_each_other(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=f"^{message}"):
        load(settings, None, {})


def test_a_default_gives_way_to_an_option_that_is_set():
    load({"max_queued": 2, "max_batch_tokens": 8, "max_model_len": 64, "prefix_caching": False}, None, {})


@pytest.mark.parametrize("name", ["prot", "origin", "Config", "replace", ""])
def test_unknown_options_are_refused(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"unknown option '{name}'"):
        load({name: "1"}, None, {})
    with pytest.raises(ConfigError, match=f"unknown option '{name}'"):
        load({}, toml(tmp_path, f'"{name}" = 1'), {})


def test_a_table_in_the_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown option 'http'"):
        load({}, toml(tmp_path, "[http]\nport = 1"), {})


@pytest.mark.parametrize(
    "content",
    [b"port = ", b"port 1", b"port = 1\nport = 2", b"\xff\xfe", b"port = " + b"9" * 5000, b"port = " + b"[" * 9999],
)
def test_a_file_that_is_not_toml(content: bytes, tmp_path: Path):
    file = tmp_path / "llumd.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file} is not valid TOML") as error:
        load({}, file, {})
    assert "limit (4300 digits)" not in str(error.value) and "recursion" not in str(error.value)


def test_a_file_that_does_not_exist(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file"):
        load({}, tmp_path / "none.toml", {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box.example", ""])
def test_hosts_other_than_loopback_need_keys_or_permission(host: str):
    with pytest.raises(ConfigError, match=r"^host\b.*api_key_file"):
        load({"host": host}, None, {})
    assert load({"host": host, "api_key_file": "/keys"}, None, {}).host == host
    assert load({"host": host, "allow_unauthenticated": "yes"}, None, {}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str):
    assert load({"host": host}, None, {}).host == host


# -- directories -------------------------------------------------------------------------------


def test_directories(monkeypatch: pytest.MonkeyPatch):
    for name in ("LLUMD_CACHE", "CACHE_DIRECTORY", "XDG_CACHE_HOME", "RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_dir() == Path("/home/user/.cache/llumd")
    for name, value, expected in (
        ("XDG_CACHE_HOME", "/xdg", "/xdg/llumd"),
        ("CACHE_DIRECTORY", "/systemd", "/systemd"),
        ("LLUMD_CACHE", "/mine", "/mine"),
    ):
        monkeypatch.setenv(name, value)
        assert cache_dir() == Path(expected)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert run_dir() == Path("/run/user/7/llumd")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/service")
    assert run_dir() == Path("/run/service")
    assert run_dir(Config(run_dir="/given")) == Path("/given")

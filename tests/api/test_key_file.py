"""The key file: what a line means, and errors that tell no key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from daemon.api.auth import KeyRing
from daemon.api.key_file import parse_key, read_key_file
from daemon.config import ConfigError
from daemon.ipc.keys_page import MAX_KEYS


def test_key_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# team a\n\n  one  \ntwo\n#three\n")
    ring = KeyRing(read_key_file(file))
    ring.check("Bearer one")
    ring.check("Bearer two")
    for wrong in (None, "Bearer three", "Bearer #three", "Bearer "):
        with pytest.raises(Exception, match="API key"):
            ring.check(wrong)
    assert "one" not in repr(vars(ring))
    file.write_text("# nothing\n")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="api_key_file"):
            read_key_file(path)


def test_key_file_with_priorities(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one priority=high\n  two\tpriority=3  \nthree\n\none priority=-1\n")
    ring = KeyRing(read_key_file(file))
    assert [ring.check(f"Bearer {key}").priority for key in ("one", "two", "three")] == [-1, 3, 0]
    with pytest.raises(Exception, match="API key"):
        ring.check("Bearer one priority=high")


@pytest.mark.parametrize(
    "line",
    [
        "secret priority=urgent", "secret priority=", "secret priority=101", "secret high", "secret Priority=high",
        "secret team=a", "secret priority=high team=a", "secret priority=high priority=high",
        "secret priority = high", "secret tenant=", "secret tenant=a/b", "secret tenant=team tenant=team",
        "secret priority=high max-priority=low", "secret max-priority=urgent", "tenant=team", "known tenant=team",
        "priority=high secret", "priority=high", "secret pass phrase", "known priority=low",
    ],
)  # fmt: skip
def test_error_of_a_key_file_names_the_line_and_does_not_show_it(tmp_path, line):
    file = tmp_path / "keys"
    file.write_text(f"# keys\n\nknown\n{line}\nlast\n")
    with pytest.raises(ConfigError, match="api_key_file: line 4 of") as e:
        read_key_file(file)
    message = str(e.value).removeprefix(f"api_key_file: line 4 of {file}")
    assert "priority" in message or "tenant" in message
    assert not any(word in message for word in ("secret", "known", "phrase", "urgent", "team"))


@pytest.mark.parametrize(
    ("attributes", "priority", "max_priority", "tenant"),
    [
        ("", 0, 0, ""), ("priority=high", -1, -1, ""), ("priority=low", 1, 1, ""), ("priority=-100", -100, -100, ""),
        ("max-priority=high", 0, -1, ""), ("max-priority=low", 1, 1, ""), ("priority=low max-priority=-5", 1, -5, ""),
        ("max-priority=-5 tenant=a.B_2-c priority=3", 3, -5, "a.B_2-c"), ("tenant=" + "t" * 64, 0, 0, "t" * 64),
    ],
)  # fmt: skip
def test_attributes_of_a_key(attributes: str, priority: int, max_priority: int, tenant: str):
    key = parse_key(f"secret {attributes}")
    assert key is not None
    assert (key.priority, key.max_priority, key.tenant) == (priority, max_priority, tenant)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path):
    (file := tmp_path / "keys").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    ring = KeyRing(read_key_file(file))
    assert ring.check("Bearer one") != ring.check("Bearer two")


def test_a_file_that_cannot_be_keys_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00k")
    (tmp_path / "large").write_bytes(b"k\n" * (2 << 20) + b"x")
    (tmp_path / "many").write_text("".join(f"key{i}\n" for i in range(MAX_KEYS + 1)))
    for name, why in [
        ("pipe", "is not a regular file"), ("", "Is a directory"), ("binary", "is not text in UTF-8"),
        ("large", "is larger than 4 MiB"), ("many", f"holds {MAX_KEYS + 1} keys; it may hold at most {MAX_KEYS}"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"^api_key_file: .*{why}"):
            read_key_file(tmp_path / name)

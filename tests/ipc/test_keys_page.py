"""The keys page: one set of keys for all readers, and requests to read the key file again."""

from __future__ import annotations

import os

from daemon.ipc.keys_page import (
    KEYS_PAGE_BYTES,
    MAX_KEYS,
    MAX_TENANT,
    Key,
    KeysOutcome,
    KeysReader,
    KeysRequester,
    KeysWriter,
)


def test_the_largest_set_of_the_largest_keys_fits():
    page = memoryview(bytearray(KEYS_PAGE_BYTES))
    keys = [Key(os.urandom(32), -100, -100, "t" * MAX_TENANT) for _ in range(MAX_KEYS)]
    writer, reader = KeysWriter(page), KeysReader(page)
    assert (reader.version, reader.read()) == (0, (0, []))
    for number in (1, 2):
        writer.publish(keys)
        assert reader.version == number
        assert reader.read() == (number, keys)


def test_an_error_of_any_characters_fits():
    page = memoryview(bytearray(KEYS_PAGE_BYTES))
    for error in ("\u8def" * 5000, "/tmp/no\udcff/keys: no such file"):
        KeysWriter(page).report(KeysOutcome(1, keys=0, tenants=0, error=error))
        found = KeysRequester(page).outcome()
        assert found is not None and found.error[:3] == error[:3]


def test_a_request_outlives_its_writer_and_an_outcome_names_it():
    page = memoryview(bytearray(KEYS_PAGE_BYTES))
    writer = KeysWriter(page)
    assert KeysRequester(page).outcome() is None
    assert [KeysRequester(page).request() for _ in range(2)] == [1, 2]
    assert writer.requested == 2
    outcome = KeysOutcome(2, keys=3, tenants=1, added=1, error="e" * 5000)
    writer.report(outcome)
    found = KeysRequester(page).outcome()
    assert found is not None
    assert (found.request, found.keys, found.tenants, found.added) == (2, 3, 1, 1)
    assert found.error == "e" * 1000

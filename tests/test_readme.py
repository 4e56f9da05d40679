"""The README says what the program says."""

from pathlib import Path

from daemon.cli import llumd

ROOT = Path(__file__).parents[1]


def test_the_option_table_is_current(capsys):
    llumd._options(None)
    table = capsys.readouterr().out.strip()
    text = (ROOT / "README.md").read_text()
    shown = text.split("<!-- options -->")[1].split("<!-- /options -->")[0].strip()
    assert shown == table, "paste the output of `llumd options` between the marks"

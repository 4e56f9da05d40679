"""The documentation agrees with the program."""

from argparse import Namespace
from pathlib import Path

from daemon.cli import llumd

ROOT = Path(__file__).parents[1]


def test_the_option_table_is_current():
    text = (ROOT / "docs" / "configuration.md").read_text()
    table = text.split("<!-- options -->")[1].split("<!-- /options -->")[0].strip()
    assert table == llumd.option_table(), "paste the output of `llumd options` between the marks"


def test_options_prints_the_table(capsys):
    llumd._options(Namespace())
    assert capsys.readouterr().out.strip() == llumd.option_table()

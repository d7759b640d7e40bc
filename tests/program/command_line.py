"""The command `twotower` as the tests call it, in their own process."""

from typing import Any

import pytest

from twotower_kernels.cli import command as cli


def run(*arguments: Any) -> int:
    """The exit code of a command line."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:  # what argparse ends with
        assert isinstance(exit.code, int)
        return exit.code


def error_of(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that a command line is refused with."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("twotower: error: ")
    assert err.count("\n") == 1
    return err

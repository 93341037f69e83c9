# SPDX-License-Identifier: MIT
"""The commands as a user calls them, without the seconds that a process of their own takes."""

from click.testing import CliRunner

from flowcheck.cli import main


def in_process(*words):
    """Return exit status, stdout and stderr of a `flowcheck` command."""
    done = CliRunner().invoke(main, [*map(str, words)], prog_name="flowcheck", catch_exceptions=False)
    return done.exit_code, done.stdout, done.stderr


def flowcheck(*words, status=0):
    """Return what a command says, on stdout and stderr; it must end with that status."""
    found, out, err = in_process(*words)
    assert found == status and "Traceback" not in err, err
    return out + err

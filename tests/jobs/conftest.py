"""The command line, for the tests of jobs too."""

from tests.cli.conftest import cli, here

__all__ = ["cli", "here"]

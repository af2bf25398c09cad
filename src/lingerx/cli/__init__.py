"""The command line: one group, one module per command. Needs the extra `cli` (click and rich).

A command's module renders; what it measures stands in a module of its own, which imports neither click nor
rich.
"""

from __future__ import annotations

import click

import lingerx

from .demo import demo
from .doctor import doctor

__all__ = ["cli"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lingerx.__version__, message=f"lingerx %(version)s, {lingerx.engine} engine")
def cli() -> None:
    """Close sockets so that the last answer arrives, and hear whether it did."""


cli.add_command(demo)
cli.add_command(doctor)

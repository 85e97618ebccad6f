"""Arguments and options that several commands share, as click decorators, and how they warn."""

import sys
from pathlib import Path

import click

PATH = click.Path(path_type=Path)

spec_argument = click.argument("spec")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a field, as train.epochs=10; repeatable."
)
data_root = click.option(
    "--data-root", type=PATH, help="Where datasets lie; default $ASGE_ZOO_DATA, or the user's cache."
)
device = click.option("--device", help="A torch device; default a CUDA GPU if there is one, else the CPU.")
revision = click.option("--revision", help="On the Hub: a branch, a tag or a commit hash; default main.")
as_json = click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")


def warn(message: str) -> None:
    """Say on stderr what does not stop the command."""
    print(f"asge-zoo: {' '.join(message.split())}", file=sys.stderr)

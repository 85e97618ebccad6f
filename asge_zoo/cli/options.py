"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

SpecSource = Annotated[
    str, typer.Argument(metavar="SPEC", help="A spec's JSON file, or the name of a shipped one (see `ls specs`).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a field, such as train.epochs=10; repeatable."),
]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", help="Where datasets lie; default $ASGE_ZOO_DATA, or the user's cache.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="A torch device; default the first there is of CUDA, MPS, CPU.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Report as JSON on stdout.")]

"""`asge-zoo verify`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from asge_zoo.cli.options import AsJson


def verify(
    path: Annotated[Path, typer.Argument(help="A run directory, or a checkpoint folder.")], as_json: AsJson = False
) -> None:
    """Check every checkpoint's files and tensors against their sha256 sums; exit code 1 if one is damaged."""
    from asge_zoo.engine.checkpoint import all_checkpoints, check_files

    found = {str(folder): check_files(folder) for folder in all_checkpoints(path)}
    problems = [problem for lines in found.values() for problem in lines]
    if as_json:
        print(json.dumps({"ok": not problems, "checkpoints": list(found), "problems": problems}))
    else:
        for problem in problems:
            print(problem)
        print(f"{len(found)} checkpoint{'s' if len(found) > 1 else ''} checked, {len(problems)} problems")
    if problems:
        raise typer.Exit(1)

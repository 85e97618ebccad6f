"""`asge-zoo verify`."""

import json
from pathlib import Path

import click

from asge_zoo.cli import options


@click.command("verify")
@click.argument("path", type=options.PATH)
@options.as_json
def verify(path: Path, as_json: bool) -> int:
    """Check every checkpoint in PATH (a run directory, a checkpoint, a pulled model) against its sha256 sums.

    Exit code 1 if one is damaged.
    """
    from asge_zoo.engine.loading import verify as check
    from asge_zoo.hub.published import check_published, is_published

    found = {path: check_published(path)} if is_published(path) else check(path)
    problems = [problem for lines in found.values() for problem in lines]
    if as_json:
        print(json.dumps({"ok": not problems, "checkpoints": [str(folder) for folder in found], "problems": problems}))
    else:
        for problem in problems:
            print(problem)
        print(f"checkpoints checked: {len(found)}, problems: {len(problems)}")
    return 1 if problems else 0

"""`asge-zoo pull`."""

import json
from pathlib import Path

import click

from asge_zoo.cli import options


@click.command("pull")
@click.argument("repo_id", metavar="USER/NAME")
@options.revision
@click.option("--to", type=options.PATH, help="A new folder to copy it to; default the Hub's own cache alone.")
@options.as_json
def pull(repo_id: str, revision: str | None, to: Path | None, as_json: bool) -> None:
    """Fetch the model USER/NAME from the Hub, and check it against the Hub's sums and its own.

    Where the Hub can't be reached, a whole copy in the cache has to do.
    """
    from asge_zoo.hub.pull import pull as fetch

    pulled = fetch(repo_id, revision=revision, to=to, warn=options.warn)
    if as_json:
        print(json.dumps({"path": str(pulled.path), "revision": pulled.revision}))
        return
    print(f"{repo_id}: commit {pulled.revision}, whole")
    print(pulled.path)

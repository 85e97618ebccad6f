"""`asge-zoo push`."""

import json
from pathlib import Path

import click

from asge_zoo.cli import options


@click.command("push")
@click.argument("run", type=options.PATH)
@click.argument("repo_id", metavar="USER/NAME")
@click.option("--revision", help="The branch to push to, created if it is not there; default main.")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--create-pr", is_flag=True, help="Propose a pull request, and leave the branch as it is.")
@click.option("--dry-run", is_flag=True, help="Show what would go where; asks nobody.")
@click.option("--no-eval", is_flag=True, help="Don't measure the bytes on the test images; the card says so.")
@click.option(
    "--license", "licence", default="apache-2.0", show_default=True, help="The weights' licence, on the card."
)
@options.data_root
@options.device
@options.as_json
def push(
    run: Path,
    repo_id: str,
    revision: str | None,
    private: bool,
    create_pr: bool,
    dry_run: bool,
    no_eval: bool,
    licence: str,
    data_root: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Publish the best checkpoint of RUN (a finished run directory) on the Hub as USER/NAME, in one commit.

    The bytes that go are measured on the test images first, and must come to the run's own accuracy.
    """
    from asge_zoo.hub.published import METRICS
    from asge_zoo.hub.push import push as publish

    pushed = publish(
        run,
        repo_id,
        revision=revision,
        private=private,
        create_pr=create_pr,
        evaluated=not no_eval,
        dry_run=dry_run,
        licence=licence,
        device=device,
        data_root=data_root,
    )
    sizes = {name: len(content) for name, content in pushed.files.items()}
    if as_json:
        report = {"repo_id": pushed.repo_id, "revision": pushed.revision, "url": pushed.url}
        print(json.dumps({**report, "files": sizes} if dry_run else report))
        return
    test = json.loads(pushed.files[METRICS])["test"]
    measured = f"{test['accuracy']:.2f} % of {test['count']} test images" if test else "not measured"
    if dry_run:
        print(f"{repo_id}, {revision or 'main'}: would get these files, {measured}; nothing was pushed")
        for name, size in sizes.items():
            print(f"  {name}: {size:,} bytes")
        return
    print(f"{repo_id}: {measured}; commit {pushed.revision}")
    print(pushed.url)

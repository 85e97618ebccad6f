"""`asge-zoo schema`."""

import json

import click


@click.command("schema")
def schema() -> None:
    """Print the JSON Schema of specs, for editors to complete and check by."""
    from asge_zoo.spec import json_schema

    print(json.dumps(json_schema(), indent=2))

"""`asge-zoo explain`."""

import json
from typing import Any

import click

from asge_zoo.cli import options, tables


@click.command("explain")
@options.spec_argument
@options.overrides
@options.as_json
def explain(spec: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show the plan of SPEC: its units, what they compute, and what local training keeps in memory."""
    from asge_zoo.compiler.plan import plan
    from asge_zoo.spec import load_spec

    planned = plan(load_spec(spec, overrides=overrides))
    if as_json:
        print(json.dumps(planned))
    else:
        _show(planned)


def _show(planned: dict[str, Any]) -> None:
    from rich.table import Table

    channels, height, width = planned["input"]
    table = Table(
        title=f"{planned['name']}: {channels}×{height}×{width}, {planned['num_classes']} classes, "
        f"batch {planned['batch_size']}, rule {planned['rule']}",
        box=None,
        pad_edge=False,
        title_justify="left",
    )
    for column in ("unit", "channels", "map", "P", "goodness", "parameters", "MACs/image", "bytes/batch"):
        table.add_column(column, justify="left" if column == "unit" else "right", no_wrap=True)
    for unit in planned["units"]:
        counts = [unit[key] for key in ("partition", "goodness_dim", "parameters", "macs", "activation_bytes")]
        size = f"{unit['height']}×{unit['width']}"
        table.add_row(unit["name"], f"{unit['channels']}", size, *(f"{count:,}" for count in counts))
    console = tables.console()
    console.print(table)
    totals, prediction, memory = planned["totals"], planned["prediction"], planned["memory"]
    for line in (
        f"total: {totals['units']} units, {totals['parameters']:,} parameters, {totals['macs']:,} MACs an image",
        f"prediction {prediction['kind']}: {prediction['parameters']:,} parameters, "
        f"{prediction['activation_bytes']:,} bytes kept a batch",
        f"activations a batch: {memory['local_bytes']:,} bytes by local training, "
        f"{memory['backprop_bytes']:,} by backpropagation (counted as in the paper's Table 3)",
        f"compiled graphs: {planned['compiled_graphs']}",
    ):
        console.print(line, soft_wrap=True)

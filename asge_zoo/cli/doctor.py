"""`asge-zoo doctor`."""

import json
from pathlib import Path

import click

from asge_zoo.cli import options


@click.command("doctor")
@options.data_root
@options.as_json
def doctor(data_root: Path | None, as_json: bool) -> int:
    """Say what is installed, which devices and data there are, whether torch.compile works, and what to do.

    Exit code 1 if something that training needs is missing.
    """
    from asge_zoo.data.base import data_root as find_root
    from asge_zoo.report.doctor import examine

    checks = examine(find_root(data_root))
    ok = all(check.status != "fail" for check in checks)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [vars(c) for c in checks]}))
    else:
        for check in checks:
            print(f"{check.status:<5} {check.name}: {check.detail}" + (f"; {check.remedy}" if check.remedy else ""))
    return 0 if ok else 1

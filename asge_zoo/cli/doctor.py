"""`asge-zoo doctor`."""

import json

import typer

from asge_zoo.cli.options import AsJson, DataRoot


def doctor(data_root: DataRoot = None, as_json: AsJson = False) -> None:
    """Say what is installed, which devices and data there are, whether torch.compile works, and what to do about it.

    Exit code 1 if something that training needs is missing.
    """
    from asge_zoo.data.base import data_root as find_root
    from asge_zoo.report.doctor import examine

    checks = examine(find_root(data_root))
    if as_json:
        print(json.dumps({"ok": all(check.status != "fail" for check in checks), "checks": [vars(c) for c in checks]}))
    else:
        for check in checks:
            print(f"{check.status:<5} {check.name}: {check.detail}" + (f"; {check.remedy}" if check.remedy else ""))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)

"""`asge-zoo validate`."""

import json

from asge_zoo.cli.options import AsJson, Overrides, SpecSource


def validate(spec: SpecSource, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a spec: every field, and whether its parts fit together. Reads no data; `explain` builds the network."""
    from asge_zoo.compiler.check import check_spec
    from asge_zoo.spec import load_spec

    loaded = load_spec(spec, overrides=overrides or ())
    check_spec(loaded)
    if as_json:
        report = {"valid": True, "name": loaded.name, "spec_sha256": loaded.digest(), "spec": loaded.resolved()}
        print(json.dumps(report))
        return
    print(f"{spec}: valid ({loaded.name})")

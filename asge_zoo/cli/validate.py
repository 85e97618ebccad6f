"""`asge-zoo validate`."""

import json

import click

from asge_zoo.cli import options


@click.command("validate")
@options.spec_argument
@options.overrides
@options.as_json
def validate(spec: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check SPEC: every field, and whether its parts fit together. Reads no data."""
    from asge_zoo.compiler.build import compile_spec
    from asge_zoo.compiler.check import check_spec
    from asge_zoo.spec import load_spec

    loaded = load_spec(spec, overrides=overrides)
    check_spec(loaded)
    if loaded.plugins:  # may refuse what only the built network shows; a meta tensor's convolution takes torch seconds
        compile_spec(loaded, device="meta")
    if as_json:
        report = {"valid": True, "name": loaded.name, "spec_sha256": loaded.digest(), "spec": loaded.resolved()}
        print(json.dumps(report))
        return
    print(f"{spec}: valid ({loaded.name})")

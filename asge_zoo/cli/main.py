"""`asge-zoo`: what is typed becomes a command, and what goes wrong becomes one line and an exit code.

0 done; 1 the command ran and the answer is no; 2 bad input, missing data or a broken file; 130 after SIGINT.
"""

import sys

import click
import typer

from asge_zoo.cli import doctor, evaluate, explain, ls, schema, train, validate, verify
from asge_zoo.errors import ZooError

app = typer.Typer(
    name="asge-zoo",
    help="Train, inspect and evaluate convolutional networks that learn without backpropagation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("validate")(validate.validate)
app.command("explain")(explain.explain)
app.command("schema")(schema.schema)
app.command("ls")(ls.ls)
app.command("verify")(verify.verify)
app.command("doctor")(doctor.doctor)


def run(arguments: list[str] | None = None) -> int:
    """Run one command line; returns its exit code. Errors that a user can act on go to stderr as one line."""
    try:
        return app(args=arguments, standalone_mode=False) or 0
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except ZooError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"asge-zoo: {' '.join(message.split())}", file=sys.stderr)
    return code


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())

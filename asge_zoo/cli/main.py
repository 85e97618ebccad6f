"""`asge-zoo`: what is typed becomes a command, and what goes wrong becomes one line and an exit code.

0 done; 1 the command ran and the answer is no; 2 bad input, missing data or a broken file; 3 the network or the Hub;
129, 130, 138 and 143 after SIGHUP, SIGINT, SIGUSR1 and SIGTERM.
"""

import os
import sys
from signal import Signals

import click

from asge_zoo.cli.bench import bench
from asge_zoo.cli.compare import compare
from asge_zoo.cli.data import data
from asge_zoo.cli.doctor import doctor
from asge_zoo.cli.evaluate import evaluate
from asge_zoo.cli.explain import explain
from asge_zoo.cli.export import export
from asge_zoo.cli.ls import ls
from asge_zoo.cli.plugins import plugins
from asge_zoo.cli.predict import predict
from asge_zoo.cli.pull import pull
from asge_zoo.cli.push import push
from asge_zoo.cli.schema import schema
from asge_zoo.cli.train import train
from asge_zoo.cli.validate import validate
from asge_zoo.cli.verify import verify
from asge_zoo.errors import Stopped, ZooError
from asge_zoo.process import collect_garbage_rarely, hush_torch, keep_freed_memory

COMMANDS = (
    *(train, evaluate, predict, compare, push, pull, validate, explain, schema),
    *(ls, plugins, data, export, verify, bench, doctor),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="asge-zoo", message="%(package)s %(version)s")
def cli() -> None:
    """Train, inspect and evaluate convolutional networks that learn without backpropagation."""


for command in COMMANDS:
    cli.add_command(command)


def run(arguments: list[str] | None = None) -> int:
    """Run one command line; returns its exit code. Errors that a user can act on go to stderr as one line."""
    hush_torch()
    try:
        return cli.main(args=arguments, prog_name="asge-zoo", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" See `{context.command_path} --help`." if context else ""
        return _fail(error.format_message() + hint, error.exit_code)
    except ZooError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:  # a path too long, a folder that may not be read
        return _fail(f"{error.filename or 'file'}: {error.strerror or error}; give another path", 2)
    except click.Abort:  # click's own name for a KeyboardInterrupt
        stopped = Stopped(Signals.SIGINT)
        return _fail(str(stopped), stopped.exit_code)
    except SystemExit as ended:  # a rank that is ended by its launcher, which has the word
        return int(ended.code or 0)


def _fail(message: str, code: int) -> int:
    print(f"asge-zoo: {' '.join(message.split())}", file=sys.stderr)
    return code


def main() -> None:
    """Entry point of the console script."""
    collect_garbage_rarely()
    if sys.argv[1:2] != ["bench"]:  # where that is left to the process which runs what `train` runs
        keep_freed_memory()
    code = run()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank: torch's teardown of process groups aborts now and then
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

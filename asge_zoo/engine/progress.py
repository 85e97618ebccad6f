"""What a person sees of a run: a bar and a line an epoch on stderr, where that is a terminal; else nothing."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from asge_zoo.engine.meter import EpochRecord


class ImagesPerSecond(ProgressColumn):
    """Training images per second, lately."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")


class RunProgress:
    """A run's progress over all its images; use as a context manager. Quiet where stderr is no terminal.

    Args:
        name: of the run.
        total_images: to train on, epoch by epoch.
        silent: says nothing at all, not even warnings: another rank does.
    """

    def __init__(self, name: str, total_images: int, *, silent: bool = False) -> None:
        self._silent = silent
        self._console = Console(stderr=True, highlight=False)
        self._console.quiet = silent or not self._console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            ImagesPerSecond(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=self._console.quiet,
        )
        self._task = self._bar.add_task(name, total=total_images)

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, images: int) -> None:
        """Start from images trained on before."""
        self._bar.reset(self._task, completed=images)

    def advance(self, images: int) -> None:
        """Count images trained on."""
        self._bar.advance(self._task, images)

    def epoch(self, record: EpochRecord, epochs: int) -> None:
        """Print an epoch's line."""
        trained = "" if record.train.accuracy is None else f"train {record.train.accuracy:.2f} %  "
        self._console.print(
            f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}  loss {record.train.loss:.4f}  "
            f"{trained}validation {record.validation.accuracy:.2f} %  "
            f"{record.images_per_second:,.0f} images/s",
            soft_wrap=True,
        )

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, soft_wrap=True, markup=False)

    def warn(self, line: str) -> None:
        """Print a line, on a terminal or not: what a user must not miss."""
        if self._silent:
            return
        if self._console.quiet:
            print(f"asge-zoo: {line}", file=sys.stderr)
        else:
            self.say(line)

"""What a person sees of a run: a bar and a line an epoch on stderr, where that is a terminal; else nothing."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class ImagesPerSecond(ProgressColumn):
    """Training images per second, lately."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")


class RunProgress:
    """A run's progress over all its images; use as a context manager. Quiet where stderr is no terminal."""

    def __init__(self, name: str, total_images: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._console.quiet = not self._console.is_terminal
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

    def advance(self, images: int) -> None:
        """Count images trained on."""
        self._bar.advance(self._task, images)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """Print an epoch's line."""
        train, validation = record["train"], record["validation"]
        self._console.print(
            f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  loss {train['loss']:.4f}  "
            f"train {train['accuracy']:.2f} %  validation {validation['accuracy']:.2f} %  "
            f"{record['images_per_second']:,.0f} images/s",
            soft_wrap=True,
        )

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, soft_wrap=True, markup=False)

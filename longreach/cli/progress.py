"""Progress bars of storing a context and of building its index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from longreach.sdk import Context


@contextmanager
def context_bar(console: Console, label: str, kind: str) -> Iterator[Callable[[Context], None]]:
    """A bar that an SDK call drives through its `on_progress`.

    `kind` is "prefill" or "index". Without a terminal, rich prints the last state only.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=1.0, detail="")

        def show(context: Context) -> None:
            if kind == "index":
                fraction, detail = context.index_fraction, context.index_kind
            else:
                fraction, detail = context.prefill_fraction, f"{context.tokens:,} tokens"
            progress.update(task, completed=fraction, detail=detail)

        yield show

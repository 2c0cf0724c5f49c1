"""Tasks. Importing this package registers all of them."""

from evaluation.tasks import (
    infinitebench,
    infinitebench_files,
    mixed,
    needle,
    ruler_niah,
    ruler_qa,
    ruler_vt,
    ruler_words,
)
from evaluation.tasks.base import TASKS, Sample, Sources, Spec, Task, select_tasks

__all__ = [
    "TASKS",
    "Sample",
    "Sources",
    "Spec",
    "Task",
    "infinitebench",
    "infinitebench_files",
    "mixed",
    "needle",
    "ruler_niah",
    "ruler_qa",
    "ruler_vt",
    "ruler_words",
    "select_tasks",
]

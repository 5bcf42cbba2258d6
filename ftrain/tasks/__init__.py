"""Training tasks, each a pure loss: next tokens, preferences, judged answers, a teacher's distributions."""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.tasks.kd import Kd
    from ftrain.tasks.kto import Kto
    from ftrain.tasks.language import NextToken
    from ftrain.tasks.preference import Dpo
    from ftrain.tasks.task import Task

__all__ = ["Dpo", "Kd", "Kto", "NextToken", "Task"]
__getattr__ = lazy_names(
    "ftrain.tasks",
    {"kd": ("Kd",), "kto": ("Kto",), "language": ("NextToken",), "preference": ("Dpo",), "task": ("Task",)},
)

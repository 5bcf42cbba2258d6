"""Training tasks, each a pure loss: next tokens, preferences, judged answers, a teacher's words, heads, embeddings."""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.tasks.embedding import Embed
    from ftrain.tasks.heads import Classify, Reward
    from ftrain.tasks.kd import Kd
    from ftrain.tasks.kto import Kto
    from ftrain.tasks.language import NextToken
    from ftrain.tasks.preference import Dpo
    from ftrain.tasks.task import Task

__all__ = ["Classify", "Dpo", "Embed", "Kd", "Kto", "NextToken", "Reward", "Task"]
__getattr__ = lazy_names(
    "ftrain.tasks",
    {
        "embedding": ("Embed",),
        "heads": ("Classify", "Reward"),
        "kd": ("Kd",),
        "kto": ("Kto",),
        "language": ("NextToken",),
        "preference": ("Dpo",),
        "task": ("Task",),
    },
)

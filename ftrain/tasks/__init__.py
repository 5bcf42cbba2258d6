"""Training tasks, each a pure loss: next tokens, preferences, judged answers, a teacher's words, heads, embeddings, and
velocity fields (`flow.py`; what is distilled of one: `distill/`).
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.tasks.embedding import Embed
    from ftrain.tasks.flow import Flow, Times
    from ftrain.tasks.heads import Classify, Reward
    from ftrain.tasks.kd import Kd
    from ftrain.tasks.kto import Kto
    from ftrain.tasks.language import NextToken
    from ftrain.tasks.preference import Dpo
    from ftrain.tasks.task import Task

__all__ = ["Classify", "Dpo", "Embed", "Flow", "Kd", "Kto", "NextToken", "Reward", "Task", "Times"]
__getattr__ = lazy_names(
    "ftrain.tasks",
    {
        "embedding": ("Embed",),
        "flow": ("Flow", "Times"),
        "heads": ("Classify", "Reward"),
        "kd": ("Kd",),
        "kto": ("Kto",),
        "language": ("NextToken",),
        "preference": ("Dpo",),
        "task": ("Task",),
    },
)

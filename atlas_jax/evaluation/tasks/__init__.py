"""The table of tasks. A new one is a file that makes a `Task`, and a line here."""

from atlas_jax.evaluation.measures import Task
from atlas_jax.evaluation.tasks import facts, loss

TASKS: tuple[Task, ...] = (
    loss.TASK,
    facts.TASK,
)

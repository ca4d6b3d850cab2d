"""The table of tasks. A new one is a file that makes a `Task`, and a line here."""

from atlas_jax.evaluation.measures import Task
from atlas_jax.evaluation.tasks import (
    associations,
    chat,
    cost,
    facts,
    generation,
    lists,
    loss,
    names,
    overwritten,
    plain_text,
    reasoning,
    ruler,
)

TASKS: tuple[Task, ...] = (
    loss.TASK,
    facts.TASK,
    overwritten.TASK,
    lists.TASK,
    names.TASK,
    chat.TASK,
    associations.TASK,
    ruler.TASK,
    plain_text.TASK,
    reasoning.TASK,
    generation.TASK,
    cost.TASK,
)

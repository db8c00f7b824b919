"""From a recipe's YAML to a checked ``Recipe``, and from there to the loaded model.

``file`` reads the mapping, ``schema`` has its sections, and ``loading`` makes the one of the other if the ``checks``
find nothing, with the rules of ``setting_rules`` and ``annotations`` about the fields that ``library_fields`` finds;
``base_model`` loads what the recipe names.
"""

from .loading import general_tests, load_recipe, recipe_text, stored_recipe, task_order
from .schema import (
    DEMO,
    AdapterSection,
    CompareSection,
    EvaluationSection,
    ModelSection,
    Recipe,
    TasksSection,
)

__all__ = [
    "DEMO",
    "AdapterSection",
    "CompareSection",
    "EvaluationSection",
    "ModelSection",
    "Recipe",
    "TasksSection",
    "general_tests",
    "load_recipe",
    "recipe_text",
    "stored_recipe",
    "task_order",
]

"""From a recipe's YAML to a checked ``Recipe``, and from there to the loaded model.

``schema`` reads and checks with the rules of ``setting_rules`` about the fields that ``library_fields`` finds;
``base_model`` loads what the recipe names.
"""

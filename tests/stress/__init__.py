"""The harness of ``make stress``: runs that are killed, files that are damaged, recipes and data that are mutated."""

"""What a recipe will need, before anything is loaded.

A recipe goes into ``estimate``, which answers with bytes and seconds by phase.
"""

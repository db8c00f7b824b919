"""What a recipe will need, before anything is loaded.

A recipe goes into ``estimate``, which builds the model of ``meta_model`` and lets each of ``phases`` count
what it would allocate, in the precision of ``lowered``; ``advice`` prints the answer and the first knob to turn.
"""

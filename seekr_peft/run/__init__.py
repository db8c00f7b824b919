"""A task sequence as one run directory that can be stopped, resumed, repaired and exported.

A recipe goes into ``runner``, which trains the stages of ``stages`` one after the other, shows them through
``progress`` and counts them in ``task_costs``.
"""

"""A task is trained here: the Trainer mixin, what it stores inside a task, and how a signal stops it.

A batch comes from transformers' or TRL's loop into ``trainer``, which asks the method for the replay loss;
``checkpoint`` stores what the next process needs.
"""

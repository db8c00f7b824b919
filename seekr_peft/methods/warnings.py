"""What a person should know of a task that was trained, though nothing is wrong enough to stop it."""

from __future__ import annotations

import logging

from ..model.low_rank_sum import Consolidation

logger = logging.getLogger("seekr_peft")


def warn_of_a_training_without_effect(name: str, has_learnt: bool) -> None:
    """Where the task's adapter is what it was at the beginning."""
    if not has_learnt:
        logger.warning(
            "task %s: its adapter is what it was at the beginning, so nothing was learnt; check the learning rate, "
            "the number of steps, and that nothing loaded other weights into it.",
            name,
        )


def warn_of_a_training_without_replay(name: str, n_replayed: int) -> None:
    """Where a method that keeps a replay memory has used none of it."""
    if not n_replayed:
        logger.warning(
            "task %s: no replay batch was used while it was trained, so the earlier tasks are forgotten; in a "
            "hand-written loop pass optimizer_steps to task() and call replay_loss() once per step.",
            name,
        )


def warn_of_a_cut(name: str, consolidation: Consolidation) -> None:
    """Where the sum of the earlier adapters had to be cut to ``rank_limit``."""
    if consolidation.discarded_energy > 0:
        logger.warning(
            "task %s: the earlier adapters were cut to rank %d, which discards %.3g of their squared singular values "
            "(%.3g in the worst module); raise rank_limit to keep more.",
            name,
            consolidation.rank,
            consolidation.discarded_energy,
            consolidation.worst_module_energy,
        )

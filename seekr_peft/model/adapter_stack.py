"""``AdapterStack``: one LoRA per task over the frozen sum of the earlier ones.

The only file that changes PEFT state. Verified with PEFT 0.21.2. Deliberately not used, each measured to go wrong:
merging into 4-bit weights (the update is rounded away), ``disable_adapter()`` as a switch (it un-freezes every active
adapter on exit), ``set_adapter`` without freezing again (it makes every named adapter trainable)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from ..errors import AdapterError
from ..files.atomic import replacing, scratch_folder
from .adapter_checks import check_active, check_summable, check_wrapping, checked_template, is_trained
from .adapter_files import load_adapter, saved_rank, sort_names
from .bitsandbytes_cpu import keep_differentiable
from .lora_layers import active_adapter, changed_config, free_name, layers_of, lora_layers
from .low_rank_sum import Consolidation, RankLimit, cut_to_rank, fill_adapter, resolved_rank_limit, summed_factors
from .plain_lora import CONFIG_FILE, WEIGHTS_FILE

Mode = Literal["stack", "continue"]


_ADOPTED = "earlier_00"


class AdapterStack:
    """The adapters of a task sequence on one ``PeftModel``.

    ``mode="stack"``: task k trains a fresh adapter on top of ONE frozen adapter that is the exact sum of the earlier
    ones (ranks concatenated; truncated SVD once the rank passes ``rank_limit``). ``mode="continue"``: one adapter
    goes on training through all tasks.

    An adapter that the model already carries is kept: untouched (B = 0) it only serves as the template for the
    tasks' adapters and is removed; trained and active, it counts as an earlier one. The stack's own adapters are called
    task_NN and earlier_NN, or, where the model has such a one already, task_NN_2 and so on.

    Raises:
        AdapterError: The model has no plain LoRA adapter, or one that cannot be summed exactly (see ``plain_lora``;
            embeddings, experts, merged or hidden adapters), or a trained one that is not active.
    """

    def __init__(self, model: PeftModel, mode: Mode = "stack", rank_limit: RankLimit = "auto") -> None:
        check_wrapping(model)
        if mode not in ("stack", "continue"):
            raise AdapterError(f"mode must be 'stack' or 'continue', got {mode!r}.")
        if rank_limit not in (None, "auto") and not (isinstance(rank_limit, int) and rank_limit >= 1):
            raise AdapterError(f"rank_limit must be 'auto', None or at least 1, got {rank_limit!r}.")
        self.model = model
        self.mode = mode
        self.n_tasks = 0
        self.current: str | None = None
        self.earlier: str | None = None
        self.last_consolidation: Consolidation | None = None
        self.adopted = False
        """Whether the model carried a trained adapter before the first task; it counts as an earlier one."""
        keep_differentiable(model)
        self._template = checked_template(model)
        self._layers = layers_of(model, active_adapter(model))
        own = max([self._template.r, *(self._template.rank_pattern or {}).values()])
        self.rank_limit = resolved_rank_limit(rank_limit, own)
        # Untrained adapters; one stays until the first task is finished, since a PeftModel without any cannot run.
        self._unused: list[str] = []
        # By identity they tell the own adapters from those that a later stack made under the same names.
        self._configs: dict[str, Any] = dict(model.peft_config)
        self._before: dict[str, Tensor] = {}
        self._frozen_fingerprint = ""
        self._adopt_existing()

    # One task ---------------------------------------------------------------------------------------------------

    def begin(self) -> str:
        """Start a task: make (or go on with) its adapter, freeze everything else; returns the adapter's name."""
        if self.current is not None:
            raise AdapterError(
                f"task adapter {self.current!r} is still being trained; finish or abandon it before the next task."
            )
        self._check_own_adapters()
        if self.mode == "continue" and self.earlier is not None:
            self.current = self.earlier
        else:
            self.current = self._add(f"task_{self.n_tasks + 1:02d}", self._template)
        if self.mode == "continue":
            self._before = {key: value.clone() for key, value in self.parameters().items()}
        self.activate()
        self._frozen_fingerprint = self._fingerprint(self._frozen_names())
        return self.current

    def activate(self) -> None:
        """(Re)activate earlier + current adapter with exactly the current one trainable.

        ``PeftModel.set_adapter`` takes one name only, and its tuner's takes a list but makes them all trainable.
        """
        # The PeftModel's own name picks the configuration that its forward reads, so it must exist even when none acts.
        self.model.set_adapter(self.current or self.earlier or self._unused[0])
        if self.current is None:
            self._show(self._frozen_names())
            return
        self._show([*self._frozen_names(), self.current])
        self.model.base_model.set_requires_grad(self.current, True)

    def finish(self, check: AbstractContextManager[Any] | None = None) -> Consolidation | None:
        """End the task: check that nothing frozen moved, freeze the adapter and add it to the earlier ones.

        ``check`` is entered while the earlier and the current adapter act and left while their exact sum does; where
        it raises, the task is still open and its adapters are as they were. ``mode="continue"`` sums nothing.

        Raises:
            AdapterError: The earlier adapters changed, or an adapter is no longer one that can be added up.
        """
        current = self._require_current()
        self.check_frozen_unchanged()
        check_summable(self.model)
        if self.mode == "continue":
            self.earlier, self._before = current, {}
            self.last_consolidation = Consolidation(self._template.r, 0.0, 0.0)
        else:
            # May run out of memory; until it is done the task can still be abandoned.
            names = [*self._frozen_names(), current]
            self.earlier = self._consolidate(f"earlier_{self.n_tasks + 1:02d}", names, check)
        self.n_tasks += 1
        self.current = None
        self.activate()
        return self.last_consolidation

    def abandon(self) -> None:
        """Drop the current task's adapter (after an error) and go back to the earlier ones."""
        current = self._require_current()
        if self._gone():
            # The model is a later stack's.
            self.current = None
            return
        self.current = None
        if any(layer.merged for _, layer in lora_layers(self.model)):
            self.model.base_model.unmerge_adapter()
        if self.mode == "continue" and current == self.earlier:
            with torch.no_grad():
                for key, value in self._parameters_of(current).items():
                    value.copy_(self._before[key])
        else:
            self.activate()
            self._delete([current])
        self._before = {}
        self.activate()

    @contextmanager
    def before_task(self) -> Iterator[None]:
        """The model as it was right before the current task (theta_{k-1}); everything is restored on exit."""
        current = self._require_current()
        if self.mode == "stack":
            self._show(self._frozen_names())
            try:
                yield
            finally:
                self.activate()
            return
        # Exchanged and not overwritten: a forward whose backward is still to come has saved these very tensors.
        after = {key: parameter.data for key, parameter in self.parameters().items()}
        try:
            self._exchange(current, self._before)
            yield
        finally:
            self._exchange(current, after)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter requires a gradient inside (scoring differentiates activations only)."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    # Checks -----------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        """The current task's adapter parameters by module path."""
        return self._parameters_of(self._require_current())

    def has_learnt(self) -> bool:
        """Whether the current task's adapter changes anything that it did not change when the task began."""
        parameters = self.parameters()
        if self._before:
            return any(not torch.equal(value, self._before[key].to(value.device)) for key, value in parameters.items())
        return any(bool(value.any()) for key, value in parameters.items() if key.endswith("lora_B"))

    def earlier_parameters(self) -> dict[str, Tensor]:
        """The frozen sum of the earlier adapters by module path, the scalings inside A; empty when there is none."""
        return {key: value for name in self._frozen_names() for key, value in self._parameters_of(name).items()}

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that does not hold exactly the current adapter's parameters.

        Raises:
            AdapterError: With the number of missing and of foreign parameters.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        wanted = {id(parameter) for parameter in self.parameters().values()}
        if held != wanted:
            raise AdapterError(
                f"the optimizer must hold exactly the {len(wanted)} tensors of adapter {self.current!r}, but "
                f"{len(wanted - held)} of them are missing and {len(held - wanted)} others are in it; build the "
                f"optimizer inside `with seekr.task(...)`, from the parameters that require a gradient."
            )
        trainable = {id(p) for p in self.model.parameters() if p.requires_grad}
        if trainable != wanted:
            raise AdapterError(
                f"{len(trainable - wanted)} frozen tensors became trainable and {len(wanted - trainable)} of adapter "
                f"{self.current!r} do not train; something called set_adapter() or disable_adapter() on the model "
                f"after the task began: call method.stack.activate()."
            )

    def check_frozen_unchanged(self) -> None:
        """Raises AdapterError when a frozen adapter is not bitwise what it was when the task began, or one is gone."""
        self._check_own_adapters()
        if self._fingerprint(self._frozen_names()) != self._frozen_fingerprint:
            raise AdapterError(
                f"the frozen adapter {self.earlier!r} changed while {self.current!r} was trained; the earlier tasks "
                f"would be lost, so this task is refused: check what else updates the model's parameters."
            )

    # Files ------------------------------------------------------------------------------------------------------

    def save_current(self, directory: Path) -> None:
        """Write the current task's adapter as a plain PEFT adapter directory.

        Raises:
            AdapterError: The adapter's scaling is not that of its configuration, which is what is written.
        """
        current = self._require_current()
        for path, layer in lora_layers(self.model):
            before = layer.scaling.get(current)
            layer.set_scale(current, 1.0)
            wanted, layer.scaling[current] = layer.scaling[current], before
            if before != wanted:
                raise AdapterError(
                    f"adapter {current!r} has a scaling of {before:g} at {path} and {wanted:g} by its configuration, "
                    f"which is all that its files say; undo what rescaled it, or set lora_alpha before the task."
                )
        self._save(current, directory)

    def load_current(self, directory: Path) -> None:
        """Bring the current task's adapter back to what ``save_current`` wrote into ``directory``."""
        load_adapter(self.model, self._require_current(), directory)
        self.activate()

    def export(self, directory: Path) -> None:
        """Write the consolidated adapter (all finished tasks) as a plain PEFT adapter directory."""
        if self.earlier is None:
            raise AdapterError("there is nothing to export before the first task is finished.")
        self._save(self.earlier, directory)

    def restore(self, directories: list[Path], adopted: Path | None = None) -> None:
        """Rebuild the state after ``len(directories)`` finished tasks from what ``save_current`` wrote for each.

        Repeats the same consolidations in the same order, so the result is bitwise that of the uninterrupted run.
        ``adopted`` is the directory of a trained adapter that the first model carried, unless this one carries it too.
        """
        if adopted is not None and self.mode == "stack" and not self.adopted:
            name = self._add(_ADOPTED, self._consolidated_config(saved_rank(adopted)))
            load_adapter(self.model, name, adopted)
            self._delete(self._unused)
            self._unused, self.earlier, self.adopted = [], name, True
            self.activate()
        for directory in directories if self.mode == "stack" else directories[-1:]:
            self.begin()
            load_adapter(self.model, self._require_current(), Path(directory))
            self.finish()
        self.n_tasks = len(directories)

    # Inside -----------------------------------------------------------------------------------------------------

    def _adopt_existing(self) -> None:
        names = list(self.model.peft_config)
        if self.mode == "continue" and len(names) > 1:
            raise AdapterError(f"mode 'continue' needs a model with one adapter, got {names}; delete the others first.")
        trained = [name for name in names if is_trained(self.model, name)]
        check_active(self.model, trained)
        if self.mode == "continue":
            self.earlier = names[0]
        else:
            self._unused = [name for name in names if name not in trained]
            if trained:
                self.earlier = self._consolidate(_ADOPTED, trained)
                self.adopted = True
        self.activate()

    def _check_own_adapters(self) -> None:
        gone = self._gone()
        if gone:
            raise AdapterError(
                f"adapter {gone[0]!r} of this stack is gone: a later method or stack over the same model has taken it "
                f"over, or it was deleted; go on with the later one."
            )

    def _gone(self) -> list[str]:
        """Own adapters that the model no longer has; another may have got the name."""
        own = [name for name in (self.current, self.earlier, *self._unused) if name]
        return [name for name in own if self.model.peft_config.get(name) is not self._configs[name]]

    def _require_current(self) -> str:
        if self.current is None:
            raise AdapterError("no task is being trained; use `with seekr.task(name, ...)`.")
        return self.current

    def _frozen_names(self) -> list[str]:
        return [self.earlier] if self.earlier and self.earlier != self.current else []

    def _add(self, name: str, config: LoraConfig) -> str:
        """Add an untrained adapter called ``name``, or the next free name after it; returns its name."""
        name = free_name(name, self.model.peft_config)
        self.model.add_adapter(name, changed_config(config))
        missed = self._layers.symmetric_difference(layers_of(self.model, name))
        if missed:
            self._delete([name])
            raise AdapterError(
                f"the model's adapter sits on other layers than its configuration names, such as {min(missed)}, so the "
                f"tasks' adapters cannot be made like it: two adapters were put into one base; load the base anew."
            )
        self._configs[name] = self.model.peft_config[name]
        return name

    def _delete(self, names: list[str]) -> None:
        for name in names:
            self.model.base_model.delete_adapter(name)
            self._configs.pop(name, None)

    def _show(self, names: list[str]) -> None:
        """Make ``names`` the active adapters, all frozen."""
        self.model.base_model.set_adapter(names, inference_mode=True)

    def _exchange(self, name: str, values: dict[str, Tensor]) -> None:
        for key, parameter in self._parameters_of(name).items():
            parameter.data = values[key].to(parameter.device)

    def _parameters_of(self, name: str) -> dict[str, Tensor]:
        return {
            f"{path}.{side}": matrices[name].weight
            for path, layer in lora_layers(self.model)
            for side, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
            if name in matrices
        }

    def _fingerprint(self, names: list[str]) -> str:
        digest = hashlib.blake2b()
        for name in names:
            for value in self._parameters_of(name).values():
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            digest.update(str([layer.scaling.get(name) for _, layer in lora_layers(self.model)]).encode())
        return digest.hexdigest()

    def _consolidate(self, name: str, names: list[str], check: AbstractContextManager[Any] | None = None) -> str:
        """Replace the adapters ``names`` by one called ``name``; nothing has changed yet if the arithmetic or the
        ``check`` fails."""
        factors = {path: summed_factors(layer, names) for path, layer in lora_layers(self.model)}
        rank, discarded = max(a.shape[0] for a, _ in factors.values()), [(0.0, 1.0)]
        if self.rank_limit is None or rank <= self.rank_limit:
            summed = self._add_checked(name, factors, check) if check else self._add_sum(name, factors)
        else:
            if check is not None:
                self._check_sum(factors, check)
            rank = self.rank_limit
            truncated = {path: cut_to_rank(a, b, rank) for path, (a, b) in factors.items()}
            discarded = [(lost, total) for _, _, lost, total in truncated.values()]
            summed = self._add_sum(name, {path: (a, b) for path, (a, b, _, _) in truncated.items()})
        self.model.set_adapter(summed)
        self._delete([*names, *self._unused])
        self._unused = []
        total = sum(total for _, total in discarded)
        self.last_consolidation = Consolidation(
            rank,
            sum(lost for lost, _ in discarded) / max(total, 1e-30),
            max(lost / max(total, 1e-30) for lost, total in discarded),
        )
        return summed

    def _check_sum(self, factors: dict[str, tuple[Tensor, Tensor]], check: AbstractContextManager[Any]) -> None:
        """Let the exact sum act for ``check`` alone: what truncation changes afterwards, it reports itself."""
        # Drawing the start of one adapter more would give the next task's another one.
        with torch.random.fork_rng(devices=[]):
            summed = self._add_checked("sum", factors, check)
        self.activate()
        self._delete([summed])

    def _add_checked(
        self, name: str, factors: dict[str, tuple[Tensor, Tensor]], check: AbstractContextManager[Any]
    ) -> str:
        """Add the adapter of ``factors``, which acts alone at the end of ``check`` and is removed where that fails."""
        summed = ""
        try:
            with check:
                summed = self._add_sum(name, factors)
                self.model.set_adapter(summed)
                self._show([summed])
        except BaseException:
            self.activate()
            self._delete([summed] if summed else [])
            raise
        return summed

    def _add_sum(self, name: str, factors: dict[str, tuple[Tensor, Tensor]]) -> str:
        rank = max(a.shape[0] for a, _ in factors.values())
        name = self._add(name, self._consolidated_config(rank))
        # A later stack over this model makes its tasks' adapters like this one's, not like their sum.
        self.model.peft_config[name]._seekr_template = self._template  # type: ignore[attr-defined]
        fill_adapter(self.model, name, factors)
        return name

    def _consolidated_config(self, rank: int) -> LoraConfig:
        # lora_alpha = r gives scaling 1: the old scalings are inside A. A frozen adapter has no dropout.
        return changed_config(
            self._template,
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            use_rslora=False,
            rank_pattern={},
            alpha_pattern={},
        )

    def _save(self, name: str, directory: Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with scratch_folder(directory) as scratch:
            # PEFT writes any adapter but "default" into a folder of its name.
            self.model.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
            written = scratch / name if name != "default" else scratch
            sort_names(written / CONFIG_FILE)
            for file in (WEIGHTS_FILE, CONFIG_FILE):
                with replacing(directory / file) as temporary:
                    os.replace(written / file, temporary)

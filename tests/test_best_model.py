"""``load_best_model_at_end``: the task keeps its own adapter of the best checkpoint, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.trainers import NEW, OLD, adapted, arguments, copied
from torch import Tensor

from seekr_peft import ContinualTrainer, Seekr, SeekrConfig, Sequential
from seekr_peft.errors import AdapterError, ConfigError, RunError


def with_checkpoints(folder: Path, **changes: Any) -> Any:
    settings = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 6,
        "load_best_model_at_end": True,
        **changes,
    }
    return arguments(folder, **settings)


def keeper(method: Any) -> Any:
    """Keeps the adapter after each step."""
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        after: dict[int, dict[str, Tensor]]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.after[state.global_step] = copied(method.stack.parameters())

    made = Keeper()
    made.after = {}
    return made


def rigged(method: Any, args: Any, dataset: Any, best_step: int, callbacks: Any = ()) -> tuple[Any, Any]:
    """A trainer whose evaluation is best at ``best_step``, and what it kept of each step."""
    keep = keeper(method)
    trainer = ContinualTrainer(
        model=method.model,
        method=method,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset[:4],
        callbacks=[keep, *callbacks],
    )
    own = trainer.evaluation_loop
    trainer.evaluation_loop = lambda *a, **k: _scored(own(*a, **k), abs(trainer.state.global_step - best_step) + 1.0)
    return trainer, keep


def _scored(output: Any, loss: float) -> Any:
    output.metrics["eval_loss"] = loss
    return output


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("mode", ["stack", "continue"])
@pytest.mark.parametrize("best", [2, 4])
def test_each_task_keeps_its_adapter_of_the_best_step(tmp_path: Path, best: int, mode: str) -> None:
    method = Seekr(
        adapted(), SeekrConfig(replay_ratio=0.25, replay_every=2), directory=tmp_path / "method", adapter_mode=mode
    )
    for name, dataset in (("first", OLD), ("second", NEW)):
        frozen = copied(method.stack.earlier_parameters())
        with method.task(name, replay_from=dataset):
            trainer, keep = rigged(method, with_checkpoints(tmp_path / name), dataset, best)
            trainer.train()
            now = copied(method.stack.parameters())
            trainable = {id(p) for p in method.model.parameters() if p.requires_grad}
            assert trainable == {id(p) for p in method.stack.parameters().values()}
            assert mode == "continue" or equal(frozen, copied(method.stack.earlier_parameters()))
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
        assert equal(now, keep.after[best]) and not equal(now, keep.after[6])
        assert sum(float(value.abs().sum()) for path, value in now.items() if path.endswith("lora_B")) > 0.1
        written = method.task_directory(len(method.task_names) - 1, name) / "adapter" / "adapter_model.safetensors"
        from safetensors.torch import load_file

        stored = sorted(load_file(written).items())
        assert len(stored) == len(now)
        assert {value.abs().sum().item() for _, value in stored} == {v.abs().sum().item() for v in now.values()}


def test_early_stopping_keeps_the_best_step_and_goes_on_with_the_next_task(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    method = Sequential(adapted(), directory=tmp_path / "method")
    for name, dataset in (("first", OLD), ("second", NEW)):
        with method.task(name):
            stop = EarlyStoppingCallback(early_stopping_patience=2)
            args = with_checkpoints(tmp_path / name, max_steps=40, save_total_limit=1)
            trainer, keep = rigged(method, args, dataset, 4, [stop])
            trainer.train()
            assert trainer.state.global_step == 8
            assert equal(copied(method.stack.parameters()), keep.after[4])


def test_without_the_mixin_a_trainer_loads_the_empty_template_into_the_first_task(tmp_path: Path) -> None:
    """The library's own behaviour, which the package works around: when this fails, transformers has changed."""
    from transformers import Trainer

    from seekr_peft.tasks import AnswerCollator

    method = Sequential(adapted(), directory=tmp_path / "method")
    with method.task("first"):
        trainer = Trainer(
            model=method.model,
            args=with_checkpoints(tmp_path / "out"),
            train_dataset=NEW,
            eval_dataset=NEW[:4],
            data_collator=AnswerCollator(0),
        )
        trainer.train()
        b = [value for path, value in method.stack.parameters().items() if path.endswith("lora_B")]
        assert sum(float(value.detach().abs().sum()) for value in b) == 0


def test_a_best_checkpoint_that_is_gone_is_an_error_and_not_the_last_step(tmp_path: Path) -> None:
    import shutil

    method = Sequential(adapted(), directory=tmp_path / "method")
    with pytest.raises(RunError, match=r"checkpoint-2/adapter/.* is missing"), method.task("first"):
        trainer, _ = rigged(method, with_checkpoints(tmp_path / "out"), NEW, 2)
        trainer.log = lambda *a, **k: shutil.rmtree(tmp_path / "out" / "checkpoint-2" / "adapter", ignore_errors=True)
        trainer.train()
    assert method.task_names == []


# Whatever else in a Trainer would put other weights into the model ------------------------------------------------


def test_a_model_init_is_refused(tmp_path: Path) -> None:
    method = Sequential(adapted(), directory=tmp_path / "method")
    with method.task("first"), pytest.raises(ConfigError, match=r"model_init was given .* model=method\.model"):
        ContinualTrainer(model_init=adapted, method=method, args=arguments(tmp_path), train_dataset=NEW)


def test_the_model_may_be_left_out(tmp_path: Path) -> None:
    method = Sequential(adapted(), directory=tmp_path / "method")
    with method.task("first"):
        trainer = ContinualTrainer(method=method, args=arguments(tmp_path, max_steps=1), train_dataset=NEW)
        assert trainer.model is method.model
        trainer.train()


def test_another_model_than_the_methods_is_refused(tmp_path: Path) -> None:
    method = Sequential(adapted(), directory=tmp_path / "method")
    with method.task("first"), pytest.raises(AdapterError, match=r"not the one that the method was made with"):
        ContinualTrainer(model=adapted(), method=method, args=arguments(tmp_path), train_dataset=NEW)


def test_a_hyperparameter_search_is_refused(tmp_path: Path) -> None:
    method = Sequential(adapted(), directory=tmp_path / "method")
    with method.task("first"):
        trainer = ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path), train_dataset=NEW)
        with pytest.raises(ConfigError, match=r"hyperparameter_search\(\) makes a new model"):
            trainer.hyperparameter_search()

"""What a method writes, and that it goes on from there as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.core_models import fresh_peft, logits_of, make_dataset
from support.tiny_methods import FIRST, SECOND, do_task, make_method
from support.tiny_models import (
    N_HEADS,
    N_LAYERS,
    VOCABULARY,
    tiny_llama,
    with_lora,
)

from seekr_peft.errors import (
    AdapterError,
    MemoryFormatError,
    RunError,
    SeekrError,
)
from seekr_peft.methods import Replay, Seekr, Sequential

# Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_mode", ["stack", "continue"])
@pytest.mark.parametrize("kind", [Seekr, Replay, Sequential])
def test_a_saved_method_goes_on_exactly_as_if_it_had_never_stopped(
    kind: type, adapter_mode: Any, tmp_path: Path
) -> None:
    method = make_method(kind, adapter_mode=adapter_mode, lambda1=0.25, rank_limit=6)
    for name, dataset in (("first", FIRST), ("second", SECOND)):
        do_task(method, name, dataset)
    method.save_pretrained(tmp_path / "out")
    again = kind.from_pretrained(fresh_peft(), tmp_path / "out")
    assert again.config == method.config and again.task_names == ["first", "second"]
    assert (again.stack.mode, again.stack.rank_limit, again.stack.n_tasks) == (adapter_mode, 6, 2)
    assert torch.equal(logits_of(again.model), logits_of(method.model))
    if kind is Seekr:
        assert again.selections == method.selections and len(again.selections) == 2
        assert torch.equal(again.importance.importance(), method.importance.importance())
    third, losses = make_dataset(20, seed=3), []
    for one in (method, again):
        torch.manual_seed(0)  # the new adapter's A is random
        due = do_task(one, "third", third)
        losses.append((due, logits_of(one.model)))
    assert losses[0][0] == losses[1][0] == [False, kind is not Sequential] * 2
    assert torch.equal(losses[0][1], losses[1][1])
    if kind is Seekr:
        assert again.selections == method.selections and len(again.selections) == 3
        assert again.memory.bytes == method.memory.bytes > 0
        assert (tmp_path / "out" / "tasks" / "03-third").is_dir(), "later tasks are written beside the earlier ones"


def test_a_folder_with_another_sequence_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    for names in (["first", "second"], ["other"]):
        method = make_method()
        for name in names:
            do_task(method, name, FIRST)
        if names == ["other"]:
            with pytest.raises(RunError, match="holds the tasks first, second of another sequence"):
                method.save_pretrained(tmp_path)
        else:
            method.save_pretrained(tmp_path)
            method.save_pretrained(tmp_path)
    assert not (tmp_path / "tasks" / "01-other").exists()


@pytest.mark.parametrize("adapter_mode", ["stack", "continue"])
def test_an_adapter_that_was_trained_before_the_first_task_is_saved_too(adapter_mode: Any, tmp_path: Path) -> None:
    method = make_method(model=with_lora(tiny_llama()), adapter_mode=adapter_mode)
    do_task(method, "first", FIRST)
    do_task(method, "second", SECOND)
    method.save_pretrained(tmp_path / "out")
    again = Seekr.from_pretrained(fresh_peft(), tmp_path / "out")
    assert torch.equal(logits_of(again.model), logits_of(method.model))
    carried = Seekr.from_pretrained(with_lora(tiny_llama()), tmp_path / "out")
    assert torch.equal(logits_of(carried.model), logits_of(method.model)), "it must not be added a second time"


def test_a_saved_method_has_a_plain_adapter_that_needs_no_package(tmp_path: Path) -> None:
    method = make_method()
    do_task(method, "first", FIRST)
    method.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits_of(loaded), logits_of(method.model), rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits_of(loaded), logits_of(tiny_llama()))


def test_only_open_formats_are_written(tmp_path: Path) -> None:
    method = make_method(directory=tmp_path)
    do_task(method, "first", FIRST)
    method.save_pretrained(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_restoring_fewer_tasks_drops_the_later_ones(tmp_path: Path) -> None:
    method = make_method(directory=tmp_path)
    do_task(method, "first", FIRST)
    logits = logits_of(method.model)
    do_task(method, "second", SECOND)
    again = make_method(directory=tmp_path)
    again.restore(["first"])
    assert torch.equal(logits_of(again.model), logits)
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["01-first"]
    assert len(again.memory) == 4 and len(again.importance.forgettability) == 1


def saved(tmp_path: Path, kind: type = Seekr) -> Path:
    method = make_method(kind)
    do_task(method, "first", FIRST)
    method.save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def test_a_run_of_another_method_or_none_is_refused(tmp_path: Path) -> None:
    out = saved(tmp_path, Replay)
    with pytest.raises(RunError, match="written by method 'replay', not 'seekr'"):
        Seekr.from_pretrained(fresh_peft(), out)
    with pytest.raises(RunError, match=r"method\.json cannot be read"):
        Seekr.from_pretrained(fresh_peft(), tmp_path)


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    out = saved(tmp_path)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match="does not fit the model"):
        Seekr.from_pretrained(get_peft_model(tiny_llama(hidden_size=36), lora), out)
    # Every LoRA matrix fits, but the vocabulary is another one.
    with pytest.raises(MemoryFormatError, match=rf"'vocabulary': {VOCABULARY}.*'vocabulary': 71"):
        Seekr.from_pretrained(get_peft_model(tiny_llama(vocab_size=71), lora), out)


@pytest.mark.parametrize(
    "name", ["memory.safetensors", "memory.json", "importance.safetensors", "adapter_model.safetensors"]
)
def test_a_damaged_run_is_refused_and_the_file_is_named(name: str, tmp_path: Path) -> None:
    out = saved(tmp_path)
    path = next(path for path in out.rglob(name) if path.parent != out / "adapter")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SeekrError, match=name if "adapter" not in name else "01-first.adapter"):
        Seekr.from_pretrained(fresh_peft(), out)


def test_importance_on_disk_has_the_documented_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    method = make_method(directory=tmp_path)
    do_task(method, "first", FIRST)
    do_task(method, "second", SECOND)
    tensors = load_file(tmp_path / "importance.safetensors")
    assert set(tensors) == {"forgettability", "sensitivity", "importance"} | {
        f"{kind}.{task}" for kind in ("forgettability", "sensitivity", "selected") for task in ("01-first", "02-second")
    }
    assert all(tensor.shape == (N_LAYERS, N_HEADS) for tensor in tensors.values())
    total = tensors["forgettability.01-first"] + tensors["forgettability.02-second"]
    torch.testing.assert_close(tensors["forgettability"], total.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        tensors["importance"], tensors["sensitivity"] * tensors["forgettability"], rtol=1e-5, atol=0
    )
    assert torch.equal(tensors["selected.02-second"], method.selections[1].mask(N_LAYERS, N_HEADS))


def test_a_new_method_does_not_write_over_an_older_ones_tasks(tmp_path: Path) -> None:
    do_task(make_method(directory=tmp_path), "first", FIRST)
    again = make_method(directory=tmp_path)
    with pytest.raises(RunError, match=r"holds the tasks first already, .* go on with Seekr\.from_pretrained"):
        do_task(again, "second", SECOND)
    assert Seekr.from_pretrained(fresh_peft(), tmp_path).task_names == ["first"]


def test_only_what_the_method_wrote_is_saved(tmp_path: Path) -> None:
    method = make_method(directory=tmp_path / "own")
    do_task(method, "first", FIRST)
    (tmp_path / "own" / "my_data.csv").write_text("x")
    (tmp_path / "own" / "checkpoint-5").mkdir()
    (tmp_path / "own" / "checkpoint-5" / "manifest.json").write_text("{}")
    for _ in range(2):
        method.save_pretrained(tmp_path / "own" / "final")
    names = {path.name for path in (tmp_path / "own" / "final").iterdir()}
    assert names == {"tasks", "adapter", "importance.safetensors", "manifest.json", "method.json"}
    assert Seekr.from_pretrained(fresh_peft(), tmp_path / "own" / "final").task_names == ["first"]


def test_another_sequence_of_the_same_names_is_not_written_over(tmp_path: Path) -> None:
    one, other = make_method(), make_method()
    do_task(one, "first", FIRST)
    do_task(other, "first", SECOND)
    one.save_pretrained(tmp_path / "out")
    with pytest.raises(RunError, match="holds the tasks first of another sequence"):
        other.save_pretrained(tmp_path / "out")
    do_task(one, "second", SECOND)
    one.save_pretrained(tmp_path / "out")
    fewer = Seekr.from_pretrained(fresh_peft(), saved(tmp_path / "fewer"))
    with pytest.raises(RunError, match="holds the tasks first, second"):
        fewer.save_pretrained(tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"file.* (cannot be made|cannot be used|is)"):
        one.save_pretrained(tmp_path / "file")


def test_a_directory_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make_method(directory=tmp_path / "own")
    do_task(method, "first", FIRST)
    mkdir = Path.mkdir

    def read_only(self: Path, *args: Any, **options: Any) -> None:
        if self.name == ".scratch":
            raise OSError(30, "Read-only file system", str(self))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with (
        pytest.raises(RunError, match=r"tasks cannot be written \(Read-only file system\)"),
        method.task("second", SECOND),
    ):
        raise AssertionError("it was begun")

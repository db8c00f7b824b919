"""Inputs that would be dropped without a word are refused by name, wherever samples enter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import VOCABULARY
from support.trainers import NEW, OLD, adapted, arguments, perturb

from seekr_peft import ContinualTrainer, Replay, Seekr, SeekrConfig, Sequential
from seekr_peft.errors import ConfigError, DataError
from seekr_peft.methods import Ewc, Lwf
from seekr_peft.tasks.inputs import check_media, check_sample

PLAIN = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]}
PIXELS = torch.zeros(1, 3, 4, 4)


def picture() -> Any:
    image = pytest.importorskip("PIL.Image")
    return image.new("RGB", (2, 2))


HARMLESS = {
    "prompt": "a text",
    "messages": [{"role": "user", "content": "a text"}],
    "id": 7,
    "score": 0.5,
    "label": 2,
    "special_tokens_mask": [0, 0, 0, 1],
    "completion_mask": [0, 0, 1, 1],
    "offset_mapping": [[0, 1], [1, 2], [2, 3], [3, 4]],
    "scores": [0.1, 0.2],
    "weight": 0.5,
    "image_id": 17,
    "token_type_ids": [0, 0, 0, 0],
    "position_ids": [0, 1, 2, 3],
    "seq_lengths": [4],
    "image": None,
    "images": [],
    "choices": ["a", "b"],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_columns_that_no_model_looks_at_are_none_of_its_business(name: str) -> None:
    check_sample({**PLAIN, name: HARMLESS[name]}, "sample 3 of a set")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_values", PIXELS),
        ("pixel_values", PIXELS.tolist()),
        ("pixel_values", PIXELS.numpy()),
        ("image_grid_thw", [[1, 4, 4]]),
        ("input_features", np.zeros((2, 3))),
        ("input_values", [0.1, 0.2]),
        ("inputs_embeds", torch.zeros(4, 8)),
        ("pictures", np.zeros((1, 2, 2))),
        ("images", ["cat.png"]),
        ("image", "cat.png"),
        ("video", {"path": "film.mp4"}),
        ("audio", {"array": [0.0, 0.1], "sampling_rate": 16000}),
        ("anything", b"\x89PNG"),
        ("messages", [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}]),
        ("position_ids", [[0, 1, 2, 3]] * 3),
        ("position_ids", [4, 5, 6, 7]),
    ],
)
def test_an_input_that_is_not_carried_is_named(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"sample 3 of a set holds '{name}'.* would be dropped"):
        check_sample({**PLAIN, name: value}, "sample 3 of a set")


def test_a_decoded_picture_is_one_however_it_is_called_and_nested() -> None:
    with pytest.raises(DataError, match="'anything', an image, a sound or a film"):
        check_sample({**PLAIN, "anything": picture()}, "it")
    with pytest.raises(DataError, match="'messages', an image, a sound or a film"):
        check_media({"messages": [{"content": [{"type": "image", "data": picture()}]}]}, "it")


def test_a_name_that_the_model_takes_is_an_input_of_any_type() -> None:
    check_sample({**PLAIN, "token_type_ids": [0, 0, 1, 1]}, "it")
    with pytest.raises(DataError, match="it holds 'token_type_ids', an input of the model"):
        check_sample({**PLAIN, "token_type_ids": [0, 0, 1, 1]}, "it", {"token_type_ids"})


@pytest.mark.parametrize(
    ("columns", "count"),
    [
        ({"seq_lengths": [1, 3]}, 2),
        ({"position_ids": [0, 1, 0, 1]}, 2),
        ({"position_ids": torch.tensor([0, 0, 0, 1])}, 3),
    ],
)
def test_a_row_of_several_samples_is_told_by_its_lengths_or_positions(columns: Any, count: int) -> None:
    with pytest.raises(DataError, match=f"it is a row of {count} samples that were packed together"):
        check_sample({**PLAIN, **columns}, "it")


def test_positions_of_left_padding_are_plain() -> None:
    check_sample({**PLAIN, "attention_mask": [0, 0, 1, 1], "position_ids": [1, 1, 0, 1]}, "it")


# Where samples enter ----------------------------------------------------------------------------------------------


def seeing(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**item, "pixel_values": PIXELS} for item in items]


@pytest.mark.parametrize("kind", [Replay, Seekr, Lwf, Ewc])
def test_no_method_keeps_or_draws_samples_without_their_image(tmp_path: Path, kind: type) -> None:
    mode = kind.adapter_modes[-1]
    method = kind(adapted(), SeekrConfig(replay_ratio=0.25), directory=tmp_path / "method", adapter_mode=mode)
    with method.task("first", replay_from=OLD):
        perturb(method)
    with pytest.raises(DataError, match=r"sample \d+ of replay_from holds 'pixel_values'"):
        with method.task("second", replay_from=seeing(NEW)):
            pass
    assert method.task_names == ["first"]


@pytest.mark.parametrize("kind", [Sequential, Replay, Seekr])
@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_the_trainers_own_collator_drops_no_image(tmp_path: Path, kind: type, which: str) -> None:
    method = kind(adapted(), directory=tmp_path / "method")
    data = {"train_dataset": NEW, which: seeing(NEW)}
    with method.task("first", replay_from=NEW), pytest.raises(DataError, match=rf"0 of {which} holds 'pixel_values'"):
        ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path), **data)


def test_a_trainers_own_training_set_is_checked_when_samples_are_drawn_from_it(tmp_path: Path) -> None:
    """With a collator of one's own the trainer itself may show the images; the replay samples could not."""
    method = Replay(adapted(), directory=tmp_path / "method")
    with pytest.raises(DataError, match="of replay_from holds 'pixel_values'"), method.task("first"):
        ContinualTrainer(
            model=method.model, method=method, args=arguments(tmp_path), train_dataset=seeing(NEW), data_collator=list
        )


def test_what_only_a_collator_adds_is_seen_in_the_first_batch(tmp_path: Path) -> None:
    from seekr_peft.tasks import AnswerCollator

    def collate(items: Any) -> Any:
        return {**AnswerCollator(0)(items), "pixel_values": torch.zeros(len(items), 3, 4, 4)}

    method = Replay(adapted(), directory=tmp_path / "method")
    with pytest.raises(DataError, match="the collator's batch holds 'pixel_values', an input of the model"):
        with method.task("first", replay_from=NEW):
            ContinualTrainer(
                model=method.model,
                method=method,
                args=arguments(tmp_path / "out"),
                train_dataset=NEW,
                data_collator=collate,
            ).train()


def test_the_collator_by_itself_drops_no_image() -> None:
    from seekr_peft.tasks import AnswerCollator

    with pytest.raises(DataError, match="sample 1 of a batch holds 'pixel_values'"):
        AnswerCollator(0)([PLAIN, {**PLAIN, "pixel_values": PIXELS}])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_a_sample_brings_along_is_no_part_of_it(side: str) -> None:
    from seekr_peft.tasks import AnswerCollator

    padding = {"input_ids": [0, 0], "labels": [-100, -100], "attention_mask": [0, 0]}
    padded = {key: padding[key] + PLAIN[key] if side == "left" else PLAIN[key] + padding[key] for key in PLAIN}
    longer = {"input_ids": [9] * 5, "labels": [9] * 5}
    batch = AnswerCollator(0)([padded, longer])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0], [9] * 5]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, -100], [9] * 5]


@pytest.mark.parametrize("name", ["labels", "attention_mask"])
def test_columns_of_different_lengths_are_told(name: str) -> None:
    from seekr_peft.tasks import AnswerCollator

    with pytest.raises(DataError, match=f"sample 1 of a batch has 4 input_ids and 3 {name}; give one for each"):
        AnswerCollator(0)([PLAIN, {**PLAIN, name: PLAIN[name][:3]}])


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_a_trainer_refuses_tokens_that_the_model_has_no_row_for(tmp_path: Path, name: str) -> None:
    data = [dict(row) for row in NEW]
    data[7] = {**data[7], name: [*data[7][name][:-1], VOCABULARY]}
    method = Sequential(adapted(), directory=tmp_path / "method")
    with pytest.raises(
        DataError, match=rf"number {VOCABULARY} in its {name}, but the model has {VOCABULARY} embeddings"
    ):
        with method.task("first"):
            ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path), train_dataset=data).train()
    assert method.task_names == []


def test_all_tasks_at_once_drop_no_image() -> None:
    from datasets import Dataset

    from seekr_peft.run.stages import joined

    rows = [{**PLAIN, "pixel_values": [[0.0, 1.0]]}] * 4
    with pytest.raises(DataError, match="holds 'pixel_values'"):
        joined([Dataset.from_list(rows)], [arguments(Path("unused"))])


def test_a_row_of_texts_with_a_picture_makes_no_task() -> None:
    from seekr_peft import Task

    rows = [{"prompt": "What is it?", "answer": "a cat", "image": "cat.png"}]
    with pytest.raises(DataError, match=r"Task 'sight', train row 0 holds 'image', an image"):
        Task.from_records("sight", rows, [{"prompt": "a", "answer": "b"}])


class _Rows:
    """A data set that makes its items when they are asked for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


# A Dataset has the columns of its first row.
@pytest.mark.parametrize(
    ("kind", "absent"),
    [("Dataset", False), *[(kind, absent) for kind in ("list", "map", "stream") for absent in (True, False)]],
)
def test_an_image_in_a_later_row_alone_is_seen_too(tmp_path: Path, kind: str, absent: bool) -> None:
    from datasets import Dataset, IterableDataset

    plain = NEW if absent else [{**row, "pixel_values": None} for row in NEW]
    rows = [*plain[:-1], {**NEW[-1], "pixel_values": [[[0.0, 1.0]]]}]
    made = {
        "list": lambda: rows,
        "Dataset": lambda: Dataset.from_list(rows),
        "map": lambda: _Rows(rows),
        "stream": lambda: IterableDataset.from_generator(lambda: iter(rows)),
    }
    method = Sequential(adapted(), directory=tmp_path / "method")
    args = arguments(tmp_path / "out", max_steps=6)
    with pytest.raises(DataError, match=r"sample \d+ of (train_dataset|a batch) holds 'pixel_values'"):
        with method.task("first"):
            ContinualTrainer(model=method.model, method=method, args=args, train_dataset=made[kind]()).train()
    assert args.remove_unused_columns
    assert method.task_names == []


def test_a_column_that_only_the_model_calls_an_input_is_seen_in_every_row(tmp_path: Path) -> None:
    class Odd(Sequential):
        pass

    method = Odd(adapted(), directory=tmp_path / "method")
    rows = [*NEW[:-1], {**NEW[-1], "inputs_embeds": "a text"}]
    with pytest.raises(DataError, match="sample 21 of train_dataset holds 'inputs_embeds', an input of the model"):
        with method.task("first"):
            ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path), train_dataset=rows)


# Samples as a collator makes them ---------------------------------------------------------------------------------


def _causal(items: Any) -> dict[str, Any]:
    """What DataCollatorForLanguageModeling(mlm=False) does: every token is a label, whatever labels there were."""
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.tensor([item["input_ids"] + [0] * (longest - len(item["input_ids"])) for item in items])
    real = torch.tensor([[1] * len(item["input_ids"]) + [0] * (longest - len(item["input_ids"])) for item in items])
    return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}


@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_replayed_has_the_labels_that_the_collator_gives(tmp_path: Path, labelled: bool) -> None:
    data = NEW if labelled else [{"input_ids": row["input_ids"], "text": "unused"} for row in NEW]
    method = Replay(adapted(), SeekrConfig(replay_ratio=0.25), directory=tmp_path / "method")
    with method.task("first"):
        args = arguments(tmp_path / "out", max_steps=2)
        ContinualTrainer(
            model=method.model, method=method, args=args, train_dataset=data, data_collator=_causal
        ).train()
    memory = method.memory.tasks[0]
    kept = [memory.sample(index) for index in range(len(memory))]
    assert len(kept) == 6
    assert all(sample.labels.tolist() == sample.input_ids.tolist() for sample in kept)
    assert {tuple(sample.input_ids.tolist()) for sample in kept} <= {tuple(row["input_ids"]) for row in NEW}


def test_a_second_training_set_in_one_task_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = Replay(adapted(), directory=tmp_path / "method")
    with method.task("first"):
        for data in (OLD, OLD, NEW):
            args = arguments(tmp_path / "out", max_steps=1)
            ContinualTrainer(model=method.model, method=method, args=args, train_dataset=data).train()
    assert caplog.text.count("a second training set came after its samples had been drawn") == 1


def test_a_trainer_that_only_evaluates_needs_no_training_set(tmp_path: Path) -> None:
    method = Replay(adapted(), directory=tmp_path / "method")
    with method.task("first", replay_from=OLD):
        args = arguments(tmp_path / "out")
        trainer = ContinualTrainer(model=method.model, method=method, args=args, eval_dataset=NEW)
        assert trainer.evaluate()["eval_loss"] > 0


# A model that sees ------------------------------------------------------------------------------------------------


def seeing_model() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 2, "intermediate_size": 32}
    vision = CLIPVisionConfig(hidden_size=16, num_attention_heads=2, image_size=8, patch_size=4, **sizes)
    text = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=1))
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", [Sequential, Replay, Seekr])
def test_a_model_that_sees_trains_on_text_and_refuses_to_go_without_an_image(tmp_path: Path, kind: type) -> None:
    # Token 1 stands for an image.
    texts = [
        [
            {name: [max(2, number) if number > 0 else number for number in row] for name, row in item.items()}
            for item in data
        ]
        for data in (OLD, NEW)
    ]
    method = kind(seeing_model(), SeekrConfig(replay_ratio=0.25, replay_every=1), directory=tmp_path / "method")
    for name, data in zip(("first", "second"), texts, strict=True):
        with method.task(name):
            args = arguments(tmp_path / "out", max_steps=3, learning_rate=1e-3, optim="adamw_torch")
            ContinualTrainer(model=method.model, method=method, args=args, train_dataset=data).train()
    with pytest.raises(DataError, match="holds 'pixel_values', an input of the model"):
        with method.task("third"):
            ContinualTrainer(model=method.model, method=method, args=args, train_dataset=seeing(texts[1]))
    assert method.task_names == ["first", "second"]


# A training set that the trainer hands over -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Replay, Seekr, Lwf, Ewc])
def test_without_replay_from_a_method_draws_from_what_the_trainer_trains_on(tmp_path: Path, kind: type) -> None:
    mode = kind.adapter_modes[-1]
    stored = []
    for given in (True, False):
        torch.manual_seed(1)
        method = kind(adapted(), SeekrConfig(replay_ratio=0.25), directory=tmp_path / f"{given}", adapter_mode=mode)
        for name, data in (("first", OLD), ("second", NEW)):
            with method.task(name, replay_from=data if given else None):
                args = arguments(tmp_path / "out", max_steps=4)
                ContinualTrainer(model=method.model, method=method, args=args, train_dataset=data).train()
        stored.append({key: value.detach().clone() for key, value in method.stack.earlier_parameters().items()})
        if kind in (Replay, Seekr):
            kept = [task.sample(i).input_ids.tolist() for task in method.memory.tasks for i in range(len(task))]
            assert len(kept) == 3 + 6
            stored[-1]["kept"] = torch.tensor([number for row in kept for number in row])
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


def test_replay_from_goes_before_the_trainers_own_set(tmp_path: Path) -> None:
    method = Replay(adapted(), SeekrConfig(replay_ratio=1.0), directory=tmp_path / "method")
    with method.task("first", replay_from=OLD):
        args = arguments(tmp_path / "out", max_steps=1)
        ContinualTrainer(model=method.model, method=method, args=args, train_dataset=NEW).train()
    memory = method.memory.tasks[0]
    assert [memory.sample(i).input_ids.tolist() for i in range(len(memory))] == [row["input_ids"] for row in OLD]


@pytest.mark.parametrize("kind", [Replay, Ewc])
def test_a_stream_has_no_samples_to_draw(tmp_path: Path, kind: type) -> None:
    from datasets import IterableDataset

    method = kind(adapted(), directory=tmp_path / "method", adapter_mode=kind.adapter_modes[-1])
    stream = IterableDataset.from_generator(lambda: iter(NEW))
    with pytest.raises(DataError, match=r"IterableDataset, of which no samples .* replay_from="), method.task("first"):
        args = arguments(tmp_path / "out", max_steps=1)
        ContinualTrainer(model=method.model, method=method, args=args, train_dataset=stream)


def test_a_task_that_was_told_nothing_of_its_samples_is_refused(tmp_path: Path) -> None:
    method = Replay(adapted(), directory=tmp_path / "method")
    with pytest.raises(ConfigError, match=r"task 'first': method 'replay' keeps a replay memory, so pass replay_from="):
        with method.task("first"):
            pass
    assert method.task_names == []


SPLITS = {"train": [PLAIN], "test": [PLAIN]}


def split_sets() -> list[Any]:
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    sets = {name: Dataset.from_list(rows) for name, rows in SPLITS.items()}
    streams = {name: split.to_iterable_dataset() for name, split in sets.items()}
    return [DatasetDict(sets), IterableDatasetDict(streams), SPLITS]


@pytest.mark.parametrize("place", [0, 1, 2], ids=["DatasetDict", "IterableDatasetDict", "dict"])
def test_a_set_of_splits_in_place_of_samples_is_refused_by_name(tmp_path: Path, place: int) -> None:
    splits = split_sets()[place]
    told = f"is a {type(splits).__name__} with the splits 'train', 'test'; pass one of them, as in dataset"
    method = Replay(adapted(), directory=tmp_path / "method")
    with pytest.raises(DataError, match=rf"replay_from {told}\['train'\]"), method.task("first", replay_from=splits):
        pass
    assert method.stack.current is None
    with pytest.raises(DataError, match=rf"train_dataset {told}"), method.task("first", replay_from=[PLAIN]):
        ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path / "out"), train_dataset=splits)


@pytest.mark.parametrize(("given", "told"), [("train.jsonl", "'train.jsonl', not rows"), (7, "7, not rows")])
def test_what_holds_no_samples_is_refused_by_name(tmp_path: Path, given: Any, told: str) -> None:
    method = Sequential(adapted(), directory=tmp_path / "method")
    with pytest.raises(DataError, match=f"train_dataset is {told}"), method.task("first"):
        ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path / "out"), train_dataset=given)


def test_a_set_of_evaluation_sets_is_none_of_its_business(tmp_path: Path) -> None:
    method = Sequential(adapted(), directory=tmp_path / "method")
    with method.task("first"):
        ContinualTrainer(
            model=method.model,
            method=method,
            args=arguments(tmp_path / "out"),
            train_dataset=[PLAIN],
            eval_dataset=split_sets()[0],
        )

"""Tokens of prompts and answers: where the loss is, what truncation keeps, how they are padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from seekr_peft.errors import DataError
from seekr_peft.tasks import AnswerCollator, encode, encode_prompt, prepare_tokenizer
from seekr_peft.tasks.tokenize import prompt_room_of


def make_tokenizer(template: str = "<s> $A", **special: str) -> PreTrainedTokenizerFast:
    """One token a character; ``template`` says which special tokens are put around a text."""
    characters = "".join(map(chr, range(32, 127))) + "\n"
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = special or {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **special)


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """One character a token, special tokens left out."""
    return "".join(tokenizer.convert_ids_to_tokens([index for index in ids if index > 2]))


TOKENIZER = make_tokenizer()
BOS, EOS = 0, 1


def test_the_prompt_comes_first_with_its_special_token():
    encoded = encode(TOKENIZER, "Q:", "yes", 64)
    assert encoded.input_ids[0] == BOS
    assert text_of(TOKENIZER, encoded.input_ids) == "Q: yes"


def test_the_loss_is_on_the_answer_and_its_end_only():
    encoded = encode(TOKENIZER, "Q:", "yes", 64)
    assert encoded.labels[:3] == [-100, -100, -100]
    assert encoded.labels[3:] == encoded.input_ids[3:]
    assert text_of(TOKENIZER, encoded.labels[3:]) == " yes"
    assert encoded.labels[-1] == EOS


@pytest.mark.parametrize("prompt", ["Q: ", "Q:\n"])
def test_no_space_is_put_after_whitespace(prompt):
    encoded = encode(TOKENIZER, prompt, "yes", 64)
    assert text_of(TOKENIZER, encoded.input_ids) == prompt + "yes"


def test_whitespace_around_an_answer_is_not_trained():
    assert encode(TOKENIZER, "Q:", " yes\n", 64) == encode(TOKENIZER, "Q:", "yes", 64)


def test_an_end_that_the_tokenizer_appends_to_the_prompt_is_dropped():
    appending = make_tokenizer("<s> $A </s>")
    assert encode(appending, "Q:", "yes", 64) == encode(TOKENIZER, "Q:", "yes", 64)
    assert encode_prompt(appending, "Q:", 64) == encode_prompt(TOKENIZER, "Q:", 64)


def test_evaluation_sees_the_prompt_that_was_trained():
    encoded = encode(TOKENIZER, "Q: why?", "so", 64)
    prompt = encode_prompt(TOKENIZER, "Q: why?", 64)
    assert encoded.input_ids[: len(prompt)] == prompt


def test_what_fits_exactly_is_not_cut():
    # <s> and 4 characters, then ' ab' and </s>
    encoded = encode(TOKENIZER, "cdef", "ab", 9)
    assert (len(encoded.input_ids), encoded.cut) == (9, False)
    assert encode(TOKENIZER, "cdef", "ab", 8).cut


def test_without_an_instruction_the_first_and_the_last_half_stay():
    prompt = "A" * 50 + "m" * 100 + "Z" * 50
    kept = text_of(TOKENIZER, encode(TOKENIZER, prompt, "yes", 45).input_ids)
    # room for 45 - 5 = 40 prompt tokens, one of them <s>
    assert kept == "A" * 19 + "Z" * 20 + " yes"


def test_the_instruction_the_start_and_the_end_of_the_input_stay():
    instruction = "Sort the words.\n"
    prompt = instruction + "a" * 60 + "m" * 60 + "z" * 60 + "\nOutput:"
    kept = text_of(TOKENIZER, encode(TOKENIZER, prompt, "b", 60, instruction).input_ids)
    # room 57 for the prompt: 1 + 16 for <s> and the instruction, 20 for either end of the input
    assert kept == instruction + "a" * 20 + "z" * 12 + "\nOutput:" + " b"


def test_an_instruction_longer_than_the_room_leaves_the_question():
    instruction = "i" * 300
    ids = encode_prompt(TOKENIZER, instruction + "x" * 300 + "\nA:", 40, instruction)
    assert len(ids) == 40
    assert text_of(TOKENIZER, ids) == "i" * 34 + "x" * 2 + "\nA:"


def test_an_answer_that_fits_in_half_the_room_stays_whole():
    encoded = encode(TOKENIZER, "p" * 100, "a" * 18, 40)
    assert text_of(TOKENIZER, encoded.input_ids).endswith("p " + "a" * 18)
    assert encoded.input_ids[-1] == EOS


def test_a_longer_answer_loses_its_end_but_not_end_of_sequence():
    encoded = encode(TOKENIZER, "p" * 100, "abcd" * 10, 40)
    assert text_of(TOKENIZER, encoded.input_ids) == "p" * 19 + " " + ("abcd" * 5)[:18]
    assert encoded.input_ids[-1] == encoded.labels[-1] == EOS


def test_a_long_answer_uses_the_room_that_a_short_prompt_leaves():
    encoded = encode(TOKENIZER, "p", "a" * 100, 40)
    assert text_of(TOKENIZER, encoded.input_ids) == "p " + "a" * 36


def test_the_place_of_an_answer_says_nothing_about_it():
    """All prompts are too long; were each cut to what its own answer leaves, "no" would start 8 tokens later."""
    prompts, answers = ["p" * 100, "q" * 100], ["no", "definitely"]
    room = prompt_room_of(TOKENIZER, prompts, answers, 60)
    encoded = [encode(TOKENIZER, *pair, 60, None, room) for pair in zip(prompts, answers, strict=True)]
    starts = [sample.labels.index(next(x for x in sample.labels if x != -100)) for sample in encoded]
    assert starts == [60 - 12, 60 - 12] and all(sample.cut for sample in encoded)
    assert [len(encode_prompt(TOKENIZER, prompt, room)) for prompt in prompts] == starts
    alone = [encode(TOKENIZER, *pair, 60) for pair in zip(prompts, answers, strict=True)]
    assert [sample.labels.count(-100) for sample in alone] == [60 - 4, 60 - 12]


def test_long_answers_leave_the_prompts_three_quarters():
    assert prompt_room_of(TOKENIZER, ["p", "p"], ["a", "b" * 500], 40) == 30
    assert prompt_room_of(TOKENIZER, [], [], 40) == 40


@given(
    st.text("abc \n", min_size=1, max_size=80),
    st.text("xyz", min_size=1, max_size=80),
    st.integers(4, 60),
    st.integers(0, 80),
)
def test_truncation_laws(prompt, answer, max_length, cut_at):
    encoded = encode(TOKENIZER, prompt, answer, max_length, prompt[:cut_at])
    n_labels = sum(label != -100 for label in encoded.labels)
    assert len(encoded.input_ids) == len(encoded.labels) <= max_length
    assert encoded.cut == (len(encode(TOKENIZER, prompt, answer, 500).input_ids) > max_length)
    assert encoded.labels[-1] == EOS
    assert not encoded.cut or len(encoded.input_ids) == max_length
    assert 1 <= n_labels <= len(encoded.input_ids)


@pytest.mark.parametrize("max_length", [3, 0, -1, None, 12.5])
def test_an_impossible_length_is_refused(max_length):
    with pytest.raises(DataError, match="max_length is"):
        encode(TOKENIZER, "Q", "a", max_length)


def test_the_pad_token_becomes_end_of_sequence_without_growing_the_vocabulary():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    assert prepare_tokenizer(tokenizer) is tokenizer
    assert (tokenizer.pad_token_id, len(tokenizer)) == (EOS, size)


def test_a_pad_token_that_is_there_stays():
    tokenizer = make_tokenizer(eos_token="</s>", pad_token="<pad>")
    assert prepare_tokenizer(tokenizer).pad_token_id == 2


def test_a_tokenizer_without_end_of_sequence_is_refused():
    with pytest.raises(DataError, match="no end-of-sequence token"):
        prepare_tokenizer(make_tokenizer(bos_token="<s>"))


SAMPLES = [
    {"input_ids": [5, 6, EOS], "labels": [-100, 6, EOS], "prompt": "ignored"},
    {"input_ids": [7, EOS], "labels": [-100, EOS], "prompt": "ignored"},
]


def test_padding_on_the_right():
    batch = AnswerCollator(pad_token_id=EOS)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, EOS], [7, EOS, EOS]]
    assert batch["labels"].tolist() == [[-100, 6, EOS], [-100, EOS, -100]]


def test_padding_on_the_left():
    batch = AnswerCollator(pad_token_id=9, padding_side="left")(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, EOS], [9, 7, EOS]]
    assert batch["labels"].tolist() == [[-100, 6, EOS], [-100, -100, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_the_mask_is_right_when_pad_is_end_of_sequence():
    batch = AnswerCollator(pad_token_id=EOS)(SAMPLES)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_batch_holds_long_tensors_and_no_other_column():
    batch = AnswerCollator(pad_token_id=EOS)(SAMPLES)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.long
    )


def test_samples_without_labels_give_a_batch_without_labels():
    assert set(AnswerCollator(0)([{"input_ids": [1]}])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("arguments", [{"padding_side": "top"}, {"pad_token_id": None}])
def test_a_collator_that_cannot_pad_is_refused(arguments):
    with pytest.raises(DataError, match=next(iter(arguments))):
        AnswerCollator(**{"pad_token_id": 0, **arguments})


def test_an_empty_batch_is_refused():
    with pytest.raises(DataError, match="no samples"):
        AnswerCollator(0)([])

"""Greedy answers: their order, independence of batching, what is restored, and no warnings."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seekr_peft.errors import DataError
from seekr_peft.evaluation import evaluate_task, generate_answers
from seekr_peft.tasks import Task

# PEFT 0.21.2 reads the old name of activation checkpointing, of which transformers 5.23 warns.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS = ["a b", "c", "d e f g h i j", "a", "k l m", "b c d e", "h g", "i i i i i i"]
WORDS = "abcdefghijklm"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["</s>", "?", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="?")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=15,
        hidden_size=28,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=7,
        num_key_value_heads=7,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.6,  # large weights, so that the answers differ
    )
    return LlamaForCausalLM(config).double()


def with_adapter(model: LlamaForCausalLM):
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config).double()


def step_by_step(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """The same answer without generate(), cache, batch or padding."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    model.eval()
    for _ in range(max_new_tokens):
        with torch.no_grad():
            following = model(input_ids=ids).logits[0, -1].argmax()
        if following == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=False).strip()


def test_answers_equal_a_plain_greedy_loop_in_the_order_of_the_prompts(model, tokenizer):
    answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=9, batch_size=3)
    assert answers == [step_by_step(model, tokenizer, prompt, 9) for prompt in PROMPTS]
    assert len(set(answers)) > 4, "answers that are all alike would show no mistake in their order"


def test_some_answers_end_early(model, tokenizer):
    # Guards the test above: without a stop at end-of-sequence all answers have 9 words.
    answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=9)
    assert len({len(answer.split()) for answer in answers}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_answers_do_not_depend_on_the_batch_size(model, tokenizer, batch_size, dtype):
    model = model.to(dtype)
    expected = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=7, batch_size=8)
    answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=7, batch_size=batch_size)
    assert answers == expected


def test_a_peft_model_answers_with_its_adapter(model, tokenizer):
    base = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=5)
    adapted = with_adapter(model)
    answers = generate_answers(adapted, tokenizer, PROMPTS, max_new_tokens=5)
    assert answers == [step_by_step(adapted, tokenizer, prompt, 5) for prompt in PROMPTS]
    assert answers != base


def test_the_mode_of_every_module_is_restored(model, tokenizer):
    model.train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    generate_answers(model, tokenizer, ["a"], max_new_tokens=2)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_dropout_is_off_meanwhile(model, tokenizer):
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    first = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=5)
    assert first == generate_answers(model, tokenizer, PROMPTS, max_new_tokens=5)


def test_use_cache_and_generation_config_are_restored(model, tokenizer):
    model.config.use_cache = False
    own = model.generation_config
    generate_answers(model, tokenizer, ["a"], max_new_tokens=2)
    assert model.config.use_cache is False
    assert model.generation_config is own


def test_everything_is_restored_after_an_error(model, tokenizer, monkeypatch):
    adapted = with_adapter(model).train()
    own = model.generation_config

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_answers(adapted, tokenizer, ["a"], max_new_tokens=2)
    assert all(module.training for module in adapted.modules())
    assert model.generation_config is own


@pytest.mark.parametrize("fitting", [1, 2, 3])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(model, tokenizer, monkeypatch, caplog, fitting):
    expected = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=len(PROMPTS))
    generate, sizes = model.generate, []

    def cramped(input_ids, **rest):
        if len(input_ids) > fitting:
            raise torch.cuda.OutOfMemoryError("no room")
        sizes.append(len(input_ids))
        return generate(input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "generate", cramped)
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=len(PROMPTS)) == expected
    assert sum(sizes) == len(PROMPTS) and max(sizes) <= fitting
    assert "do not fit into memory" in caplog.text
    monkeypatch.setattr(model, "generate", lambda **rest: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("none")))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        generate_answers(model, tokenizer, PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize("adapter", [False, True])
def test_sampling_settings_of_a_chat_model_neither_matter_nor_warn(model, tokenizer, caplog, adapter):
    expected = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, max_length=7, repetition_penalty=1.3
    )
    if adapter:
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"])).double()
    logging.getLogger("transformers").propagate = True
    caplog.clear()
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert [record.getMessage() for record in caplog.records] == []


def test_nothing_gets_a_gradient(model, tokenizer):
    generate_answers(model, tokenizer, ["a"], max_new_tokens=2)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_long_prompt_keeps_its_instruction_and_its_end(model, tokenizer):
    middle = " ".join("c" * 40)
    settings = {"max_new_tokens": 5, "max_length": 8, "instructions": ["a b"]}
    long = generate_answers(model, tokenizer, [f"a b {middle} d e"], **settings)
    # 8 tokens: the 2 of the instruction, and 3 of either end of the rest
    assert long == [step_by_step(model, tokenizer, "a b c c c c d e", 5)]


def test_prompt_and_answer_stay_within_the_models_positions(model, tokenizer):
    prompt = " ".join("ab" * 100)
    answer = generate_answers(model, tokenizer, [prompt], max_new_tokens=60, max_length=512)
    kept = prompt.split()[:2] + prompt.split()[-2:]
    assert answer == [step_by_step(model, tokenizer, " ".join(kept), 60)]


def test_more_new_tokens_than_positions_are_refused(model, tokenizer):
    with pytest.raises(DataError, match="the model has 64 positions"):
        generate_answers(model, tokenizer, ["a"], max_new_tokens=61)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_new_tokens": 0}, {"instructions": []}])
def test_impossible_arguments_are_refused(model, tokenizer, wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        generate_answers(model, tokenizer, ["a"], **{"max_new_tokens": 3, **wrong})


def test_no_prompts_have_no_answers(model, tokenizer):
    assert generate_answers(model, tokenizer, [], max_new_tokens=3) == []


def test_a_task_is_scored_on_its_test_prompts(model, tokenizer):
    right = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=3)
    answers = [right[0], "wrong", right[2].upper(), *["no"] * 5]
    test = Dataset.from_dict({"prompt": PROMPTS, "answer": answers})
    result = evaluate_task(model, tokenizer, Task("t", test, test), max_new_tokens=3)
    assert result.score == 0.25
    assert result.predictions[1] == {
        "prompt": "c",
        "answer": "wrong",
        "prediction": right[1],
        "score": 0.0,
    }

"""The tap leaves no trace: neither in the model's numbers nor in its code, whatever happens inside the block."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.tapped import (
    BUILDERS,
    EVERY_HEAD,
    QUERIES,
    SOME_HEADS,
    checkpointed,
    families,
    paddings,
    snapshot,
    tapped_rows,
)
from support.tiny_models import (
    N_LAYERS,
    VOCABULARY,
    padded_batch,
    tiny_llama,
    tiny_mamba,
    with_lora,
)
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seekr_peft.attention import AttentionTap
from seekr_peft.attention.capture import KINDS_OF_MASK
from seekr_peft.errors import CaptureError
from seekr_peft.heads import HeadSelection

# --- nobody notices ---


@families
@paddings
def test_logits_are_bitwise_unchanged_under_the_tap(family: str, padding: str) -> None:
    model, batch = BUILDERS[family](), padded_batch(padding)
    before = snapshot(model)
    with torch.no_grad():
        plain = model(**batch).logits
        with AttentionTap(model, SOME_HEADS, queries=QUERIES):
            tapped = model(**batch).logits
        after = model(**batch).logits
    assert torch.equal(plain, tapped) and torch.equal(plain, after)
    assert snapshot(model) == before


@pytest.mark.parametrize("squares", [None, "selected"])
def test_the_gradient_of_the_models_own_loss_is_bitwise_unchanged(squares: Any) -> None:
    batch = padded_batch("mixed")

    def gradient(tap: bool) -> Tensor:
        model = with_lora(tiny_llama()).train()
        heads = SOME_HEADS if tap else HeadSelection({})
        with AttentionTap(model, heads, squares=squares) as tap:
            model(**batch, labels=batch["input_ids"]).loss.backward()
        assert set(tap.squares) == (set(heads) if squares else set())
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradient(False)
    assert plain.norm() > 0
    assert torch.equal(plain, gradient(True))


def test_other_peoples_hooks_survive_and_see_the_stock_name() -> None:
    model, names = tiny_llama(), []
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, args, output: names.append(module.config._attn_implementation))
    tapped_rows(model, padded_batch("none"), SOME_HEADS)
    model(**padded_batch("none"))
    assert names == ["sdpa", "sdpa"]


def test_an_exception_inside_the_block_leaves_no_trace() -> None:
    model = with_lora(tiny_llama())
    before = snapshot(model)

    def run_and_fail() -> None:
        with AttentionTap(model, SOME_HEADS):
            model(**padded_batch("none"))
            assert snapshot(model) != before  # the comparison sees hooks
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_fail()
    assert snapshot(model) == before


@pytest.mark.parametrize("where", ["q_proj", "o_proj", "mlp", "kernel"])
def test_an_exception_inside_the_forward_leaves_no_trace(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(), padded_batch("none")
    plain = tapped_rows(model, batch, SOME_HEADS)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    layer = model.model.layers[2]
    with monkeypatch.context() as patch:
        if where == "kernel":
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
        else:
            patch.setattr(layer.mlp if where == "mlp" else getattr(layer.self_attn, where), "forward", fail)
        before = snapshot(model)
        with pytest.raises(ZeroDivisionError), AttentionTap(model, SOME_HEADS):
            model(**batch)
        assert snapshot(model) == before
    assert torch.equal(tapped_rows(model, batch, SOME_HEADS)[2], plain[2])


def test_a_forward_after_a_failed_one_in_the_same_block_is_captured() -> None:
    model, batch = tiny_llama(), padded_batch("none")
    with torch.no_grad(), AttentionTap(model, SOME_HEADS) as tap:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 3), VOCABULARY))
        model(**batch)
    assert torch.equal(tap.rows[2], tapped_rows(model, batch, SOME_HEADS)[2])


def test_a_failing_entry_undoes_what_it_had_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = snapshot(model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(model.model.layers[2].self_attn, "register_forward_hook", fail)
    with pytest.raises(ZeroDivisionError), AttentionTap(model, SOME_HEADS):
        pass
    monkeypatch.undo()
    assert snapshot(model) == before


def test_nested_taps_each_see_their_own_heads_and_queries() -> None:
    model, batch = tiny_llama(), padded_batch("mixed")
    inner_heads = HeadSelection({0: [2], 1: [0, 5]})
    before = snapshot(model)
    with torch.no_grad(), AttentionTap(model, SOME_HEADS) as outer:
        with AttentionTap(model, inner_heads, queries=QUERIES) as inner:
            model(**batch)
        both, between = dict(outer.rows), snapshot(model)
        model(**batch)
    assert between != before and snapshot(model) == before
    for layer, rows in tapped_rows(model, batch, SOME_HEADS).items():
        assert torch.equal(both[layer], rows) and torch.equal(outer.rows[layer], rows)
    for layer, rows in tapped_rows(model, batch, inner_heads, queries=QUERIES).items():
        assert torch.equal(inner.rows[layer], rows)


def test_an_exception_in_a_nested_tap_leaves_the_outer_one_working() -> None:
    model, batch = tiny_llama(), padded_batch("mixed")
    with torch.no_grad(), AttentionTap(model, SOME_HEADS) as outer:
        inside = snapshot(model)
        with pytest.raises(CaptureError, match="query position 99"):
            with AttentionTap(model, SOME_HEADS, queries=torch.tensor([99])):
                model(**batch)
        assert snapshot(model) == inside
        model(**batch)
    assert torch.equal(outer.rows[2], tapped_rows(model, batch, SOME_HEADS)[2])


@pytest.mark.parametrize("one_configuration", [False, True])
def test_another_model_of_the_same_class_is_not_touched(one_configuration: bool) -> None:
    model, other, batch = tiny_llama(), tiny_llama(), padded_batch("mixed")
    if one_configuration:
        for module in other.modules():
            if hasattr(module, "config"):
                module.config = model.config
    before = snapshot(other)
    with torch.no_grad(), AttentionTap(model, SOME_HEADS) as tap:
        model(**batch)
        rows = dict(tap.rows)
        assert snapshot(other) == before
        other(**padded_batch("none", seed=5))
    assert tap.rows.keys() == rows.keys() and all(tap.rows[layer] is rows[layer] for layer in rows)


def test_layers_without_selected_heads_keep_the_stock_function() -> None:
    model = tiny_llama()
    stock, functions, names = ALL_ATTENTION_FUNCTIONS["sdpa"], {}, set()
    for layer, block in enumerate(model.model.layers):

        def note(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
            functions[layer] = ALL_ATTENTION_FUNCTIONS["sdpa"]
            names.add(model.config._attn_implementation)

        block.self_attn.q_proj.register_forward_hook(note)
    tapped_rows(model, padded_batch("none"), SOME_HEADS)
    assert [functions[layer] is stock for layer in range(N_LAYERS)] == [False, True, False]
    # Some models do other things under another name.
    assert names == {"sdpa"}


def test_a_model_that_asks_for_its_attentions_name_is_unchanged() -> None:
    """DeepSeek-V3.2 leaves out its choice of keys where the name is none of transformers' own."""
    deepseek = pytest.importorskip("transformers.models.deepseek_v32", reason="this transformers has no DeepSeek-V3.2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 52, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16}
    ranks = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 12}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    model = deepseek.DeepseekV32ForCausalLM(
        deepseek.DeepseekV32Config(
            vocab_size=VOCABULARY,
            **sizes,
            **heads,
            **ranks,
            **experts,
            first_k_dense_replace=2,
            mlp_layer_types=["dense"] * 2,
            index_topk=5,
            pad_token_id=0,
        )
    ).eval()
    batch = padded_batch("none")
    with torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        with AttentionTap(model, HeadSelection({0: [0, 3], 1: [2]})) as tap:
            tapped = model(**batch, use_cache=False).logits
    assert torch.equal(plain, tapped)
    for rows in tap.rows.values():
        assert (rows > 0).sum(dim=-1).max() == 5
        torch.testing.assert_close(rows.sum(dim=-1), torch.ones(rows.shape[:3]))


def test_an_interrupted_forward_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch runs no hook after what is no Exception."""
    model, batch = tiny_llama(), padded_batch("none")

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2].self_attn.q_proj, "forward", interrupt)
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt), AttentionTap(model, SOME_HEADS):
            model(**batch)
        assert snapshot(model) == before


def test_a_modelling_files_own_function_is_put_back() -> None:
    library = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def own(*args: Any, **kwargs: Any) -> Any:
        return library(*args, **kwargs)

    model, batch = tiny_llama(), padded_batch("mixed")
    expected = tapped_rows(model, batch, SOME_HEADS)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        rows = tapped_rows(model, batch, SOME_HEADS)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert all(torch.equal(rows[layer], expected[layer]) for layer in expected)
    tapped_rows(model, batch, SOME_HEADS)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is library and "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_models_in_several_threads_do_not_disturb_one_another() -> None:
    batches = [padded_batch("mixed", seed=seed) for seed in range(4)]
    expected = [tapped_rows(tiny_llama(), batch, SOME_HEADS) for batch in batches]
    failures: list[BaseException] = []

    def work(number: int, tapped: bool) -> None:
        try:
            model = models[number]
            for _ in range(25):
                if not tapped:
                    with torch.no_grad():
                        model(**batches[number])
                    continue
                rows = tapped_rows(model, batches[number], SOME_HEADS)
                assert all(torch.equal(rows[layer], expected[number][layer]) for layer in rows)
        except BaseException as error:
            failures.append(error)

    models = [tiny_llama() for _ in range(4)]
    threads = [threading.Thread(target=work, args=(number, number < 3)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_mask_for_each_layer_is_not_kept_for_all_of_them() -> None:
    model, batch = tiny_llama(), padded_batch("mixed")
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()}),
            with_kwargs=True,
        )
    expected = tapped_rows(tiny_llama(), batch, EVERY_HEAD)
    with torch.no_grad(), AttentionTap(model, EVERY_HEAD) as tap:
        model(**batch)
        assert [len(queries.masks) for queries in tap._selections.values()] == [KINDS_OF_MASK] and N_LAYERS > 2
    assert all(torch.equal(tap.rows[layer], expected[layer]) for layer in expected)


def test_a_tap_without_heads_does_nothing_on_any_model() -> None:
    for model in (tiny_llama(), tiny_mamba()):
        assert tapped_rows(model, padded_batch("none"), HeadSelection({})) == {}
    with AttentionTap(checkpointed(tiny_llama(), True), HeadSelection({})) as tap:
        tap.model(**padded_batch("none"), use_cache=False).logits.sum().backward()


def test_a_tap_that_wants_no_gradient_gives_a_frozen_model_none() -> None:
    model = tiny_llama().requires_grad_(False)
    with AttentionTap(model, SOME_HEADS) as tap:
        assert not model(**padded_batch("none")).logits.requires_grad
    assert not tap.rows[0].requires_grad

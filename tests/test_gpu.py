"""What only a GPU can show: half precision, its kernels and its loss scale, against float64 on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.eager import eager_rows, expected_rows
from support.rows import make_inputs, make_teacher
from support.small_run import read_json, read_lines, small_recipe
from support.tapped import BUILDERS, SOME_HEADS, tapped_rows
from support.teachers import all_heads_kl
from support.tiny_models import N_HEADS, N_LAYERS, padded_batch, tiny_llama, with_lora
from support.trainers import OLD, adapted, arguments, perturb, trained
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seekr_peft import Seekr, SeekrConfig
from seekr_peft.attention import AttentionTap
from seekr_peft.attention import triton_launch as fused
from seekr_peft.attention.row_divergence import row_kl
from seekr_peft.attention.rows import RowInputs
from seekr_peft.heads import HeadSelection
from seekr_peft.model.peak_memory import PeakMemory
from seekr_peft.run.runner import run_recipe
from seekr_peft.sparse import SparseDistribution

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu"),
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.06, "float16": 8e-3}
"""Of one attention weight: some fifteen steps of the dtype, since every layer below rounds too."""

lowered = pytest.mark.parametrize("dtype", DTYPES)


def on_gpu(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in batch.items()}


@lowered
@pytest.mark.parametrize("family", [family for family in BUILDERS if family != "bert"])
def test_rows_of_the_stock_kernels_equal_eager_attention(family: str, dtype: str) -> None:
    queries = torch.tensor([[0, 18, -2, 5]] * 5)
    for padding in ("none", "left", "mixed"):
        batch = padded_batch(padding)
        eager = eager_rows(BUILDERS[family]("eager"), batch)
        model = BUILDERS[family]().to("cuda", DTYPES[dtype])
        rows = tapped_rows(model, on_gpu(batch), SOME_HEADS, queries=queries)
        for layer, heads in SOME_HEADS.items():
            expected = expected_rows(eager[layer], batch, heads, queries)
            assert rows[layer].dtype == torch.float32
            torch.testing.assert_close(rows[layer].cpu(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_the_tap_changes_no_digit_of_what_a_fused_kernel_computes(backend: SDPBackend) -> None:
    # One of the kernels knows no shared key heads.
    sizes = {"head_dim": 16, "num_key_value_heads": N_HEADS}
    model, batch = tiny_llama(**sizes).to("cuda", torch.bfloat16), on_gpu(padded_batch("none"))
    eager = eager_rows(tiny_llama("eager", **sizes).to("cuda", torch.bfloat16), batch)
    with torch.no_grad(), sdpa_kernel(backend):
        plain = model(**batch).logits
        with AttentionTap(model, HeadSelection.all(N_LAYERS, N_HEADS)) as tap:
            tapped = model(**batch).logits
    assert torch.equal(plain, tapped)
    for layer, rows in tap.rows.items():
        torch.testing.assert_close(rows, eager[layer].float(), rtol=0, atol=TOLERANCE["bfloat16"])


def moved(inputs: RowInputs, dtype: torch.dtype) -> RowInputs:
    """The same numbers on the GPU."""
    bias = None if inputs.mask.bias is None else inputs.mask.bias.cuda().to(dtype)
    return RowInputs(
        query=inputs.query.detach().cuda().to(dtype).requires_grad_(),
        key=inputs.key.detach().cuda().to(dtype).requires_grad_(),
        mask=type(inputs.mask)(inputs.mask.allowed.cuda(), bias),
        real=inputs.real.cuda(),
        scaling=inputs.scaling,
    )


def loss_and_gradients(
    inputs: RowInputs, teacher: SparseDistribution, weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    loss = row_kl(inputs, teacher, weights)
    return loss, *torch.autograd.grad(loss * 1000, (inputs.query, inputs.key))


@lowered
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 4, 40])
@pytest.mark.parametrize("n_keys", [11, 300, 5000])
def test_row_kl_and_its_gradient_equal_float64_on_the_cpu(
    dtype: str, bias: bool, top_k: int | None, n_keys: int
) -> None:
    made = make_inputs(torch.float32, bias=bias, n_keys=n_keys, n_queries=9, dim=24)
    # Rounded first, so that both sides start from the same numbers.
    made = replace(
        made,
        query=(2 * made.query.detach()).to(DTYPES[dtype]),
        key=made.key.detach().to(DTYPES[dtype]),
        mask=type(made.mask)(made.mask.allowed, None if made.mask.bias is None else made.mask.bias.to(DTYPES[dtype])),
    )
    exact = replace(
        made,
        query=made.query.double().requires_grad_(),
        key=made.key.double().requires_grad_(),
        mask=type(made.mask)(made.mask.allowed, None if made.mask.bias is None else made.mask.bias.double()),
    )
    teacher = SparseDistribution.from_dense(make_teacher(exact), top_k)
    weights = torch.rand(2, 3, 9) * (torch.rand(2, 3, 9) > 0.3)
    expected = loss_and_gradients(exact, teacher, weights)
    with torch.autocast("cuda", DTYPES[dtype], enabled=dtype != "float32"):
        found = loss_and_gradients(moved(made, DTYPES[dtype]), teacher, weights)
    # The value is computed in float32; a gradient is rounded to the dtype of q and k once.
    torch.testing.assert_close(found[0].cpu().double(), expected[0], rtol=2e-5, atol=1e-6)
    step = {"float32": 5e-5, "bfloat16": 8e-3, "float16": 2e-3}[dtype]
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == DTYPES[dtype]
        assert float((one.cpu().double() - other).norm() / other.norm()) < step


@lowered
def test_the_tap_under_autocast_trains_on_the_gradient_of_float64(dtype: str) -> None:
    """q's and k's gradients of one layer, with the model's own projections under autocast."""
    batch, heads = padded_batch("mixed"), HeadSelection({1: [0, 5]})
    queries = torch.tensor([[0, 18, -2, 5]] * 5)
    teacher = SparseDistribution.from_dense(
        tapped_rows(tiny_llama().double(), padded_batch("mixed", seed=9), heads, queries=queries)[1], 8
    )

    def gradient(model: nn.Module, inputs: dict[str, Tensor], **autocast: Any) -> dict[str, Tensor]:
        def observe(layer: int, call: Any) -> Tensor:
            return all_heads_kl(call, teacher)

        with AttentionTap(model, heads, queries, observe=observe, keep_graph=True) as tap:
            with torch.autocast(**autocast):
                model(**inputs)
            # As a loss scale of fp16 does.
            (1024 * tap.values[1]).backward()
        return {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradient(with_lora(tiny_llama()).double(), batch, device_type="cpu", enabled=False)
    found = gradient(
        with_lora(tiny_llama()).cuda(),
        on_gpu(batch),
        device_type="cuda",
        dtype=DTYPES[dtype],
        enabled=dtype != "float32",
    )
    one = torch.cat([expected[name].flatten() for name in expected])
    other = torch.cat([found[name].flatten() for name in expected])
    limit = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}[dtype]
    assert float((one - other).norm() / one.norm()) < limit
    cuda = torch.device("cuda", torch.cuda.current_device())
    assert find_spec("triton") is None or fused._run_here(torch.float32, 16, cuda)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_on_a_gpu_trains_what_it_trains_on_a_cpu(
    tmp_path: Path, precision: dict[str, bool], accumulate: int
) -> None:
    """Loss scale, autocast and accumulation: the adapters end up where float32 on the CPU puts them."""

    def train(folder: str, **changes: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        model = adapted(tiny_llama(num_hidden_layers=2))
        settings = {"replay_ratio": 0.25, "replay_every": 1, "replay_batch_size": 2, "lambda2": 2.0}
        method = Seekr(model, SeekrConfig(**settings), directory=tmp_path / folder)
        if not changes["use_cpu"]:
            method.model.cuda()
        with method.task("old", replay_from=OLD):
            perturb(method)
        torch.manual_seed(4)
        options = {
            "per_device_train_batch_size": 8 // accumulate,
            "gradient_accumulation_steps": accumulate,
            "learning_rate": 0.2,
            **changes,
        }
        after, trainer = trained(method, arguments(tmp_path / folder, **options))
        return torch.cat([tensor.flatten().cpu() for tensor in after.values()]), trainer.state.log_history

    expected, log = train("cpu", use_cpu=True)
    found, log_gpu = train("gpu", use_cpu=False, **precision)
    start, _ = train("start", use_cpu=True, max_steps=1, learning_rate=0.0)
    limit = 1e-3 if not precision else 0.1
    assert float((found - expected).norm() / (expected - start).norm()) < limit
    terms = [
        (entry["attention_loss"], other["attention_loss"])
        for entry, other in zip(log, log_gpu, strict=True)
        if "loss" in entry
    ]
    assert len(terms) > 2
    for one, other in terms:
        assert other == pytest.approx(one, rel=1e-3 if not precision else 0.15, abs=1e-5 if not precision else 1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_run_with_checkpointing_goes_through_on_a_gpu(tmp_path: Path, quantization: str) -> None:
    recipe = small_recipe(tmp_path / "run", n_tasks=2, model={"name_or_path": "demo", "quantization": quantization})
    recipe["training"] |= {"gradient_checkpointing": True, "bf16": True}
    run_recipe(recipe)
    run = tmp_path / "run"
    lines = read_lines(run / "metrics.jsonl")
    attention = [line["attention_loss"] for line in lines if "attention_loss" in line]
    assert attention and all(0 < value < 10 for value in attention)
    assert read_json(run / "state.json")["status"] == "finished"


def test_capture_memory_grows_linearly_by_the_allocator_s_own_count() -> None:
    def extra(length: int) -> int:
        inputs = moved(
            make_inputs(torch.float32, bias=False, n_keys=length, n_queries=100, heads=8, dim=32), torch.bfloat16
        )
        teacher = SparseDistribution.from_dense(torch.softmax(torch.randn(2, 8, 100, length, device="cuda"), -1), 32)
        row_kl(copy.copy(inputs), teacher).backward()
        with PeakMemory("cuda") as memory:
            row_kl(inputs, teacher).backward()
        return memory.peak

    assert extra(8192) < 8.5 * extra(1024)

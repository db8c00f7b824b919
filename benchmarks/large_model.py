"""A 7B shape with random NF4 weights: seconds, tokens a second and peak memory of a step, and the doctor's prediction.

    python -m benchmarks.large_model --device cuda [--shape 7b] [--length 1024] [--out FILE.json]

LoRA r = 16 on all linear layers, activation checkpointing, batch 1, the second of two tasks. The model is built layer
by layer, so that the weights are never there as floats. ``--shape small`` runs the same on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.replay_step import ANSWER_TOKENS, replay_with_logits, with_attention, with_eager_attention
from benchmarks.scoring import two_forwards_and_a_backward
from benchmarks.timing import device_work, median_seconds, peak_bytes
from benchmarks.whole_task import make_data
from seekr_peft import Seekr
from seekr_peft.doctor.estimate import estimate_footprint
from seekr_peft.memory import ReplayBatch
from seekr_peft.methods.head_scores import score_heads
from seekr_peft.recipe import Recipe, load_recipe
from seekr_peft.recipe.quantization import compute_dtype

SAMPLES = 100
BARE = "two forwards and one backward"
LOWERED = {"bf16": torch.bfloat16, "fp16": torch.float16}
PHASES = {"plain fine-tuning": "training", "with attention": "replay", "scoring": "scoring", "evaluation": "evaluation"}
"""What is measured and the doctor's name for it."""


def shape(name: str, length: int) -> LlamaConfig:
    """LLaMA-2-7B's sizes, or small ones."""
    sizes: dict[str, Any] = {
        "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        "small": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 8},
    }[name]
    vocabulary = 32_000 if name == "7b" else 4096
    return LlamaConfig(vocab_size=vocabulary, max_position_embeddings=max(length, 128), **sizes)


def recipe_of(folder: str, length: int, device: str) -> Recipe:
    """What a user would write for the model in ``folder``."""
    training: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    model = {"name_or_path": folder, "quantization": "nf4"}
    dtype = compute_dtype(load_recipe({"model": model, "tasks": {"format": "demo"}}).model)
    if device == "cuda":
        training["bf16" if dtype == torch.bfloat16 else "fp16"] = True
    return load_recipe(
        {
            "model": model,
            "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "method": {
                "name": "seekr",
                "replay_ratio": 0.02,
                "replay_batch_size": 1,
                "teacher_loss_limit": 1e9,
                "teacher_entropy_limit": 1e9,
            },
            "training": training,
            "tasks": {"format": "demo", "order": ["first", "last"], "max_length": length, "max_train": SAMPLES},
            "evaluation": {"max_new_tokens": ANSWER_TOKENS, "batch_size": 8},
            "output_dir": folder,
        }
    )


def random_base(config: LlamaConfig, recipe: Recipe, device: str) -> LlamaForCausalLM:
    """As ``from_pretrained`` with a BitsAndBytesConfig would load it."""
    import bitsandbytes as bnb

    dtype, nested = compute_dtype(recipe.model), recipe.model.bnb_4bit_use_double_quant
    with torch.device("meta"):
        base = LlamaForCausalLM(config).to(dtype)
    for path, layer in list(base.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is base.lm_head:
            continue
        quantized = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=nested,
            quant_type="nf4",
            device="meta",
        )
        weight = torch.randn(layer.out_features, layer.in_features, device=device).mul_(0.02).to(dtype)
        quantized.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=nested, module=quantized
        ).to(device)
        base.set_submodule(path, quantized)
    for module in base.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                # Norms are ones; embeddings and the head are random.
                value = torch.ones(parameter.shape) if parameter.dim() == 1 else 0.02 * torch.randn(parameter.shape)
                setattr(module, name, nn.Parameter(value.to(device, dtype), requires_grad=False))
    base.model.rotary_emb = type(base.model.rotary_emb)(config).to(device)
    base.is_loaded_in_4bit = True
    base.config.use_cache = False
    return base


def build(config: LlamaConfig, recipe: Recipe, device: str) -> PeftModel:
    """The base with one adapter, prepared as a run does."""
    torch.manual_seed(0)
    base = prepare_model_for_kbit_training(
        random_base(config, recipe, device),
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    return get_peft_model(base, LoraConfig(**recipe.adapter.lora()))


def under_autocast(model: nn.Module, recipe: Recipe, device: str) -> None:
    """The model's own forward under autocast, as the Trainer's accelerate wraps it and leaves it: a run's replay and
    scoring are under it as well, ``generate`` goes past it."""
    dtype = next((dtype for kind, dtype in LOWERED.items() if recipe.training.get(kind)), None)
    if dtype is not None:
        model.forward = convert_outputs_to_fp32(torch.autocast(device, dtype)(model.forward))


def weight_bytes(model: nn.Module) -> int:
    """Of all weights and buffers, with what the 4-bit layers keep beside theirs."""
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            kept = (getattr(part, name, None) for name in ("absmax", "code", "offset"))
            total += sum(tensor.nbytes for tensor in kept if isinstance(tensor, Tensor))
    return total


def measure(name: str, length: int, repeats: int, device: str) -> dict[str, Any]:
    """Seconds of a forward and backward of each variant, its peak above what lies in memory (with two moments of Adam,
    which no step makes here), that, and the doctor's prediction of both."""
    with TemporaryDirectory() as folder:
        config = shape(name, length)
        config.save_pretrained(folder)
        recipe = recipe_of(folder, length, device)
        predicted = estimate_footprint(recipe, SAMPLES, ANSWER_TOKENS)
        method = Seekr(build(config, recipe, device), recipe.method_config(), directory=folder)
        with method.task("first", replay_from=make_data(length, 1, SAMPLES)):
            for path, parameter in method.stack.parameters().items():
                if path.endswith("lora_B"):
                    # As if it had been trained: a B of zeros changes no attention.
                    nn.init.normal_(parameter, std=0.01)
        # The second task's adapter over the first's; a task that ended here would be scored and stored for nothing.
        method.stack.begin()
        trained = method.stack.parameters().values()
        under_autocast(method.model, recipe, device)
        resident = weight_bytes(method.model) + sum(2 * parameter.nbytes for parameter in trained)
        steps = _steps(method, recipe, length, device)
        peaks = peak_bytes(steps, device)
        timed = {step: call for step, call in steps.items() if step != "evaluation"}
        seconds = median_seconds(timed, repeats, device) if repeats else {}
        work = device_work(timed, device) if repeats else {}
        memory = method.memory.tasks[0]
        return {
            "shape": name,
            "length": length,
            "seconds": seconds,
            "device_seconds": {step: own.seconds for step, own in work.items()},
            "launches": {step: own.launches for step, own in work.items()},
            "peak": peaks,
            "resident": resident,
            "predicted": {"resident": predicted.resident, **predicted.phases},
            "sample_bytes": memory.bytes / len(memory),
            "predicted_sample_bytes": predicted.bytes_per_sample,
        }


def _steps(method: Seekr, recipe: Recipe, length: int, device: str) -> dict[str, Callable[[], object]]:
    model, stack = method.model, method.stack
    data = make_data(length, 3, 1)[0]
    batch = {key: torch.tensor([value], device=device) for key, value in data.items()}

    def replayed() -> ReplayBatch:
        return method.memory.batch([(0, 0)], device=torch.device(device))

    def trained(work: Callable[[], object], implementation: str = "sdpa") -> Callable[[], object]:
        def step() -> None:
            model.train()
            model.get_base_model().set_attn_implementation(implementation)
            work()
            model.zero_grad()

        return step

    def generate() -> None:
        model.eval()
        prompts = torch.randint(3, 4096, (recipe.evaluation.batch_size, length - ANSWER_TOKENS), device=device)
        # After a task there is one adapter, the sum of all; the first task's alone is like it.
        with torch.no_grad(), stack.before_task():
            model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=ANSWER_TOKENS,
                min_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                use_cache=True,
            )

    sample = method.memory.tasks[0].sample(0)
    return {
        "plain fine-tuning": trained(lambda: model(**batch, use_cache=False).loss.backward()),
        "replay + logits": trained(lambda: replay_with_logits(model, replayed()).backward()),
        "with attention": trained(lambda: with_attention(model, replayed())),
        "eager attention": trained(lambda: with_eager_attention(model, replayed()).backward(), "eager"),
        BARE: trained(lambda: two_forwards_and_a_backward(stack, sample)),
        "scoring": trained(lambda: score_heads(stack, [sample])),
        "evaluation": generate,
    }


def table(found: dict[str, Any], machine: str) -> Table:
    """Peaks are totals: what lies in memory and what the step needs on top."""
    title = f"{found['shape']} shape, NF4, T = {found['length']}, {machine}; GB"
    result = Table(title=title, title_justify="left")
    for heading in ("step", "seconds", "tokens/s", "GPU, s", "kernels", "peak", "doctor", "doctor / measured"):
        result.add_column(heading, justify="left" if heading == "step" else "right")
    resident, predicted = found["resident"], found["predicted"]
    foretold = predicted["resident"]
    result.add_row("(resident)", "", "", "", "", _gb(resident), _gb(foretold), _ratio(foretold, resident))
    for step, peak in found["peak"].items():
        seconds = found["seconds"].get(step)
        times = ("", "") if seconds is None else (f"{seconds:.3f}", f"{found['length'] / seconds:.0f}")
        own = found["device_seconds"].get(step)
        times += ("", "") if own is None else (f"{own:.3f}", str(found["launches"][step]))
        doctor = ("", "")
        if step in PHASES:
            foretold = predicted["resident"] + predicted[PHASES[step]]
            doctor = _gb(foretold), _ratio(foretold, resident + peak)
        result.add_row(step, *times, _gb(resident + peak), *doctor)
    return result


def _gb(size: float) -> str:
    return f"{size / 1e9:.3f}"


def _ratio(predicted: float, measured: float) -> str:
    return f"x {predicted / measured:.2f}"


def main() -> None:
    """Measure and print; ``--out`` also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", choices=("7b", "small"))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; 0 measures the peaks alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    name = options.shape or ("7b" if options.device == "cuda" else "small")
    found = measure(name, options.length, options.repeats, options.device)
    console = Console(width=110)
    console.print(table(found, machine))
    console.print(
        f"a replay sample on disk: {found['sample_bytes'] / 1e3:.0f} kB, foretold at most "
        f"{found['predicted_sample_bytes'] / 1e3:.0f} kB"
    )
    if options.out:
        document = {"machine": machine, "torch": torch.__version__, **found}
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

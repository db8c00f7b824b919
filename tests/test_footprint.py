"""The doctor's prediction against what the same recipe's phases really allocate, on the demo's model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.small_run import small_recipe
from support.tiny_models import tiny_falcon, tiny_gemma2, tiny_gpt_neo, tiny_mixtral, tiny_openai_gpt
from transformers import AutoTokenizer, TrainingArguments
from typer.testing import CliRunner

from seekr_peft import ContinualTrainer, Seekr
from seekr_peft.cli import app
from seekr_peft.demo import BASE_PATH
from seekr_peft.doctor.advice import first_knob, render_footprint
from seekr_peft.doctor.estimate import Footprint, estimate_footprint
from seekr_peft.errors import AdapterError, CaptureError, ConfigError
from seekr_peft.memory import TaskMemory
from seekr_peft.methods import get_method
from seekr_peft.methods.head_scores import score_heads
from seekr_peft.model.peak_memory import PeakMemory
from seekr_peft.recipe import Recipe, load_recipe
from seekr_peft.recipe.base_model import load_model

LENGTH, ANSWERS, BATCH = 128, 8, 4
METHOD = {
    "name": "seekr",
    "replay_ratio": 0.1,
    "replay_every": 1,
    "replay_batch_size": 3,
    # What the teacher fills; a surer one needs less on disk.
    "row_top_k": 8,
    "logit_top_k": 64,
    "kept_mass": 1.0,
}


def recipe(
    tmp_path: Path, quantization: str = "nf4", checkpointing: bool = False, bf16: bool = False, **sections: Any
) -> Recipe:
    settings = small_recipe(
        tmp_path,
        n_tasks=2,
        model={"name_or_path": "demo", "quantization": quantization},
        adapter={"r": 4, "lora_alpha": 8},
        training={
            "per_device_train_batch_size": BATCH,
            "gradient_checkpointing": checkpointing,
            "bf16": bf16,
            "max_steps": 2,
        },
        evaluation={"max_new_tokens": ANSWERS, "batch_size": BATCH},
        method=METHOD,
    )
    return load_recipe({**settings, **sections})


def full_length_data(n: int = 40) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 60, (n, LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100] * (LENGTH - ANSWERS) + row[-ANSWERS:]} for row in rows]


def measured(of: Recipe, tmp_path: Path) -> tuple[dict[str, int], int]:
    """Peak bytes of each phase of the second task above what lies in memory, and the bytes of one replay sample."""
    model, _ = load_model(of)
    method = Seekr(model, of.method_config(), directory=tmp_path / "method")
    data, peaks = full_length_data(), {}
    for name in ("first", "second"):
        with method.task(name, replay_from=data):
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                max_steps=2,
                bf16=bool(of.training.get("bf16")),
                per_device_train_batch_size=BATCH,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )
            trainer = ContinualTrainer(model=model, method=method, args=arguments, train_dataset=data)
            trainer.train()
            if name == "first":
                continue
            model.train()
            batch = {key: torch.tensor([row[key] for row in data[:BATCH]]) for key in ("input_ids", "labels")}
            model.zero_grad()
            with PeakMemory() as memory:
                model(**batch, attention_mask=torch.ones_like(batch["labels"]), use_cache=False).loss.backward()
            peaks["training"] = memory.peak
            model.zero_grad()
            with PeakMemory() as memory, method.replay_terms(model) as terms:
                terms.total.backward()
            peaks["replay"] = memory.peak
            model.zero_grad()
            with PeakMemory() as memory:
                score_heads(method.stack, method._samples)
            peaks["scoring"] = memory.peak
    model.eval()
    prompts = torch.randint(3, 60, (BATCH, LENGTH - ANSWERS))
    with torch.no_grad(), PeakMemory() as memory:
        model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=ANSWERS,
            min_new_tokens=ANSWERS,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
        )
    peaks["evaluation"] = memory.peak
    one, two = (TaskMemory(method.task_directory(i, name)).bytes for i, name in enumerate(("first", "second")))
    return peaks, max(one, two) // 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("quantization", "checkpointing", "bf16"),
    [("nf4", False, False), ("nf4", True, False), ("nf4", True, True), ("none", False, True)],
)
def test_eager_attention_is_counted_with_its_square_arrays(
    tmp_path: Path, quantization: str, checkpointing: bool, bf16: bool
) -> None:
    # Every head: the doctor spreads a choice over the layers, and a run may choose several of one.
    method = {**METHOD, "head_choice": "all"}
    fused = estimate_footprint(
        recipe(tmp_path, quantization, checkpointing, bf16, method=method), answer_tokens=ANSWERS
    )
    model = {"name_or_path": "demo", "quantization": quantization, "attn_implementation": "eager"}
    settings = recipe(tmp_path, quantization, checkpointing, bf16, model=model, method=method)
    footprint = estimate_footprint(settings, answer_tokens=ANSWERS)
    peaks, _ = measured(settings, tmp_path)
    for phase, size in peaks.items():
        assert footprint.phases[phase] == pytest.approx(size, rel=0.05), phase
        assert footprint.phases[phase] > fused.phases[phase]


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_models_that_need_eager_attention_are_counted(tmp_path: Path, family: str) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 48, "n_layer": 3, "n_head": 6, "attention_dropout": 0.0}
    base = tiny_gemma2() if family == "gemma2" else BloomForCausalLM(BloomConfig(**sizes))
    base.save_pretrained(tmp_path / family)
    model = {"name_or_path": str(tmp_path / family), "quantization": "none", "attn_implementation": "eager"}
    footprint = estimate_footprint(recipe(tmp_path, model=model), answer_tokens=ANSWERS)
    assert all(footprint.phases[phase] > 0 for phase in ("training", "replay", "scoring", "evaluation"))


def family_recipe(tmp_path: Path, family: str, attention: str = "sdpa", **settings: Any) -> Recipe:
    """With the base of a family whose attention is its own, saved with the demo's tokenizer."""
    builders = {"gpt_neo": tiny_gpt_neo, "falcon": tiny_falcon, "openai_gpt": tiny_openai_gpt}
    builders[family](vocab_size=256).save_pretrained(tmp_path / family)
    AutoTokenizer.from_pretrained(BASE_PATH).save_pretrained(tmp_path / family)
    model = {"name_or_path": str(tmp_path / family), "quantization": "none", "attn_implementation": attention}
    return recipe(tmp_path, model=model, tasks=tasks_of(LENGTH), **settings)


def tasks_of(max_length: int) -> dict[str, Any]:
    return {"format": "demo", "order": ["first", "last"], "max_train": 40, "max_length": max_length}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "attention"),
    [("gpt_neo", "sdpa"), ("gpt_neo", "flash_attention_2"), ("falcon", "eager"), ("openai_gpt", "sdpa")],
)
def test_families_whose_attention_is_their_own_are_counted(tmp_path: Path, family: str, attention: str) -> None:
    """GPT-Neo's file knows two kernels by name, others none: what a run would load is what is counted."""
    settings = family_recipe(tmp_path, family, attention, method={**METHOD, "head_choice": "all"})
    footprint = estimate_footprint(settings, answer_tokens=ANSWERS)
    loads = family_recipe(tmp_path, family, "eager", method={**METHOD, "head_choice": "all"})
    peaks, _ = measured(loads, tmp_path)
    for phase in ("training", "replay", "scoring", "evaluation"):
        assert footprint.phases[phase] == pytest.approx(peaks[phase], rel=0.1), phase


@pytest.mark.parametrize("method", ["seekr", "replay", "sequential"])
def test_a_kernel_that_a_family_calls_itself_is_counted_or_refused(tmp_path: Path, method: str) -> None:
    settings = family_recipe(tmp_path, "falcon", method={**METHOD, "name": method})
    if method == "seekr":
        with pytest.raises(CaptureError, match=r"FalconAttention.* attn_implementation='eager'"):
            estimate_footprint(settings)
        return
    eager = estimate_footprint(family_recipe(tmp_path, "falcon", "eager", method={**METHOD, "name": method}))
    assert 0 < estimate_footprint(settings).phases["training"] <= eager.phases["training"]


@pytest.mark.parametrize("kind", ["RwkvConfig", "MambaConfig"])
def test_models_without_attention_are_counted_for_what_needs_none(tmp_path: Path, kind: str) -> None:
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "attention_hidden_size": 24}
    getattr(transformers, kind)(**sizes).save_pretrained(tmp_path / kind)
    targets = ["key", "value"] if kind == "RwkvConfig" else ["in_proj"]
    options = {
        "model": {"name_or_path": str(tmp_path / kind), "quantization": "none"},
        "adapter": {"r": 4, "lora_alpha": 8, "target_modules": targets},
        "tasks": tasks_of(8),
    }
    footprint = estimate_footprint(recipe(tmp_path, method={**METHOD, "name": "replay"}, **options))
    assert set(footprint.phases) == {"training", "replay", "evaluation"} and min(footprint.phases.values()) > 0
    with pytest.raises(CaptureError, match="has no softmax attention"):
        estimate_footprint(recipe(tmp_path, **options))


def test_a_forward_that_needs_values_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def asks(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        assert float(output.last_hidden_state.sum()) < 1e9
        return output

    monkeypatch.setattr(LlamaModel, "forward", asks)
    message = (
        r"^model\.name_or_path: the memory that LlamaForCausalLM needs cannot be predicted, .*training.max_steps: 1\.$"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        estimate_footprint(recipe(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bf16", [False, True])
def test_models_of_experts_are_counted(tmp_path: Path, bf16: bool) -> None:
    """Their products, too, which torch has on the meta device for bfloat16 alone."""
    tiny_mixtral(max_position_embeddings=LENGTH + ANSWERS, vocab_size=256).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(BASE_PATH).save_pretrained(tmp_path / "moe")
    model = {"name_or_path": str(tmp_path / "moe"), "quantization": "none"}
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    settings = recipe(
        tmp_path, "none", bf16=bf16, model=model, adapter=adapter, method={**METHOD, "head_choice": "all"}
    )
    footprint = estimate_footprint(settings, answer_tokens=ANSWERS)
    peaks, _ = measured(settings, tmp_path)
    # This teacher's rows and answers fill less than they may; a CPU keeps less of the experts than is counted.
    for phase, most in {"training": 1.2, "replay": 1.4, "scoring": 1.2, "evaluation": 1.2}.items():
        assert 0.95 * peaks[phase] <= footprint.phases[phase] <= most * peaks[phase], phase
    with pytest.raises(AdapterError, match=r"sits on the experts or their router, .*such as \['q_proj'"):
        estimate_footprint(recipe(tmp_path, "none", model=model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("quantization", "checkpointing", "bf16"),
    [("nf4", False, False), ("none", False, False), ("nf4", True, False), ("nf4", True, True), ("none", False, True)],
)
def test_each_phases_own_bytes_are_predicted(
    tmp_path: Path, quantization: str, checkpointing: bool, bf16: bool
) -> None:
    """After a Trainer with ``bf16`` the model's forward stays under autocast, so scoring is measured there as well."""
    settings = recipe(tmp_path, quantization, checkpointing, bf16)
    footprint = estimate_footprint(settings, answer_tokens=ANSWERS)
    peaks, sample_bytes = measured(settings, tmp_path)
    assert set(peaks) == set(footprint.phases)
    for phase, limit in {"training": 0.01, "replay": 0.05, "scoring": 0.02, "evaluation": 0.02}.items():
        assert footprint.phases[phase] == pytest.approx(peaks[phase], rel=limit), phase
    assert footprint.peak == pytest.approx(footprint.resident + max(peaks.values()), rel=0.1)
    # Entries too small for 8 bits are not stored.
    assert 0.99 * sample_bytes <= footprint.bytes_per_sample <= 1.2 * sample_bytes


def test_the_replay_peak_is_the_same_after_any_number_of_tasks_and_predicted(tmp_path: Path) -> None:
    """Every task draws heads of its own: after four of them a batch holds those of three or four."""
    method = {**METHOD, "head_choice": "random", "replay_ratio": 0.2, "replay_batch_size": 6}
    settings = recipe(tmp_path, "none", method=method)
    model, _ = load_model(settings)
    seekr = Seekr(model, settings.method_config(), directory=tmp_path / "method")
    data, peaks = full_length_data(), []
    for number in range(5):
        with seekr.task(f"task{number}", replay_from=data, optimizer_steps=1):
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.data += 0.001
            if number in (1, 4):
                model.train()
                with PeakMemory() as memory, seekr.replay_terms(model) as terms:
                    terms.total.backward()
                peaks.append(memory.peak)
                model.zero_grad()
    assert len(set(seekr.selections)) == 5
    assert peaks[1] == pytest.approx(peaks[0], rel=0.04)
    assert estimate_footprint(settings, answer_tokens=ANSWERS).phases["replay"] == pytest.approx(peaks[1], rel=0.05)


def test_a_replay_batch_counts_its_teachers_entries_padded_to_the_broadest(tmp_path: Path) -> None:
    """3 samples of 8 answers: four times the average of 10 entries a token, then every word of the vocabulary."""
    one, ten, all_words = (
        estimate_footprint(load_recipe(recipe(tmp_path).to_dict(), [f"method.logit_top_k={k}"])).phases["replay"]
        for k in (1, 10, 256)
    )
    assert ten - one == 3 * ANSWERS * 12 * 4 * (10 - 1)
    assert all_words - one == 3 * ANSWERS * 12 * (256 - 4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("replay_logits", {}), ("replay", {}), ("seekr", {"logits_distillation": False})],
)
def test_what_each_method_stores_is_predicted(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    # Half of the samples, so that the file's header counts for little; floats, of which none is too small to be kept.
    method = {
        "name": name,
        "replay_ratio": 0.5,
        "row_top_k": 8,
        "kept_mass": 1.0,
        "storage_dtype": "float32",
    } | settings
    of = recipe(tmp_path, "none", method=method)
    model, _ = load_model(of)
    trained = get_method(name)(model, of.method_config(), directory=tmp_path / "method")
    with trained.task("first", replay_from=full_length_data()):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.001  # else no head has changed, and none is selected
    footprint = estimate_footprint(of)
    stored = TaskMemory(trained.task_directory(0, "first")).bytes / 20
    assert 0.95 * stored <= footprint.bytes_per_sample <= 1.2 * stored
    assert ("scoring" in footprint.phases) == (name == "seekr")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_base_and_the_adapters_are_predicted(tmp_path: Path, quantization: str) -> None:
    settings = recipe(tmp_path, quantization)
    footprint = estimate_footprint(settings)
    model, _ = load_model(settings)
    adapter = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    base = sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)
    assert footprint.adapters == 2 * adapter and footprint.optimizer == 2 * adapter
    assert base <= footprint.base <= 1.3 * base, "the scales and the rotary table come on top"


def test_a_7b_model_is_sized_from_its_configuration_alone(tmp_path: Path) -> None:
    """No weight exists: 6.7e9 parameters, 4.4 GB of them in NF4 with fp32 embeddings and head."""
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=32_000).save_pretrained(tmp_path / "base")
    settings = recipe(
        tmp_path / "run",
        checkpointing=True,
        model={"name_or_path": str(tmp_path / "base"), "quantization": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
        tasks={"format": "demo", "max_train": 5000, "max_length": 512},
    )
    footprint = estimate_footprint(settings)
    four_bit = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert footprint.base == pytest.approx(four_bit * (0.5 + 1 / 64) + 2 * 32_000 * 4096 * 4, rel=0.01)


def footprint_of(**phases: int) -> Footprint:
    return Footprint(10, 1, 1, {"training": 0, **phases}, 2, 1, 1, 2)


def test_the_first_knob_acts_on_the_largest_part(tmp_path: Path) -> None:
    plain, checkpointed = recipe(tmp_path), recipe(tmp_path, checkpointing=True)
    assert first_knob(footprint_of(training=99), plain) == "training.gradient_checkpointing: true"
    assert "per_device_train_batch_size" in first_knob(footprint_of(training=99), checkpointed)
    assert first_knob(footprint_of(evaluation=99), plain) == "evaluation.batch_size"
    assert first_knob(footprint_of(scoring=99), plain) == "method.query_budget"
    assert first_knob(footprint_of(replay=99), plain) == "method.replay_batch_size"
    assert "nf4" in first_knob(footprint_of(training=1), recipe(tmp_path, "none"))


def test_it_says_whether_it_fits_and_what_to_turn(tmp_path: Path) -> None:
    def printed(memory: float) -> tuple[bool, str]:
        file = io.StringIO()
        return render_footprint(recipe(tmp_path), Console(file=file, width=120), memory), file.getvalue()

    fits, text = printed(24)
    assert fits and "24.0 GB at hand: fits" in text and "2 tasks of 4 samples" in text
    fits, text = printed(0.001)
    assert not fits and "does not fit; the first knob to turn: " in text


def test_the_command_exits_with_1_when_it_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name_or_path: demo}\ntasks: {format: demo, max_train: 20}\n", encoding="utf-8")
    assert CliRunner().invoke(app, ["doctor", str(path), "--memory", "24"]).exit_code == 0
    assert CliRunner().invoke(app, ["doctor", str(path), "--memory", "0.001"]).exit_code == 1


@pytest.mark.parametrize("memory", ["-1", "0", "nan", "inf"])
def test_no_memory_is_refused(tmp_path: Path, memory: str) -> None:
    with pytest.raises(ConfigError, match="--memory must be a number of GB above 0"):
        render_footprint(recipe(tmp_path), Console(file=io.StringIO()), float(memory))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": ["no_such_module"]}, ": .*no_such_module"),
        ({"exclude_modules": ".*"}, ": .*All modules were excluded"),
        ({"rank_pattern": {"q_proj": 0}}, r"\.rank_pattern must be a mapping of whole numbers from 1"),
        ({"target_modules": 3}, r"\.target_modules must be text or a list of text"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_sentence(tmp_path: Path, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^adapter{message}") as caught:
        estimate_footprint(recipe(tmp_path, adapter=adapter))
    assert "\n" not in str(caught.value)


def test_a_model_that_answers_nothing_is_one_sentence(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=61).save_pretrained(tmp_path / "t5")
    model = {"name_or_path": str(tmp_path / "t5"), "quantization": "none"}
    with pytest.raises(ConfigError, match=r"^model\.name_or_path: .*t5 \(model_type t5\) is an encoder-decoder"):
        estimate_footprint(recipe(tmp_path, model=model))


def test_smoothed_labels_are_counted(tmp_path: Path) -> None:
    plain, smoothed = (
        estimate_footprint(load_recipe(recipe(tmp_path).to_dict(), [f"training.label_smoothing_factor={factor}"]))
        for factor in (0.0, 0.1)
    )
    assert smoothed.phases["training"] > plain.phases["training"]


@pytest.mark.parametrize(
    ("optim", "numbers"),
    [("adamw_torch", 2), ("lion_32bit", 1), ("rmsprop", 1), ("adagrad", 1), ("ademamix", 3), ("sgd", 0)],
)
def test_optimizer_states_are_counted(tmp_path: Path, optim: str, numbers: int) -> None:
    found = estimate_footprint(load_recipe(recipe(tmp_path).to_dict(), [f"training.optim={optim}"]))
    # The task's own adapter is half of the two, in float32 as its states.
    assert found.optimizer == numbers * found.adapters // 2


def test_samples_are_counted_where_the_recipe_does_not_say_how_many(tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 70)):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            line = '{"prompt": "a", "answer": "b"}\n'
            (tmp_path / name / f"{split}.jsonl").write_text(line * count, encoding="utf-8")
    settings = recipe(tmp_path / "run", tasks={"format": "jsonl", "path": str(tmp_path), "order": ["a", "b"]})
    assert estimate_footprint(settings).replay_samples == 7
    assert estimate_footprint(settings, n_train=1000).replay_samples == 100

"""The types and bounds of every setting of a recipe, against what people write and what the libraries take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.good_recipe import problems, recipe

from seekr_peft.recipe import load_recipe

# Types and bounds of every setting ----------------------------------------------------------------------------------

WRONG_TRAINING: list[tuple[dict[str, Any], str]] = [
    ({"label_smoothing_factor": 7}, "label_smoothing_factor must be a number in [0, 1), got 7."),
    ({"label_smoothing_factor": 1.0}, "label_smoothing_factor must be a number in [0, 1), got 1.0."),
    ({"weight_decay": -1}, "weight_decay must be a number of at least 0, got -1."),
    ({"weight_decay": 1e30}, "weight_decay must be a number of at most 1000, got 1e+30."),
    ({"max_grad_norm": -1}, "max_grad_norm must be a number of at least 0, got -1."),
    ({"max_grad_norm": None}, "max_grad_norm must be a number of at least 0, got None."),
    ({"max_steps": 0}, "max_steps must be a whole number above 0, or -1 for whole epochs, got 0."),
    ({"max_steps": -2}, "max_steps must be a whole number above 0, or -1 for whole epochs, got -2."),
    ({"max_steps": True}, "max_steps must be a whole number above 0, or -1 for whole epochs, got True."),
    ({"max_steps": 2**31}, "max_steps must be a whole number of at most 2147483647, got 2147483648."),
    ({"neftune_noise_alpha": "abc"}, "neftune_noise_alpha must be a number of at least 0, got 'abc'."),
    ({"neftune_noise_alpha": -5}, "neftune_noise_alpha must be a number of at least 0, got -5."),
    ({"dataloader_num_workers": -3}, "dataloader_num_workers must be a whole number of at least 0, got -3."),
    ({"dataloader_num_workers": 10**6}, "dataloader_num_workers must be a whole number of at most 256, got 1000000."),
    ({"dataloader_prefetch_factor": 0, "dataloader_num_workers": 1}, "dataloader_prefetch_factor must be a whole"),
    ({"learning_rate": 0}, "learning_rate must be a number above 0, got 0."),
    ({"learning_rate": -1e-4}, "learning_rate must be a number above 0, got -0.0001."),
    ({"learning_rate": True}, "learning_rate must be a number above 0, got True."),
    ({"learning_rate": 1e30}, "learning_rate must be a number of at most 1000, got 1e+30."),
    ({"learning_rate": [1e-4]}, "learning_rate must be a number above 0, got [0.0001]."),
    ({"adam_beta1": 1}, "adam_beta1 must be a number in [0, 1), got 1."),
    ({"adam_beta2": -0.1}, "adam_beta2 must be a number in [0, 1), got -0.1."),
    ({"adam_epsilon": -1e-8}, "adam_epsilon must be a number of at least 0, got -1e-08."),
    ({"warmup_steps": -1}, "warmup_steps must be a number of at least 0, and whole from 1 on, got -1."),
    ({"warmup_steps": 1.5}, "warmup_steps must be a number of at least 0, and whole from 1 on, got 1.5."),
    ({"num_train_epochs": "three"}, "num_train_epochs must be a number above 0, got 'three'."),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number of at least 1, got 0."),
    (
        {"per_device_train_batch_size": 2.0},
        "per_device_train_batch_size must be a whole number of at least 1, got 2.0.",
    ),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number of at least 1, got 0."),
    ({"logging_steps": 1.5}, "logging_steps must be a number above 0, and whole from 1 on, got 1.5."),
    ({"eval_steps": -1}, "eval_steps must be a number of at least 0, got -1."),
    ({"eval_accumulation_steps": 0}, "eval_accumulation_steps must be a whole number of at least 1, got 0."),
    ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps must be a whole number of at least 1, got 0."),
    ({"save_strategy": True}, "save_strategy must be one of no, steps, epoch, got True."),
    ({"save_steps": 0}, "save_steps must be a number above 0, and whole from 1 on, got 0."),
    ({"save_steps": 2.5}, "save_steps must be a number above 0, and whole from 1 on, got 2.5."),
    ({"save_total_limit": 0}, "save_total_limit must be a whole number of at least 1, got 0."),
    ({"save_total_limit": 1.5}, "save_total_limit must be a whole number of at least 1, got 1.5."),
    ({"optim": 5}, "optim must be one of adamw_torch, "),
    ({"optim": ["sgd"]}, "optim must be one of adamw_torch, "),
    ({"optim": None}, "optim must be one of adamw_torch, "),
    ({"optim_args": "no_value"}, "optim_args must be text such as name=value,name=value, got 'no_value'."),
    ({"optim_target_modules": [1]}, "optim_target_modules must be text or a list of text, got [1]."),
    ({"lr_scheduler_type": 3}, "lr_scheduler_type must be one of linear, "),
    ({"hub_strategy": "often"}, "hub_strategy must be one of end, "),
    ({"debug": "everything"}, "debug must be one or more of underflow_overflow, tpu_metrics_debug, got 'everything'."),
    ({"report_to": "nonsense"}, "report_to must be none, all, or one or more of azure_ml, "),
    ({"report_to": ["wandb", 1]}, "report_to must be none, all, or one or more of azure_ml, "),
    ({"log_level": "loud"}, "log_level must be one of detail, debug, info, warning, error, critical, passive, got 'lo"),
    ({"run_name": 5}, "run_name must be text, got 5."),
    ({"label_names": "labels"}, "label_names must be a list of text, got 'labels'."),
    ({"include_num_input_tokens_seen": "some"}, "include_num_input_tokens_seen must be true or false or one of all, "),
    ({"train_sampling_strategy": "best"}, "train_sampling_strategy must be one of random, sequential, "),
    ({"torch_compile_backend": "gcc"}, "torch_compile_backend must be one of no, eager, "),
    ({"torch_compile_mode": "fast"}, "torch_compile_mode must be one of default, "),
    (
        {"dataloader_multiprocessing_context": "thread", "dataloader_num_workers": 1},
        "dataloader_multiprocessing_context must be one of fork, ",
    ),
    ({"liger_kernel_config": {"rope": 1}}, "liger_kernel_config must be a mapping of true or false, got {'rope': 1}."),
    ({"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs must be a mapping without infinite numbers, got 'x'."),
    (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": math.nan}},
        "lr_scheduler_kwargs must be a mapping without infinite",
    ),
    ({"gradient_checkpointing_kwargs": "x"}, "gradient_checkpointing_kwargs must be a mapping, got 'x'."),
    (
        {"gradient_checkpointing_kwargs": {"reentrant": False}},
        "gradient_checkpointing_kwargs has the unknown key reentr",
    ),
    (
        {"activation_checkpointing_kwargs": {"every_n_layers": 0}},
        "activation_checkpointing_kwargs.every_n_layers must ",
    ),
    ({"accelerator_config": {"split_batches": "yes"}}, "accelerator_config.split_batches must be true or false, got '"),
    ({"accelerator_config": {"split": True}}, "accelerator_config has the unknown key split; known keys are split_ba"),
    (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 0}}},
        "accelerator_config.gradient_accumulation_kwargs.num_steps must be a whole number of at least 1, got 0.",
    ),
    (
        {"local_rank": 5},
        "local_rank is 5, which is for several processes, but a run is one process on one device; leave",
    ),
    ({"deepspeed": "ds.json"}, "deepspeed is 'ds.json', which is for several processes"),
    ({"fsdp": "full_shard"}, "fsdp is 'full_shard', which is for several processes"),
    ({"ddp_timeout": 5}, "ddp_timeout is 5, which is for several processes"),
    ({"ddp_find_unused_parameters": True}, "ddp_find_unused_parameters is True, which is for several processes"),
    ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint is set by the run; use save_strategy instead."),
]


@pytest.mark.parametrize(("training", "message"), WRONG_TRAINING, ids=str)
def test_a_training_setting_out_of_its_bounds_is_one_sentence(training: dict[str, Any], message: str) -> None:
    (problem,) = problems(recipe(training=training))
    assert problem.startswith(f"training.{message}"), problem


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"fp16": True, "bf16": True}, "training: fp16 and bf16 exclude each other; keep one."),
        ({"fp16_full_eval": True, "bf16_full_eval": True}, "training: fp16_full_eval and bf16_full_eval exclude"),
        (
            {"dataloader_prefetch_factor": 2},
            "training: dataloader_prefetch_factor needs dataloader_num_workers above 0;",
        ),
        ({"dataloader_persistent_workers": True}, "training: dataloader_persistent_workers needs dataloader_num_wor"),
        ({"dataloader_multiprocessing_context": "fork"}, "training: dataloader_multiprocessing_context needs dataloa"),
    ],
)
def test_training_settings_that_do_not_go_together_are_one_sentence(training: dict[str, Any], message: str) -> None:
    (problem,) = problems(recipe(training=training))
    assert problem.startswith(message)


WRONG_ADAPTERS: list[tuple[dict[str, Any], str]] = [
    ({"lora_alpha": 10**30}, ".lora_alpha: 1000000000000000000000000000000 is too large; give a smaller number."),
    ({"lora_alpha": 10**9}, ".lora_alpha must be a number of at most 1000000, got 1000000000."),
    ({"lora_alpha": 0}, ".lora_alpha must be a number above 0, got 0."),
    ({"lora_alpha": True}, ".lora_alpha must be a number above 0, got True."),
    ({"r": 10**9}, ".r must be a whole number of at most 16384, got 1000000000."),
    ({"r": -1}, ".r must be a whole number of at least 1, got -1."),
    ({"r": True}, ".r must be a whole number of at least 1, got True."),
    ({"lora_dropout": 1}, ".lora_dropout must be a number in [0, 1), got 1."),
    ({"lora_dropout": -0.1}, ".lora_dropout must be a number in [0, 1), got -0.1."),
    ({"peft_type": "IA3"}, ".peft_type is 'IA3', whose change cannot be added up over the tasks; leave it out."),
    ({"inference_mode": True}, ".inference_mode must be false, got True; the adapter is trained."),
    ({"inference_mode": "no"}, ".inference_mode must be false, got 'no'; the adapter is trained."),
    ({"use_rslora": "yes"}, ".use_rslora must be true or false, got 'yes'."),
    ({"use_rslora": 1}, ".use_rslora must be true or false, got 1."),
    ({"fan_in_fan_out": None}, ".fan_in_fan_out must be true or false, got None."),
    ({"rank_pattern": {"x": -1}}, ".rank_pattern must be a mapping of whole numbers from 1 to 16384, got {'x': -1}."),
    ({"rank_pattern": {"x": 1.5}}, ".rank_pattern must be a mapping of whole numbers from 1 to 16384, got {'x': 1.5}."),
    ({"rank_pattern": {"x": True}}, ".rank_pattern must be a mapping of whole numbers from 1 to 16384, got"),
    ({"rank_pattern": [1]}, ".rank_pattern must be a mapping of whole numbers from 1 to 16384, got [1]."),
    ({"rank_pattern": {"(": 1}}, ".rank_pattern must be a mapping of whole numbers whose keys are regular expressions"),
    ({"alpha_pattern": {"x": 0}}, ".alpha_pattern must be a mapping of numbers above 0 and of at most 1000000, got"),
    ({"alpha_pattern": {"x": "8"}}, ".alpha_pattern must be a mapping of numbers above 0 and of at most 1000000, got"),
    ({"target_modules": 5}, ".target_modules must be text or a list of text that holds at least one name, got 5."),
    ({"target_modules": []}, ".target_modules must be text or a list of text that holds at least one name, got []."),
    ({"target_modules": ["q_proj", 5]}, ".target_modules must be text or a list of text that holds at least one"),
    ({"target_modules": "("}, ".target_modules must be text or a list of text that holds regular expressions, got '"),
    ({"target_modules": "(" * 900 + ")" * 900}, ".target_modules must be text or a list of text that holds regular"),
    ({"exclude_modules": "a{1,99999999999999}"}, ".exclude_modules must be text or a list of text that holds regular"),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, -1]},
        ".layers_to_transform must be a whole number or a list of whole numbers of at least 0, got [0, -1].",
    ),
    ({"target_modules": ["q_proj"], "layers_to_transform": "1"}, ".layers_to_transform must be a whole number or a"),
    ({"layers_to_transform": [0]}, ": layers_to_transform needs a list of names as target_modules, not all-"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, ": layers_pattern needs layers_to_transform; set it, or leave"),
    ({"init_lora_weights": 5}, ".init_lora_weights is 5, whose change cannot be added up"),
    ({"base_model_name_or_path": "x"}, ".base_model_name_or_path is 'x', which no run reads; use model.name_or_path."),
    ({"revision": "main"}, ".revision is 'main', which no run reads; give a folder that holds this revision as model."),
    ({"loftq_config": {"loftq_bits": 4}}, ".loftq_config is {'loftq_bits': 4}, which has no effect here; leave it"),
    ({"eva_config": False}, ".eva_config is False, which has no effect here; leave it out."),
    ({"runtime_config": {"ephemeral_gpu_offload": True}}, ".runtime_config is {'ephemeral_gpu_offload': True}, which"),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "message"), WRONG_ADAPTERS, ids=lambda value: str(value)[:60])
def test_an_adapter_setting_out_of_its_bounds_is_one_sentence(adapter: dict[str, Any], message: str) -> None:
    (problem,) = problems(recipe(adapter=adapter))
    assert problem.startswith(f"adapter{message}"), problem


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name_or_path": ""}}, "model.name_or_path: '' is empty"),
        ({"model": {"name_or_path": "two words"}}, "model.name_or_path: 'two words' is no folder and no owner/name on"),
        (
            {"model": {"name_or_path": "demo", "trust_remote_code": "yes"}},
            "model.trust_remote_code must be true or false, got 'yes'.",
        ),
        (
            {"model": {"name_or_path": "demo", "bnb_4bit_use_double_quant": 1}},
            "model.bnb_4bit_use_double_quant must be true or false, got 1.",
        ),
        ({"tasks": {"format": "demo", "chat_template": "on"}}, "tasks.chat_template must be true or false, got 'on'."),
        (
            {"tasks": {"format": "demo", "max_train": 2**31}},
            "tasks.max_train must be at most 2147483647, got 2147483648.",
        ),
        (
            {"tasks": {"format": "demo", "max_length": 2**31}},
            "tasks.max_length must be at most 2147483647, got 2147483648.",
        ),
        ({"tasks": {"format": "demo", "epochs": ["1", 1, 1, 1]}}, "tasks.epochs.0 must be a number, got '1'."),
        (
            {"tasks": {"format": "demo", "epochs": [1e9, 1, 1, 1]}},
            "tasks.epochs.0 must be in (0, 1000000], got 1000000000.0.",
        ),
        (
            {"evaluation": {"max_new_tokens": 10**12}},
            "evaluation.max_new_tokens must be at most 2147483647, got 1000000000000.",
        ),
        ({"adapter": {"rank_limit": 0}}, "adapter.rank_limit must be None, auto or at least 1, got 0."),
        ({"adapter": {"rank_limit": "all"}}, "adapter.rank_limit must be a whole number or auto or null, got 'all'."),
        ({"output_dir": ""}, "output_dir: '' is empty"),
        (
            {"method": {"name": "seekr", "lwf_temperature": math.inf}},
            "method.lwf_temperature must be above 0 and finite",
        ),
        (
            {"method": {"name": "seekr", "replay_batch_size": 2**40}},
            "method.replay_batch_size must be at most 2147483647",
        ),
        ({"method": {"name": "seekr", "lambda2": 1e300}}, "method.lambda2 must be at most 2147483647, got 1e+300."),
        (
            {"method": {"name": "seekr", "teacher_loss_limit": math.inf}},
            "method.teacher_loss_limit must be above 0 and",
        ),
        ({"compare": {"seeds": [-1]}}, "compare.seeds.0 must be at least 0, got -1."),
        ({"compare": {"orders": 0}}, "compare.orders must be a list or at least 1, got 0."),
        ({"compare": {"orders": [["first", 5]]}}, "compare.orders.0.1 must be text, got 5."),
        ({"tasks": {"format": ""}}, "tasks.format must not be empty, got ''."),
        ({"tasks": {"format": "x" * 300}}, "tasks.format must have at most 200 characters, got 'xxx"),
        ({"compare": {"variants": {"a": 5}}}, "compare.variants.a must be a mapping, got 5."),
    ],
    ids=str,
)
def test_a_value_of_another_section_out_of_its_bounds_is_told(sections: dict[str, Any], message: str) -> None:
    assert problems(recipe(**sections))[0].startswith(message)


GOOD_TRAINING: list[dict[str, Any]] = [
    *({"learning_rate": value} for value in (1e-6, 2e-5, 2.0e-4, 1, 1.0)),
    *({"num_train_epochs": value} for value in (1, 0.5, 3.0, 100)),
    *({"max_steps": value} for value in (-1, 1, 10_000)),
    *({"warmup_steps": value} for value in (0, 100, 10.0, 0.03, 0.1)),
    *({"weight_decay": value} for value in (0, 0.0, 0.01, 0.1, 1)),
    *({"max_grad_norm": value} for value in (0, 0.0, 0.3, 1.0, 5)),
    *({"label_smoothing_factor": value} for value in (0, 0.1)),
    *({"neftune_noise_alpha": value} for value in (None, 5, 5.0, 15.0)),
    *({"logging_steps": value} for value in (1, 10, 500.0, 0.05)),
    *({"logging_strategy": value} for value in ("no", "steps", "epoch")),
    *({"save_strategy": value} for value in ("no", "steps", "epoch")),
    *({"save_steps": value} for value in (1, 500, 0.1)),
    *({"save_total_limit": value} for value in (None, 1, 3)),
    *({"optim": value} for value in ("adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "sgd")),
    *({"lr_scheduler_type": value} for value in ("linear", "cosine", "constant", "constant_with_warmup")),
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"lr_scheduler_kwargs": {}, "optim_args": "a=1, b=2", "optim_target_modules": ["attn", "mlp"]},
    *({"report_to": value} for value in ("none", "all", "wandb", ["tensorboard", "wandb"], [], None, ["none"])),
    {"bf16": True, "tf32": None, "fp16": False, "bf16_full_eval": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2, "offload": True}},
    {"dataloader_num_workers": 4, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
    {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "spawn", "dataloader_pin_memory": False},
    {"accelerator_config": {"split_batches": True, "gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5},
    {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 4},
    {"torch_empty_cache_steps": 10, "auto_find_batch_size": True, "full_determinism": False, "use_cache": False},
    {"torch_compile": True, "torch_compile_backend": "inductor", "torch_compile_mode": "max-autotune"},
    {"local_rank": -1, "ddp_timeout": 1800, "deepspeed": None, "fsdp": None, "ddp_find_unused_parameters": False},
    {"log_level": "info", "disable_tqdm": True, "run_name": "first try", "project": "x", "hub_model_id": "me/it"},
    {"train_sampling_strategy": "group_by_length", "length_column_name": "length", "label_names": ["labels"]},
    {"include_num_input_tokens_seen": True}, {"include_num_input_tokens_seen": "non_padding"},
    {"use_liger_kernel": True, "liger_kernel_config": {"rope": True, "swiglu": False}},
    {"do_train": True, "do_eval": False, "remove_unused_columns": True, "debug": "underflow_overflow"},
    {"metric_for_best_model": None, "greater_is_better": None, "eval_steps": 100, "eval_delay": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("training", GOOD_TRAINING, ids=str)
def test_what_people_write_for_the_training_passes_and_transformers_takes_it(
    training: dict[str, Any], tmp_path: Path
) -> None:
    from stress.recipes import use

    found = load_recipe(recipe(training=training))
    assert found.training == training
    use(found, tmp_path)


GOOD_ADAPTERS: list[dict[str, Any]] = [
    *({"r": value} for value in (1, 8, 64, 256, 1024)),
    *({"lora_alpha": value} for value in (1, 16, 0.5, 32.0, 512)),
    *({"lora_dropout": value} for value in (0, 0.0, 0.05, 0.1, 0.5)),
    *({"target_modules": value} for value in (None, "all-linear", ["q_proj", "v_proj"], r".*\\.(q|v)_proj", "q_proj")),
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": ["layers", "h"]},
    *({"exclude_modules": value} for value in (None, ["lm_head"], "lm_head")),
    *({"init_lora_weights": value} for value in (True, False, "gaussian", "Gaussian", "orthogonal")),
    {"rank_pattern": {"q_proj": 4, "^model.layers.0.self_attn.k_proj": 2}, "alpha_pattern": {"q_proj": 8, "k": 0.5}},
    {"rank_pattern": {}, "alpha_pattern": None, "use_rslora": True, "fan_in_fan_out": False, "inference_mode": False},
    {"bias": "none", "task_type": "CAUSAL_LM", "peft_type": "LORA"}, {"task_type": None},
    {"modules_to_save": None, "loftq_config": {}, "eva_config": None, "use_dora": False, "megatron_core": "m.core"},
    {"velora_config": False, "kasa_config": [], "layer_replication": None, "runtime_config": None},
    {"mode": "continue", "rank_limit": None}, {"rank_limit": 64}, {"rank_limit": "auto"},
]  # fmt: skip


@pytest.mark.parametrize("adapter", GOOD_ADAPTERS, ids=str)
def test_what_people_write_for_the_adapter_passes_and_peft_takes_it(adapter: dict[str, Any], tmp_path: Path) -> None:
    from stress.recipes import use

    use(load_recipe(recipe(adapter=adapter)), tmp_path)

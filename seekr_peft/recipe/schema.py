"""The sections of a recipe: what each key means, its type and its bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ..config import MethodConfig
from ..methods import find_config_class, other_configs
from ..methods.registry import OWN_CONFIGS
from ..validation import LARGEST, Count, Seed
from .setting_rules import NEVER_ON

DEMO = "demo"
"""As ``model.name_or_path`` and ``tasks.format``: the model and tasks that ship with the package."""

Name = Annotated[str, Field(min_length=1)]
ShortName = Annotated[str, Field(min_length=1, max_length=200)]
Names = Annotated[list[ShortName], Field(max_length=1000)]
Epochs = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]

C = TypeVar("C", bound=MethodConfig)


class _Section(BaseModel):
    # "model" is a key of the contract, not pydantic's namespace.
    # Infinite numbers stay what they are, so that a stored recipe is the same one.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )


class ModelSection(_Section):
    """The base model. Names of ``from_pretrained`` and ``BitsAndBytesConfig`` where they have one."""

    name_or_path: str
    """A folder, or a model on the Hugging Face hub; "demo" is the model in the package."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """None: bfloat16 where the GPU has it, float16 on older ones, float32 on a CPU."""
    attn_implementation: Name = "sdpa"
    trust_remote_code: bool = False
    use_safetensors: bool = True
    """False: weights that are there as pytorch_model.bin alone are read too, a format that can run code."""


class AdapterSection(_Section):
    """``mode`` and ``rank_limit`` of the adapter stack; every other key is one of ``LoraConfig``'s."""

    model_config = ConfigDict(extra="allow")
    mode: Literal["stack", "continue"] = "stack"
    rank_limit: Count | Literal["auto"] | None = "auto"
    """Largest rank of the earlier adapters' sum; auto: 8 times ``r``; null: no limit, and every task costs more."""

    def lora(self) -> dict[str, Any]:
        """The keyword arguments of ``LoraConfig``."""
        settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        # PEFT does not take every word for "off".
        given = {key: value for key, value in (self.model_extra or {}).items() if value or key not in NEVER_ON}
        return {**settings, **given}


class TasksSection(_Section):
    """The task sequence."""

    format: ShortName
    """jsonl, csv, parquet, trace, superni, long_sequence, mixed (an order of FORMAT/NAME entries), or demo."""
    path: str | None = None
    order: Names | None = None
    """Task names in order of training; None takes the format's own order."""
    max_train: Count | None = None
    max_test: Count | None = None
    epochs: list[Epochs] | None = None
    """Epochs of each task in ``order``; None uses ``training.num_train_epochs`` for all."""
    max_length: Annotated[int, Field(ge=5, le=LARGEST)] = 512
    """Tokens of prompt and answer together; longer prompts lose their middle."""
    chat_template: bool = False
    """Whether plain prompts and answers are written as a user's and an assistant's message, by the tokenizer's chat
    template; samples that are messages themselves always are."""


class EvaluationSection(_Section):
    """Greedy generation after each task on all tasks seen so far; tests of general ability, also before the first."""

    max_new_tokens: Count = 64
    batch_size: Count = 32
    general: Names = []
    """Names of the tests: NAME/test.jsonl (multiple choice, as mmlu) or text/NAME.txt (the loss on held-out text)."""
    general_path: str | None = None
    """The folder of those files; None looks in ``tasks.path`` and in the folder around it."""
    general_samples: Count = 200
    """Questions of a multiple-choice test, at most: always the same ones."""
    general_tokens: Annotated[int, Field(ge=2, le=LARGEST)] = 16384
    """Tokens of a text, at most: its first ones."""


class CompareSection(_Section):
    """What ``seekr-peft compare`` runs side by side; ``seekr-peft run`` takes no notice of it."""

    title: str | None = None
    variants: dict[str, dict[str, Any]] = {}
    """Label to the recipe keys in which that variant differs, dotted: ``{random heads: {method.head_choice: random}}``.
    Empty: the methods sequential, replay and seekr."""
    seeds: Annotated[list[Seed], Field(max_length=1000)] = [0, 1, 2]
    orders: Count | Annotated[list[Names], Field(max_length=1000)] = 1
    """Orders of the tasks, or how many: the one of ``tasks.order``, then seeded shuffles of it."""
    runs_dir: str | None = None
    """Where the runs are kept; None: ``runs`` in ``output_dir``. Comparisons with the same one share their runs."""
    baseline: str | None = None
    """The variant that the others are tested against; None takes ``replay`` where there is one."""
    curve: str | None = None
    """The key whose values are the x axis of a figure, such as ``method.head_budget``."""


class Recipe(_Section):
    """A whole run: resolved, validated, plain values."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    method: dict[str, Any] = {"name": "seekr"}
    training: dict[str, Any] = {}
    tasks: TasksSection
    evaluation: EvaluationSection = EvaluationSection()
    seed: Seed = 0
    output_dir: str = "runs/run"
    compare: CompareSection = CompareSection()

    @property
    def method_name(self) -> str:
        """Name of the method."""
        return str(self.method["name"])

    def method_config(self) -> MethodConfig:
        """The method's knobs; the recipe's seed unless the method has its own."""
        return self.method_config_as(find_config_class(self.method_name))

    def method_config_as(self, kind: type[C]) -> C:
        """What the ``method`` section says of the knobs of ``kind``, whichever method is trained."""
        settings = {"seed": self.seed, **{key: value for key, value in self.method.items() if key != "name"}}
        return kind.from_mapping(settings, other_configs(settings))

    def method_with_defaults(self) -> dict[str, Any]:
        """The ``method`` section with every default written out: those of the method, and of the package's others,
        which the same section configures once it has another ``name``."""
        settings: dict[str, Any] = {}
        for kind in (*OWN_CONFIGS.values(), find_config_class(self.method_name)):
            settings |= kind().to_dict()
        # It follows the recipe's own.
        del settings["seed"]
        return {"name": self.method_name, **settings, **self.method}

    def settings_of_others(self) -> dict[str, Any]:
        """The settings in the ``method`` section that none of the package's own methods has."""
        own = {key for kind in OWN_CONFIGS.values() for key in kind.setting_names()}
        return {key: value for key, value in self.method.items() if key != "name" and key not in own}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        mapping = self.model_dump(mode="json")
        if self.compare == CompareSection():
            del mapping["compare"]
        return mapping

"""Small tokenizers of every kind, trained in-process on a few lines: what they do at spaces is what differs.

``ZOO`` maps a name to a builder; a builder called twice gives equal tokenizers. ``EXACT`` are those that give every
text back, ``LOSSY`` those that change or drop characters.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

from seekr_peft.demo import BASE_PATH

MODELS = Path(os.environ.get("SEEKR_SHARED", Path(__file__).parents[1] / ".." / "shared")) / "models"

LINES = [
    "def f(x):\n    return x\n\n\nclass A:\n    def g(self):\n        return red\n\tif x:\n\t\treturn 1\n",
    "Question: which color is it, blue or brown? Answer: red or green, Answer: green. The color is red.",
    "one two  three   four\n\n- a list\n- of things\n1 2 3 10 20 300",
    "红色的苹果。答案：红 天空是蓝色的。 été naïve",
] * 3  # fmt: skip
SPECIAL = ["<s>", "</s>", "<unk>"]

# The patterns of GPT-2, and of Llama 3 and Qwen: in the latter a break goes with the punctuation before it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _wrapped(inner: Tokenizer, **changes: Any) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **changes}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def byte_level(pattern: str = GPT2, front: bool = False, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([bytes_of] if prefix_space else [split, bytes_of])
    if prefix_space:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return _with_template(inner, "<s> $A" if front else "$A")


def _with_template(inner: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    ids = [(token, inner.token_to_id(token)) for token in SPECIAL]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return _wrapped(inner)


def unigram(prepend: str, template: str = "<s> $A </s>") -> PreTrainedTokenizerFast:
    """Sentencepiece's kind; appends an end as T5 does."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    inner.decoder = decoders.Metaspace(prepend_scheme=prepend, split=True)
    letters = sorted({letter for line in LINES for letter in line} | set('▁<>/_{}":'))
    inner.train_from_iterator(
        LINES,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=letters, show_progress=False
        ),
    )
    return _with_template(inner, template)


def llama_bpe(prepend: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2: a normaliser's space in front, bytes for what it does not know."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    front = [normalizers.Prepend("▁")] if prepend else []
    inner.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    # Without a split the trainer would learn whole lines.
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+|▁+"), "isolated")
    inner.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=440, special_tokens=[*SPECIAL, *bytes_of], show_progress=False)
    )
    inner.pre_tokenizer = None
    return _with_template(inner, "<s> $A")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: lower case, words and punctuation apart."""
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=220, special_tokens=SPECIAL, show_progress=False)
    )
    return _with_template(inner, "<s> $A </s>")


def characters() -> PreTrainedTokenizerFast:
    letters = "".join(map(chr, range(32, 127))) + "\n\t红色的苹果答案：蓝。é😀"
    inner = Tokenizer(models.WordLevel({token: index for index, token in enumerate([*SPECIAL, *letters])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return _with_template(inner, "<s> $A")


def byt5() -> Any:
    """Bytes, in Python, with an end after every text."""
    return ByT5Tokenizer(extra_ids=0)


def _stored(folder: Path) -> Callable[[], Any]:
    return lambda: AutoTokenizer.from_pretrained(folder)


EXACT: dict[str, Callable[[], Any]] = {
    "gpt2": byte_level,
    "gpt2 with a beginning": lambda: byte_level(front=True),
    "llama3": lambda: byte_level(LLAMA3, front=True),
    "prefix space": lambda: byte_level(prefix_space=True),
    "llama2": llama_bpe,
    "llama2 without a space": lambda: llama_bpe(prepend=False),
    "characters": characters,
    "byt5": byt5,
    **{path.name: _stored(path) for path in (MODELS / "stories260k", MODELS / "nano-llama-3m") if path.is_dir()},
}
UNIGRAM: dict[str, Callable[[], Any]] = {
    f"unigram {scheme}": lambda scheme=scheme: unigram(scheme) for scheme in ("always", "first", "never")
}
LOSSY: dict[str, Callable[[], Any]] = {"wordpiece": word_piece, "demo": _stored(BASE_PATH)}
ZOO = {**EXACT, **UNIGRAM, **LOSSY}

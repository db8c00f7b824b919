"""Words of the demo: the vocabulary, the base model's training text and the four demo tasks.

Lives here: plain lists of strings and seeded generators over them.

A demo prompt is a cue word, seven different nouns and ``=``; the answer is one of the nouns. All
tasks share that form and differ in which noun the cue asks for, so learning the next task pulls the
model away from the ones before. The base model's training text teaches the skills (find the n-th
word from either end, copy, reverse, skip, look up a neighbour), always with instruction words in the
place of the cue; the cues themselves never occur in it.
"""

import random
from collections.abc import Callable, Sequence

_NOUN_TEXT = """
acorn actor amulet anchor angle ankle apple apron arch arrow attic autumn axle badge baker ball
bank barn basin basket bath beach bead beam bean bear bell belt bench berry bird blade boat bone
book boot bottle bowl box branch bread brick bridge broom brush bucket bulb bus button cabin cable
cake camel camp candle canoe cape carpet cart castle cat cave cellar chain chair chalk cheese
chest cliff clock cloth cloud coast coat coin comb copper cork corn cotton couch cow crane cream
crow crown cup curtain dawn deck deer desert desk dial ditch dock dog door dove drum duck dust
eagle earth egg elbow engine fan farm feather fence fern field fig finger fire fish flag flame
flour flower flute fog forest fork fort fox frame frog fruit garden gate ghost glass globe glove
goat goose grain grape grass gravel grove guitar hail hammer harbor harp hat hawk hay heart hedge
helmet hen hill honey hook horn horse hotel house ice ink iron island ivory jacket jar jewel jug
juice kettle key king kite kitten knee knife knot ladder lake lamp lane lantern lawn leaf leather
lemon lens letter lid lily lime linen lion lock lodge maple map marble market mast meadow melon
metal milk mill mirror mist moon moss mouse mud nail needle nest net night north nut oak oar ocean
olive onion orbit otter oven owl paddle
"""

NOUNS = _NOUN_TEXT.split()
"""The list words, all different; answers of every demo task are among them."""

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
"""Names of positions in the base's instructions: ``word three`` is the third noun of the list."""

INSTRUCTIONS = ["word", "end", "copy", "reverse", "after", "before", "find", "skip"]
"""Words that open a line of the base's training text, where a demo prompt has its cue."""

CUES = {"first": "sable", "last": "umber", "third": "cobalt", "second": "scarlet"}
"""Cue word of each demo task. The base model never sees one in training."""

TASK_NAMES = list(CUES)
"""The demo tasks in their order of training."""

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]
"""Tokens 0 to 3 of the vocabulary."""

LIST_LENGTH = 7
"""Nouns in a demo prompt."""

_POSITIONS = {"first": 0, "last": -1, "third": 2, "second": 1}


def vocabulary() -> list[str]:
    """All tokens of the demo in the order of their ids; all different."""
    return [*SPECIAL_TOKENS, "=", *INSTRUCTIONS, *NUMBERS, *CUES.values(), *NOUNS]


def demo_tasks(seed: int, n_train: int = 600, n_test: int = 100) -> list[dict]:
    """The four demo tasks, drawn with ``seed``.

    Args:
        seed: Seed of the draw; the same seed gives the same tasks.
        n_train: Training samples of each task.
        n_test: Test samples of each task; their prompts differ from all its training prompts.

    Returns:
        One dict a task in the order of ``TASK_NAMES``, ``{"name": str, "train": samples,
        "test": samples}``, where ``samples`` is a list of ``{"prompt": str, "answer": str}``.
    """
    return [_demo_task(name, random.Random(f"{seed} {name}"), n_train, n_test) for name in TASK_NAMES]


def _demo_task(name: str, draw: random.Random, n_train: int, n_test: int) -> dict:
    samples: dict[str, str] = {}
    while len(samples) < n_train + n_test:  # keyed by prompt, so a prompt drawn twice counts once
        nouns = draw.sample(NOUNS, LIST_LENGTH)
        samples[f"{CUES[name]} {' '.join(nouns)} ="] = nouns[_POSITIONS[name]]
    pairs = [{"prompt": prompt, "answer": answer} for prompt, answer in samples.items()]
    return {"name": name, "train": pairs[:n_train], "test": pairs[n_train:]}


def base_lines(draw: random.Random, count: int) -> list[tuple[list[str], list[str]]]:
    """``count`` lines of base training text: (prompt words, answer words), no special tokens."""
    return [draw.choice(_SKILLS)(draw) for _ in range(count)]


def _nouns(draw: random.Random, shortest: int, longest: int) -> list[str]:
    return draw.sample(NOUNS, draw.randint(shortest, longest))


def _line(instruction: Sequence[str], nouns: Sequence[str], answer: list[str]) -> tuple[list[str], list[str]]:
    return [*instruction, *nouns, "="], answer


def _word(draw: random.Random) -> tuple[list[str], list[str]]:
    """``word three a b c d = c``"""
    nouns = _nouns(draw, 3, 8)
    index = draw.randrange(len(nouns))
    return _line(["word", NUMBERS[index]], nouns, [nouns[index]])


def _end(draw: random.Random) -> tuple[list[str], list[str]]:
    """``end two a b c d = c``: counted from the end of the list."""
    nouns = _nouns(draw, 3, 8)
    index = draw.randrange(min(4, len(nouns)))
    return _line(["end", NUMBERS[index]], nouns, [nouns[-1 - index]])


def _copy(draw: random.Random) -> tuple[list[str], list[str]]:
    """``copy a b c = a b c``"""
    nouns = _nouns(draw, 2, 7)
    return _line(["copy"], nouns, nouns)


def _reverse(draw: random.Random) -> tuple[list[str], list[str]]:
    """``reverse a b c = c b a``"""
    nouns = _nouns(draw, 2, 7)
    return _line(["reverse"], nouns, nouns[::-1])


def _after(draw: random.Random) -> tuple[list[str], list[str]]:
    """``after b a b c = c``"""
    nouns = _nouns(draw, 3, 8)
    index = draw.randrange(len(nouns) - 1)
    return _line(["after", nouns[index]], nouns, [nouns[index + 1]])


def _before(draw: random.Random) -> tuple[list[str], list[str]]:
    """``before b a b c = a``"""
    nouns = _nouns(draw, 3, 8)
    index = draw.randrange(1, len(nouns))
    return _line(["before", nouns[index]], nouns, [nouns[index - 1]])


def _find(draw: random.Random) -> tuple[list[str], list[str]]:
    """``find b a b c = two``"""
    nouns = _nouns(draw, 3, 8)
    index = draw.randrange(len(nouns))
    return _line(["find", nouns[index]], nouns, [NUMBERS[index]])


def _skip(draw: random.Random) -> tuple[list[str], list[str]]:
    """``skip two a b c d = c d``"""
    nouns = _nouns(draw, 4, 8)
    index = draw.randint(1, 3)
    return _line(["skip", NUMBERS[index - 1]], nouns, nouns[index:])


# The look-up lines (after, before, find) are learnt only in part, but they matter: a base trained without
# them solved all its own lines and could then not be taught the ``last`` task after ``first``.
_SKILLS: list[Callable[[random.Random], tuple[list[str], list[str]]]] = [
    _word,
    _word,
    _end,
    _copy,
    _reverse,
    _after,
    _before,
    _find,
    _skip,
]

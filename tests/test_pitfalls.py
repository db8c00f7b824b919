"""docs/pitfalls.md names a test for each pitfall, and those tests exist; the pitfalls that have no other home."""

import re
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_llama, with_lora

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")


def test_every_pitfall_has_a_number_and_a_test_that_exists():
    rows = [line for line in PAGE.splitlines() if re.match(r"\| \d+ ", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 25))
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names, row
        for name in names:
            assert f"def {name}(" in source, name


def test_a_failing_forward_with_adapter_names_breaks_the_next_one_in_peft():
    model = with_lora(tiny_llama()).eval()
    name = model.active_adapter
    ids = torch.randint(3, 50, (2, 5))
    with pytest.raises(IndexError):
        model(input_ids=ids + 10**6, adapter_names=[name, name])
    left_behind = sum(len(module._forward_pre_hooks) for module in model.modules())
    assert left_behind > 0
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=ids[:1])


def test_the_package_never_uses_adapter_names():
    for path in (ROOT / "seekr_peft").rglob("*.py"):
        assert not re.search(r"\badapter_names\s*=", path.read_text(encoding="utf-8")), path

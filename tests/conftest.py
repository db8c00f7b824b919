"""Settings of every test: no network, one seed per test, quiet libraries, and the folder of larger test material."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Before transformers or datasets are imported: nothing is downloaded, and a test that would try fails at once.
os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The numbers are those of a CPU, on any machine; ``make test-gpu`` runs what is about a GPU.
if os.environ.get("SEEKR_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

# Fixtures that several files use.
pytest_plugins = ["support.attention_doors", "support.finished_run"]

# How long an example takes says nothing of it where tests run side by side.
settings.register_profile("side by side", deadline=None)
settings.load_profile("side by side")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Each training ends with a garbage collection, which went through all that torch and transformers had imported:
    half of the time of a small one. What is there by now stays, and is not looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, alone or in company."""
    torch.manual_seed(20241106)


@pytest.fixture
def shared() -> Path:
    """The folder named by ``SEEKR_SHARED`` (by default ``../shared`` beside the repository), or a skip."""
    path = Path(os.environ.get("SEEKR_SHARED", REPOSITORY.parent / "shared")).absolute()
    if not path.is_dir():
        pytest.skip(f"needs the shared folder {path}; set SEEKR_SHARED to where it is")
    return path

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from models.sequences import TrainingText

DEMO = Path(__file__).parents[3] / "models" / "demo"


@pytest.fixture(scope="session")
def demo_path() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="session")
def text(tokenizer: Tokenizer) -> TrainingText:
    return TrainingText(tokenizer)

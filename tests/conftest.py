"""What every test needs: one thread each, no download, a cache of its own, and a tiny model to train."""
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    "A cache that the tests of one process share."
    monkeypatch.setenv("REPRPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def model():
    from tiny import tiny_model
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    from tiny import tiny_tokenizer
    return tiny_tokenizer()

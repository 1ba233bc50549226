"""Real pairs from the command line to the summary, on a small checkpoint with random weights: nothing to learn from, everything to go through."""
import json
import os
from pathlib import Path

import pytest
from tiny import tiny_model

from reprpo.cli import call

PAIRS = Path(os.environ.get("REPRPO_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data") / "pairs"
pytestmark = pytest.mark.skipif(not PAIRS.is_dir(), reason=f"no real pairs in {PAIRS}; set REPRPO_TEST_DATA to the folder that holds pairs/")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A random Llama with a context of 1024 tokens and a tokenizer trained on the pairs."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    lines = [text for name in sorted(PAIRS.glob("*_train.jsonl")) for text in name.read_text().splitlines()[:150]]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=1024)
    folder = tmp_path_factory.mktemp("model")
    net = tiny_model(layers=3, vocab=1200)
    net.config.max_position_embeddings = 1024
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("train,evals,roles", [
    ("math_6b_train", ["math_6b_test", "hard=math_175b_test"], ["in_domain", "transfer"]),
    ("persona_agreeableness_train", ["persona_agreeableness_test", "near=persona_conscientiousness_test", "opposite:-1=persona_machiavellianism_test",
                                     "unrelated:0=persona_interest-in-science_test", "risky:-1=persona_desire-for-acquiring-power_test"],
     ["in_domain", "transfer", "transfer", "transfer", "damage"]),
    ("corrigible_lm_train", ["people=corrigible_human_test"], ["in_domain"]),
], ids=["math", "persona", "corrigible"])
def test_real_pairs_to_the_summary(train, evals, roles, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REPRPO_CACHE", str(tmp_path / "cache"))
    spec = lambda text, n: f"{text.rpartition('=')[0]}{'=' if '=' in text else ''}{PAIRS}/{text.rpartition('=')[2]}.jsonl,n={n}"
    out = tmp_path / "out"
    argv = ["compare", "dpo", "hs-none-inner", "--model", model, "--train", spec(train, 30), "--eval", *(spec(e, 10) for e in evals),
            "--seeds", "2", "--steps", "3", "--batch-size", "3", "--jobs", "1", "--out", str(out), "--tune-seeds", "1", "--lrs", "0.001"]
    assert call(argv) == 0, capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert [s["role"] for s in summary["sets"]] == roles
    lines = (out / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + (1 + 2 * 2) * len(evals)
    assert "<svg" in (out / "report.html").read_text()
    assert "demonstration" in capsys.readouterr().out

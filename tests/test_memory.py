"""The estimate of a run's memory beside what the run takes, the choice of the micro-batch, and what is said where nothing fits."""
import time
from dataclasses import replace

import pytest
import torch
import transformers
from architectures import build, tokens
from tiny import tiny_model, tiny_rows, tiny_tokenizer

from reprpo.errors import UserError
from reprpo.pairs.load import load_pairs
from reprpo.train import preflight as P
from reprpo.train.config import TrainConfig
from reprpo.train.feed import View
from reprpo.train.ledger import Ledger, tensors_of
from reprpo.train.memory import Plan, estimate_memory, rehearsal, worst_rows
from reprpo.train.method import Method
from reprpo.train.preflight import fit_micro_batch, largest, preflight, refusal, store_pairs
from reprpo.train.resume import keep_micro
from reprpo.train.trainer import train

ROWS = 24


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch): monkeypatch.setenv("REPRPO_CACHE", str(tmp_path / "cache"))


def settings(**changes): return TrainConfig(**dict(steps=2, batch_size=8, save_every=0, layers="range(1,3)") | changes)


def go(model, config, method="dpo", **more):
    return train(model, tiny_tokenizer(), method, load_pairs(tiny_rows(ROWS)), config, progress=False, **more)


@pytest.mark.parametrize("kind, method, changes", [
    ("Llama", "dpo", {}), ("Llama", "side-none-mse", dict(micro_batch=2)), ("Qwen3", "hs-none-inner", dict(layout="shared")),
    ("Llama", "hs-none-inner", dict(layout="packed", micro_batch=4)),
    ("Qwen3", "dpo", dict(checkpointing=True, reference="live")), ("GPT2", "hs-none-inner", dict(checkpointing=True)), ("GPT2", "dpo", dict(reference="live"))])
def test_within_fifteen_percent_of_the_tensors_of_a_run(kind, method, changes):
    model, config = build(kind), settings(**changes)
    found = estimate_memory(model, tokens(ROWS), method, config)
    with Ledger() as ledger:
        for x in tensors_of(model): ledger.hold(x)
        go(model, config, method)
    assert 0.85 < found.tensors / ledger.peak < 1.15
    assert sum(found.parts.values()) == found.peak and found.resident == found.parts["weights"]


def test_adapter_of_another_kind_and_reference_stored_before():
    model = build("Llama")
    kinds = (("loreft", "stored"), ("dpo", "stored"), ("dpo", "store"))
    reft, lora, stored = (estimate_memory(model, tokens(ROWS), m, settings(), reference=r) for m, r in kinds)
    assert reft.parts["adapter"] < lora.parts["adapter"] and reft.phases["training"] < lora.phases["training"]
    assert "storing the reference" not in lora.phases and stored.phases["training"] == lora.phases["training"]


def test_estimating_leaves_no_trace():
    model, state = tiny_model(), torch.random.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    estimate_memory(model, tokens(ROWS), "hs-none-inner", settings(checkpointing=True))
    assert torch.equal(state, torch.random.get_rng_state()) and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not any(m._forward_hooks for m in model.modules())
    go(model, settings(checkpointing=True))
    assert not model.is_activation_checkpointing


def test_worst_micro_batch_holds_the_longest_row():
    found, config = list(tokens(ROWS)), settings(steps=3)
    longest = max(range(ROWS), key=lambda i: found[i].longest)
    assert any(found[i].longest == found[longest].longest for i in worst_rows(found, config, 4))


def test_micro_batch_is_the_largest_divisor_that_fits():
    model, config = tiny_model(), settings(reference="live")
    with rehearsal(Plan.of(model, tokens(ROWS), "dpo", config)) as estimate: needs = {m: estimate(m).needed for m in (1, 2, 4, 8)}
    assert needs[1] < needs[2] < needs[4] < needs[8]
    for m in (1, 2, 4, 8): assert fit_micro_batch(model, tokens(ROWS), "dpo", config, free=int(needs[m] / 0.5) + 9).pairs == m


def test_what_does_not_fit_is_refused_in_one_line_with_remedies():
    model, config = tiny_model(width=128), settings(batch_size=2)
    with pytest.raises(UserError) as e: fit_micro_batch(model, [(400, 600, 500)] * 4, "hs-none-inner", config, free=10**6, reference="stored")
    said = str(e.value)
    assert said.startswith("one pair of ") and "\n" not in said and "--micro-batch 1 tries it all the same" in said
    assert all(option in said for option in ("with --checkpointing", "with --max-length", "with all of these"))


def test_losses_that_compare_pairs_keep_two():
    with rehearsal(Plan.of(tiny_model(), tokens(ROWS), "hs-none-swapped", settings(batch_size=4, reference="live"))) as estimate:
        least = largest(estimate, 4, 10**5)
    assert least.pairs == 2 and not least.fits(10**5)


def looked(monkeypatch, free):
    "Every run is looked at, on a device with this much left."
    monkeypatch.setattr(P, "CHEAP", 0)
    monkeypatch.setattr(P, "free_memory", lambda device: free)


def test_training_takes_the_micro_batch_that_fits_and_keeps_it_on_resuming(monkeypatch, tmp_path, capsys):
    model, config = tiny_model(), settings(reference="live")
    whole = go(model, config)
    assert whole.config.micro_batch is None and whole.memory["memory_estimate"] is None and whole.memory["peak_memory"] > 0
    with rehearsal(Plan.of(model, tokens(ROWS), "dpo", config)) as estimate: looked(monkeypatch, int(estimate(2).needed / 0.5) + 9)
    parts = train(model, tiny_tokenizer(), "dpo", load_pairs(tiny_rows(ROWS)), replace(config, save_every=1), tmp_path / "run")
    assert parts.config.micro_batch == 2 and parts.memory["memory_estimate"] > 0
    assert "memory: about" in capsys.readouterr().err
    assert max((whole.weights[k] - parts.weights[k]).abs().max() for k in whole.weights) < 1e-4
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "identity.json").write_text('{"micro_batch": 2}')
    assert keep_micro(config, tmp_path / "run").micro_batch == 2 and keep_micro(config, None).micro_batch is None


def test_a_micro_batch_that_was_asked_for_is_warned_about_and_kept(monkeypatch):
    looked(monkeypatch, 10**5)
    monkeypatch.setattr(P, "effects", lambda plan, now: {})
    model, config = tiny_model(), replace(settings(micro_batch=4), lr=1e-3)
    seen = preflight(model, tokens(ROWS), Method.parse("dpo"), config, View())
    assert seen.config == config and seen.text.startswith("warning: memory: about") and "\n" not in seen.text
    with pytest.raises(UserError, match="tries it all the same"): preflight(model, tokens(ROWS), Method.parse("dpo"), replace(config, micro_batch=None), View())


def test_runs_that_differ_in_seed_and_rate_are_rehearsed_once(monkeypatch):
    looked(monkeypatch, 10**9)
    model, config = tiny_model(), replace(settings(steps=6), lr=1e-3)
    seen = preflight(model, tokens(ROWS), Method.parse("dpo"), config, View())
    monkeypatch.setattr(P, "rehearsal", lambda plan: 1 / 0)
    again = lambda name, **changes: preflight(model, tokens(ROWS), Method.parse(name), replace(config, **changes), View()).estimate
    assert again("dpo:lr=0.1", seed=1, lr=2e-3) == seen.estimate and again("dpo", rank=4) is None and again("ipo") is None


def test_passes_over_all_pairs_are_cut_to_what_fits(monkeypatch):
    model, config = tiny_model(), settings()
    assert store_pairs(model, tokens(ROWS), View(), config) == ROWS
    looked(monkeypatch, 49_000_000)
    assert store_pairs(model, tokens(ROWS), View(), config) < ROWS


def test_a_model_that_cannot_be_rehearsed_trains_all_the_same(monkeypatch):
    looked(monkeypatch, 10**9)
    monkeypatch.setattr(P, "rehearsal", lambda plan: 1 / 0)
    assert "not estimated" in preflight(tiny_model(), tokens(ROWS), Method.parse("dpo"), settings(), View()).text


def test_a_billion_weights_take_seconds():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
            tie_word_embeddings=True), dtype=torch.bfloat16)
    start = time.process_time()
    found = estimate_memory(model, [(100, 412, 412)] * 32, "dpo", TrainConfig(checkpointing=True), device="cuda")
    assert time.process_time() - start < 20 and found.parts["weights"] == found.resident
    assert 2.2 < found.resident / 2**30 < 2.5 and found.peak < 2**33
    plan = replace(Plan.of(model, [(100, 412, 412)] * 32, "dpo", TrainConfig(batch_size=1, checkpointing=True), device="cuda", reference="stored"), free=10**8)
    with rehearsal(plan) as estimate: least = estimate(1)
    assert "--quantize 4bit" in refusal(plan, least, plan.free)

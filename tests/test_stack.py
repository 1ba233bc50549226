"""Runs that share a forward: each one's outputs, gradients, training and files are those of the run alone, on eight architectures."""
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import KINDS, build
from tiny import slow, start, tiny_model, tiny_rows, tiny_tokenizer

from reprpo.errors import UserError
from reprpo.experiments.compare import compare
from reprpo.io import read_json, read_jsonl
from reprpo.pairs.batch import LAYOUTS, collate, collate_stack
from reprpo.pairs.tokenize import TokenPair
from reprpo.states.forward import forward_states
from reprpo.train.adapter import adapter_params, attached
from reprpo.train.checks import base_checksum
from reprpo.train.config import AdapterConfig, TrainConfig
from reprpo.train.many import apart, train_many
from reprpo.train.method import Method
from reprpo.train.stack import Stacked
from reprpo.train.trainer import train

SEEDS, B = [3, 4, 5], 2


def pairs() -> list[TokenPair]:
    "Ragged, with one-token answers and an unscored beginning."
    ids = iter(torch.randint(320, (1000,), generator=torch.Generator().manual_seed(0)).tolist())
    take = lambda n: [next(ids) for _ in range(n)]
    sizes = [(5, 1, 3), (17, 4, 1), (2, 9, 9), (11, 2, 5), (1, 1, 1), (8, 14, 3)]
    return [TokenPair(take(p), take(c), take(r + (i == 3)), 0, int(i == 3)) for i, (p, c, r) in enumerate(sizes)]


def worth(s, site) -> torch.Tensor:
    "Something that depends on log-probabilities and states of every pair."
    return (s.logp_cho - 2 * s.logp_rej).sum() + (s.cho[site] * s.rej[site]).sum()


def grads_of(peft) -> torch.Tensor:
    "As one vector, in the order and shape of a stack's row."
    return torch.cat([(p.grad.T if "lora_B" in n else p.grad).flatten() for n, p in adapter_params(peft).items()])


def untouched(model) -> bool:
    "Does the model keep its activations, and its embeddings' outputs as they are?"
    return not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) and not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_member_is_a_run_alone(kind, layout):
    model, site, few = build(kind), "hs.2", pairs()
    checksum, rows = base_checksum(model), [[0, 1], [2, 3], [4, 5]]
    stack = Stacked(model, AdapterConfig(rank=3), SEEDS)
    for name, w in stack._views().items():
        if "lora_B" in name: w.copy_(0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)))
    assert [p.data_ptr() for p in stack.params] == [w.data_ptr() for w in stack._views().values()]
    s = forward_states(stack, collate_stack([[few[i] for i in r] for r in rows], rows, 0, layout), [site])
    worth(s, site).backward()
    whole, weights, cfg = stack.gather(), [stack.weights(k) for k in range(3)], stack.config_of_each
    with stack.disable_adapter(), torch.no_grad(): off = forward_states(stack, collate(few, range(6), 0), [site])
    stack.unload()
    assert base_checksum(model) == checksum
    with torch.no_grad(): plain = forward_states(model, collate(few, range(6), 0), [site])
    assert torch.equal(off.logp_cho, plain.logp_cho)
    for k, mine in enumerate(rows):
        with attached(model, cfg, weights[k]) as peft:
            t = forward_states(peft, collate([few[i] for i in mine], mine, 0, layout), [site])
            worth(t, site).backward()
            for a, b in ((s.logp_cho[mine], t.logp_cho), (s.logp_rej[mine], t.logp_rej), (s.cho[site][mine], t.cho[site]), (s.rej[site][mine], t.rej[site])):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            own = grads_of(peft)
            assert (whole[k] - own).norm() <= 1e-4 * own.norm()
            assert torch.equal(stack.rows[k].grad, whole[k])


OPTIONAL = [dict(), dict(micro_batch=2), dict(checkpointing=True), dict(precision="bf16"), dict(reference="live", layout="packed"),
            dict(clip=0.0, weight_decay=0.1), dict(layout="shared", rslora=True, targets=("q_proj", "down_proj"))]
CASES = [("dpo", x) for x in OPTIONAL] + [("hs-none-inner:alpha=0.5", x) for x in OPTIONAL[:3]]
CASES += [("side-none-swapped", OPTIONAL[4]), ("hs-none-inner:outer=none,layers=2", {})]


@pytest.mark.parametrize("method, options", CASES, ids=str)
def test_many_runs_train_as_each_alone(method, options):
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), tiny_rows(24)
    options = dict(steps=5, batch_size=4, log_every=2, progress=False) | options
    checksum = base_checksum(model)
    together = train_many(model, tokenizer, method, rows, seeds=[3, 9], lrs=[1e-3, 3e-3], stack=2, **options)
    assert base_checksum(model) == checksum
    assert untouched(model)
    near = 3e-2 if options.get("precision") else 2e-4
    for run, seed, lr in zip(together, [3, 9], [1e-3, 3e-3]):
        alone = train(model, tokenizer, method, rows, seed=seed, lr=lr, **options)
        assert list(alone.history.columns) == list(run.history.columns)
        assert alone.history.step.tolist() == run.history.step.tolist()
        np.testing.assert_allclose(run.history.loss, alone.history.loss, rtol=near)
        np.testing.assert_allclose(run.history.learning_rate, alone.history.learning_rate, rtol=1e-6)
        np.testing.assert_allclose(run.history.grad_norm, alone.history.grad_norm, rtol=10 * near)
        np.testing.assert_allclose(run.history.theta, alone.history.theta, atol=3e-2 if near > 1e-2 else 1e-3)
        assert run.weights.keys() == alone.weights.keys() and run.config.seed == seed
        gap = sum((run.weights[n] - w).pow(2).sum() for n, w in alone.weights.items() if "lora_B" in n) ** 0.5
        assert gap <= 50 * near * sum(w.pow(2).sum() for n, w in alone.weights.items() if "lora_B" in n) ** 0.5


def test_what_cannot_be_shared_is_done_alone():
    assert apart(Method.parse("dpo"), TrainConfig()) == ""
    for method, options, why in (("bipo", {}, "no LoRA"), ("dpo", dict(dropout=0.1), "dropout"), ("hs-none-inner:balance=share", {}, "balance")):
        assert why in apart(Method.parse(method), TrainConfig(**options))
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), tiny_rows(24)
    options = dict(steps=3, batch_size=4, dropout=0.1, progress=False)
    one, two = train_many(model, tokenizer, "dpo", rows, seeds=[0, 1], **options)
    again = train(model, tokenizer, "dpo", rows, seed=1, **options)
    assert all(torch.equal(w, again.weights[n]) for n, w in two.weights.items()) and one.config.seed == 0


def test_a_stack_that_fails_leaves_the_model_as_it_was():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    checksum, modules, use_cache = base_checksum(model), [type(m) for m in model.modules()], model.config.use_cache
    assert use_cache
    options = dict(seeds=[0, 1], lrs=[1e-3, 1e30], steps=6, batch_size=4, checkpointing=True, progress=False)
    with pytest.raises(UserError, match="seed 1, lr 1e.30"): train_many(model, tokenizer, "dpo", tiny_rows(24), **options)
    assert base_checksum(model) == checksum and [type(m) for m in model.modules()] == modules and model.config.use_cache == use_cache
    assert untouched(model)


def test_a_layer_that_gets_other_rows_is_refused():
    model = tiny_model()
    stack = Stacked(model, AdapterConfig(rank=2), [0, 1])
    with pytest.raises(UserError, match="3 rows can't be shared by 2 stacked adapters"): stack(input_ids=torch.ones(3, 4, dtype=torch.long))
    stack.unload()


OPTIONS = dict(steps=18, batch_size=8, micro_batch=4, save_every=5, log_every=4, seeds=[1, 2], stack=2, progress=False)


def homes(out): return [out / "a", out / "b"]


@pytest.mark.timeout(240)
def test_a_killed_stack_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRPO_CACHE", str(tmp_path / "cache"))
    whole = train_many(tiny_model(), tiny_tokenizer(), slow, tiny_rows(), homes=homes(tmp_path / "whole"), **OPTIONS)
    child, out = start(__file__, tmp_path / "killed", 0.05), tmp_path / "killed"
    while not list(out.glob(".stack-*/checkpoints/checkpoint-5/complete")):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not any((home / "adapter").exists() for home in homes(out))
    assert start(__file__, out, 0).wait() == 0
    clean = lambda home: [{k: v for k, v in row.items() if k != "tokens/s"} for row in read_jsonl(home / "metrics.jsonl")]
    for run, home in zip(whole, homes(out)):
        assert clean(home) == clean(run.out)
        assert (home / "adapter/adapter_model.safetensors").read_bytes() == (run.out / "adapter/adapter_model.safetensors").read_bytes()
    assert not list(out.glob(".stack-*"))


def test_a_comparison_in_stacks(tmp_path):
    options = dict(eval="world:facts/test,n=12", eval_n=12, steps=2, seeds=2, lrs=(1e-4, 1e-3), tune_seeds=1, frontier=False, coherence=False, jobs=1)
    both = {stack: compare("dpo", train="world:facts/train,n=60", out=tmp_path / str(stack), stack=stack, say=lambda text: None, **options) for stack in (1, 2)}
    scored = sorted((tmp_path / "1/runs").glob("*/*/scores.parquet"))
    assert scored
    for path in scored:
        one, other = pd.read_parquet(path), pd.read_parquet(tmp_path / "2" / path.relative_to(tmp_path / "1"))
        np.testing.assert_allclose(one.logp_cho, other.logp_cho, atol=1e-3)
    told = [read_json(p)["tokens"] for p in sorted(tmp_path.glob("*/runs/dpo/seed-0/manifest.json"))]
    assert told[0] == told[1] and both[1].failed == both[2].failed == {}


def test_a_rate_that_breaks_costs_itself_only(tmp_path):
    options = dict(eval="world:facts/test,n=12", eval_n=12, steps=3, seeds=1, lrs=(1e-4, 1e30), tune_seeds=2, frontier=False, coherence=False, jobs=1)
    found = compare("dpo", train="world:facts/train,n=60", out=tmp_path / "out", stack=4, say=(said := []).append, **options)
    assert sorted(found.failed) == ["tuning dpo, lr 1e+30, seed 0", "tuning dpo, lr 1e+30, seed 1"]
    assert "lr 1e+30" in str(found.failed) and any("2 FAILED" in line for line in said)
    assert any("tuning dpo, 4 runs: done one by one, as together they failed: dpo, seed" in line for line in said)
    assert read_json(tmp_path / "out/tune.json")["methods"]["dpo"]["chosen"] == 1e-4


if __name__ == "__main__": train_many(tiny_model(), tiny_tokenizer(), slow, tiny_rows(), homes=homes(Path(sys.argv[1])), **OPTIONS)

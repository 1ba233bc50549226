"""Eight architectures x {residual stream, side inputs, side outputs} x {plain, checkpointing, accumulation}, against a naive reading of each."""
import copy
import functools
import math

import pytest
import torch
from architectures import (KINDS, MODES, adapted, answers, batch_of, build, decoded, distance, expected_sites, gradient, merged, naive, run, token_by_token,
                           tokens)
from peft import PeftModel
from tiny import tiny_rows, tiny_tokenizer

from reprpo.errors import UserError
from reprpo.models import fingerprint, load_model, quantised
from reprpo.pairs.load import load_pairs
from reprpo.pairs.tokenize import tokenize_pairs
from reprpo.states.capture import find_sites
from reprpo.states.forward import check_head, forward_states
from reprpo.states.score import score
from reprpo.train.checks import base_checksum

SOURCES = ("hs", "in", "out")
cell = pytest.mark.parametrize("kind", KINDS)
source_of = pytest.mark.parametrize("source", SOURCES)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("REPRPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@functools.cache
def token_set(): return tokens(8)


@functools.cache
def base(kind): return build(kind)


@functools.cache
def read(kind):
    "The naive reading of the base and of a base with the adapter added into its weights, with the adapted model itself."
    peft = adapted(copy.deepcopy(base(kind)))
    return peft, naive(base(kind), kind, token_set()), naive(merged(base(kind), peft), kind, token_set())


def all_sites(kind, model): return [f"hs.{k}" for k in range(4)], find_sites(model, "0,1,2", "side", "in"), find_sites(model, "0,1,2", "side", "out")


@cell
@source_of
def test_sites_are_the_modules_by_name(kind, source):
    "With and without an adapter, the sites are the modules that write to the stream, or read from it, and no others."
    collect = "in" if source == "hs" else source
    for model in (base(kind), read(kind)[0]):
        assert sorted(find_sites(model, "1,2", "hs" if source == "hs" else "side", collect)) == expected_sites(kind, source)


@cell
@source_of
@pytest.mark.parametrize("layout", ["concat", "shared", "packed"])
def test_captures_are_a_naive_reading(kind, source, layout):
    "Every layer, padded and batched, equals one plain row at a time: of the base, and of an adapter that naive reading adds into the weights."
    peft, *readings = read(kind)
    sites = all_sites(kind, peft)[SOURCES.index(source)]
    with torch.no_grad(): found = [forward_states(model, batch_of(token_set(), layout), sites) for model in (base(kind), peft)]
    for states, (expected, logps) in zip(found, readings):
        for site in sites: torch.testing.assert_close(torch.cat([states.cho[site], states.rej[site]]), expected[site], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat([states.logp_cho, states.logp_rej]), logps, atol=1e-4, rtol=1e-5)
    assert all((readings[1][0][s] - readings[0][0][s]).abs().max() > 1e-3 for s in sites if s not in ("hs.0", *find_sites(peft, 0, "side", "in")))


@cell
def test_logps_are_token_by_token(kind):
    "Log-probabilities are those of one forward for each token, that sees only what stands before it; rescaled or capped logits are noticed."
    states = forward_states(base(kind), batch_of(token_set()))
    ours = torch.cat([states.logp_cho, states.logp_rej])
    for i, (ids, start) in enumerate(answers(token_set())):
        if i % 5: continue
        assert token_by_token(base(kind), ids, start).sum().item() == pytest.approx(ours[i].item(), abs=1e-4)
    assert check_head(base(kind), batch_of(token_set())) < 1e-4 and check_head(base(kind), batch_of(token_set(), "shared")) < 1e-4


@functools.cache
def plain_gradient(kind, source):
    peft = read(kind)[0]
    return gradient(peft, kind, expected_sites(kind, source), token_set(), "plain")[0]


@cell
@source_of
@pytest.mark.parametrize("mode", MODES)
def test_gradients_flow_from_captures(kind, source, mode):
    "The adapter's gradient through captured states is there, and the same with blocks recomputed (they are) and in four parts."
    found, runs = gradient(read(kind)[0], kind, expected_sites(kind, source), token_set(), mode)
    assert runs == (2 if mode == "checkpointing" else 1)
    assert found.norm() > 1e-3 and found.isfinite().all()
    torch.testing.assert_close(found, plain_gradient(kind, source), atol=1e-5 * found.abs().max().item(), rtol=1e-4)


@functools.cache
def plain_run(kind, source): return run(base(kind), source, "plain")


def scores(model):
    "Log-probabilities of rows that no run has seen."
    return score(model, tokenize_pairs(load_pairs(tiny_rows(8, seed=9)), _tokenizer()), batch_size=4)[["logp_cho", "logp_rej"]].to_numpy()


@functools.cache
def _tokenizer(): return tiny_tokenizer()


@cell
@source_of
@pytest.mark.parametrize("mode", MODES)
def test_training(kind, source, mode, tmp_path):
    "The base is untouched bit for bit, the saved adapter scores identically in plain PEFT, and recomputing or accumulating changes only the rounding."
    model = base(kind)
    bits, name = base_checksum(model), fingerprint(model)
    trained = run(model, source, mode, tmp_path)
    assert (base_checksum(model), fingerprint(model)) == (bits, name)
    with trained.attached() as policy: ours = scores(policy)
    plain = PeftModel.from_pretrained(build(kind), str(tmp_path / "adapter")).eval()
    assert (scores(plain) == ours).all() and (scores(model) != ours).any()
    same = plain_run(kind, source)
    assert trained.history["grad_norm"].iloc[0] == pytest.approx(same.history["grad_norm"].iloc[0], rel=1e-4)
    assert trained.history["loss"].tolist() == pytest.approx(same.history["loss"].tolist(), rel=1e-3, abs=1e-5)
    if mode != "plain": assert distance(trained.weights, same.weights) < 0.02


HALVES = [("bfloat16", "fp32"), ("float16", "fp32"), ("float32", "bf16"), ("bfloat16", "bf16")]  # of the base's weights, of training


def check_run(kind, model, again, out, **options):
    "A run on `model`: step zero holds, adapter and states are fp32, the base stays, and the adapter scores identically on `again` in plain PEFT."
    bits, name = base_checksum(model), fingerprint(model)
    trained = run(model, "hs", "plain", out, **options)
    assert trained.step_zero.drift == 0 and abs(trained.step_zero.dpo - math.log(2)) < 1e-4
    assert (base_checksum(model), fingerprint(model)) == (bits, name)
    assert {w.dtype for w in trained.weights.values()} == {torch.float32}
    with trained.attached() as policy:
        ours = scores(policy)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype != torch.float16): states = forward_states(policy, batch_of(token_set()), ["hs.2"])
    assert {x.dtype for x in (states.cho["hs.2"], states.rej["hs.2"], states.logp_cho)} == {torch.float32}
    plain = PeftModel.from_pretrained(again, str(out / "adapter")).eval()
    assert (scores(plain) == ours).all() and (scores(model) != ours).any()
    return trained


@cell
@pytest.mark.parametrize("dtype, precision", HALVES)
def test_halves(kind, dtype, precision, tmp_path):
    "Halves in the base, in training, or in both: the run holds what it must, and its first loss is near that in fp32."
    kind_of = getattr(torch, dtype)
    trained = check_run(kind, build(kind, dtype=kind_of), build(kind, dtype=kind_of), tmp_path, precision=precision)
    assert trained.history["loss"].iloc[0] == pytest.approx(plain_run(kind, "hs").history["loss"].iloc[0], rel=0.1)


def test_fp16_training_needs_a_gpu():
    with pytest.raises(UserError, match="precision=fp16 needs a CUDA GPU"): run(build("Llama"), "hs", "plain", precision="fp16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Each architecture as a folder with its tokenizer, made when asked for."
    def folder(kind):
        where = tmp_path_factory.getbasetemp() / "models" / kind
        if not where.exists():
            build(kind).save_pretrained(where)
            _tokenizer().save_pretrained(where)
        return str(where)
    return folder


@cell
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantised_base(kind, quantize, folders, tmp_path):
    "A base of 8 or 4 bits trains, stays as it is, and its states are those of the weights that its codes stand for."
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'reprpo[quant]')")
    load = lambda: load_model(folders(kind), "cpu", "float32", quantize)[0]
    model = load()
    assert quantised(model) == quantize and fingerprint(model) == fingerprint(load()) != fingerprint(base(kind))
    check_run(kind, model, load(), tmp_path)
    expected, logps = naive(decoded(model, base(kind)), kind, token_set())
    with torch.no_grad(): states = forward_states(model, batch_of(token_set()), list(expected))
    near = 2e-4 if quantize == "4bit" else 0.3  # in 8 bits the activations are rounded too
    for site, x in expected.items(): torch.testing.assert_close(torch.cat([states.cho[site], states.rej[site]]), x, atol=near, rtol=near)


def test_quantisation_is_refused_in_one_line(folders, monkeypatch):
    monkeypatch.setattr("reprpo.models.find_spec", lambda name: None)
    for value, words in (("4bit", "--quantize 4bit needs bitsandbytes, which is not installed: pip install"), ("int4", "'int4'; did you mean '4bit'")):
        with pytest.raises(UserError, match=words): load_model(folders("Llama"), "cpu", quantize=value)

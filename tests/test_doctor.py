"""The doctor: eight healthy architectures pass, and each model made ill on purpose is named by the check that is about it."""
import pytest
import torch
from architectures import KINDS, build
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, GraniteConfig

from reprpo.experiments import doctor as module
from reprpo.experiments.doctor import doctor

CHECKS = ["tokenizer", "layers", "log-probabilities", "padding", "shared prompts", "step 0", "residual stream", "side inputs", "side outputs", "one step",
          "speed", "save and load"]


@pytest.fixture(scope="module")
def tokenizer(): return tiny_tokenizer()


def failed(found): return [f.name for f in found.findings if f.status == "FAIL"]


@pytest.mark.parametrize("kind", KINDS)
def test_healthy(kind, tokenizer):
    model = build(kind)
    bits = {name: p.clone() for name, p in model.named_parameters()}
    found = doctor(kind, loaded=(model, tokenizer))
    assert found.ok and failed(found) == [] and all(found[name].status == "ok" for name in CHECKS), str(found)
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters()) and not model.training
    assert max(map(len, str(found).splitlines())) <= 80 and "| ok | step 0 |" in found._repr_markdown_()


def test_halves_are_a_warning_at_most(tokenizer):
    assert doctor("half", loaded=(build("Llama", dtype=torch.bfloat16), tokenizer)).ok


def test_rescaled_logits(tokenizer):
    config = GraniteConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                           bos_token_id=0, eos_token_id=0, pad_token_id=0, logits_scaling=4.0, initializer_range=0.2)
    found = doctor("granite", loaded=(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False), tokenizer))
    assert failed(found) == ["log-probabilities"] and "rescales its logits" in found["log-probabilities"].found


def test_no_end_token(tokenizer):
    endless = tiny_tokenizer()
    endless.eos_token = None
    found = doctor("endless", loaded=(build("Llama"), endless))
    assert failed(found) == ["tokenizer"] and "no end-of-sequence token" in found["tokenizer"].found and found["tokenizer"].remedy


def test_blocks_in_no_list(tokenizer):
    model = build("GPT2")
    model.config.n_layer = 5
    found = doctor("scattered", loaded=(model, tokenizer))
    assert failed(found) == ["layers"] and "isn't supported" in found["layers"].found


def test_a_forward_that_is_random(tokenizer):
    model = build("Llama")
    model.model.layers[1].register_forward_hook(lambda m, args, out: out + 0.1 * torch.randn_like(out))
    assert {"step 0", "padding"} <= set(failed(doctor("random", loaded=(model, tokenizer))))


def test_an_error_inside_a_check_is_one_line(tokenizer, monkeypatch):
    def broken(p): raise RuntimeError("size mismatch\nand much more")
    monkeypatch.setattr(module, "check_padding", broken)
    found = doctor("broken", loaded=(build("Llama"), tokenizer))
    assert failed(found) == ["padding"] and found["padding"].found == "RuntimeError: size mismatch" and found["save and load"].status == "ok"


def test_a_model_that_is_not_there():
    found = doctor("./nowhere")
    assert failed(found) == ["load"] and "no such folder" in found["load"].found and not found.ok


def test_a_version_out_of_range(monkeypatch):
    monkeypatch.setattr(module.metadata, "requires", lambda name: ["torch>=99", "nonesuch>=1", "trl>=99; extra == 'bench'"])
    found = list(module.check_versions())
    assert [(f.name, f.remedy) for f in found if f.status == "FAIL"] == [("torch", "pip install 'torch>=99'"), ("nonesuch", "pip install 'nonesuch>=1'")]

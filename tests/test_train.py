"""Training: accumulation, layouts, precision, a clean base model, and what stops a run."""
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_rows

from reprpo.errors import UserError
from reprpo.train.checks import base_checksum
from reprpo.train.trainer import train

METHODS = ["dpo", "ipo", "ipo_hinge", "simpo", "simper", "sft", "hs-none-inner:layers=[1,2]", "side-none-inner:layers=1",
           "hs-none-prefvec:layers=1", "hs-none-mse:layers=1", "hs-none-retain:layers=1", "hs-none-random:layers=1", "hs-none-swapped:layers=1"]

pytestmark = pytest.mark.usefixtures("cache")


def run(model, tokenizer, method="dpo", **options):
    return train(model, tokenizer, method, tiny_rows(), **dict(steps=4, batch_size=8, log_every=2, progress=False) | options)


def gap(a, b):
    "Largest difference of two adapters, relative to the largest weight."
    return max((a.weights[k] - b.weights[k]).abs().max().item() for k in a.weights) / max(w.abs().max().item() for w in a.weights.values())


def first_gradient(trained): return trained.history["grad_norm"].iloc[0]


@pytest.mark.parametrize("method", ["dpo", "hs-none-inner:layers=[1,2]"])
def test_accumulation_is_exact(model, tokenizer, method):
    "Four micro-batches of two pairs make the gradient of one batch of eight, though their answers differ in length."
    whole, parts = run(model, tokenizer, method), run(model, tokenizer, method, micro_batch=2)
    assert first_gradient(parts) == pytest.approx(first_gradient(whole), rel=1e-5)
    assert parts.history["loss"].tolist() == pytest.approx(whole.history["loss"].tolist(), rel=1e-5)
    assert gap(whole, parts) < 1e-3


def test_layouts_and_reference_agree(model, tokenizer):
    "Shared prompts, or a live reference, change the speed and not the numbers."
    one = run(model, tokenizer, "hs-none-inner:layers=2")
    for options in (dict(layout="shared"), dict(layout="packed"), dict(layout="auto"), dict(reference="live"), dict(checkpointing=True)):
        other = run(model, tokenizer, "hs-none-inner:layers=2", **options)
        assert first_gradient(other) == pytest.approx(first_gradient(one), rel=1e-4), options
        assert other.history["loss"].tolist() == pytest.approx(one.history["loss"].tolist(), rel=1e-3), options


def test_bf16(model, tokenizer):
    "Autocast runs, near the fp32 loss, in the same process after an fp32 run."
    fp32, bf16 = run(model, tokenizer, "hs-none-inner:layers=2"), run(model, tokenizer, "hs-none-inner:layers=2", precision="bf16")
    assert bf16.history["loss"].iloc[0] == pytest.approx(fp32.history["loss"].iloc[0], rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_base_is_left_clean(model, tokenizer, method, tmp_path):
    "After a run the model is the base model again, bit for bit and module for module; the saved adapter is not zero."
    modules, bits = [type(m) for m in model.modules()], base_checksum(model)
    trained = run(model, tokenizer, method, out=tmp_path)
    assert [type(m) for m in model.modules()] == modules and base_checksum(model) == bits
    assert not model.training and not any(p.requires_grad for p in model.parameters()) and not hasattr(model, "peft_config")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(saved[k], trained.weights[k]) for k in saved) and any(v.any() for k, v in saved.items() if "lora_B" in k)
    with trained.attached() as policy: assert policy is not model
    assert base_checksum(model) == bits and [type(m) for m in model.modules()] == modules


def test_same_seed_same_run(model, tokenizer):
    "One seed decides order, initialisation and dropout, whatever the global generators have done before."
    first = run(model, tokenizer, dropout=0.1, seed=3)
    torch.manual_seed(999)
    torch.rand(17)
    assert gap(first, run(model, tokenizer, dropout=0.1, seed=3)) == 0
    assert gap(first, run(model, tokenizer, dropout=0.1, seed=4)) > 0


def broken(pi, ref):
    "A loss that fails on one pair once the policy has moved."
    moved = (pi.mean_cho - ref.mean_cho).abs().sum() > 1e-4
    loss = -pi.mean_cho + torch.where(moved & (pi.logp_cho == pi.logp_cho.max()), float("nan"), 0.0)
    return loss, {"odd": loss}


def root(pi, ref):
    "A finite loss with an infinite gradient at the start: the root of a square at 0."
    value = (pi.mean_cho - ref.mean_cho.detach()).pow(2).sqrt() - pi.mean_cho
    return value, {"root": value}


def flat(pi, ref):
    "A loss that is at its optimum while the policy is the reference."
    value = sum(((pi.cho[s] - ref.cho[s]).pow(2).sum(-1) for s in pi.cho), torch.zeros(len(pi)))
    return value, {"stay": value}


broken.needs_states = root.needs_states = False


def test_what_stops_a_run(model, tokenizer):
    "Non-finite values name the step, the term and the data row; a loss that cannot teach is refused before the first step."
    bits = base_checksum(model)
    with pytest.raises(UserError, match=r"broken: term 'odd' is not finite at step \d, row \d+ of"): run(model, tokenizer, broken)
    with pytest.raises(UserError, match="root.*not finite"): run(model, tokenizer, root, reference="live")
    with pytest.raises(UserError, match="nothing can be learned"): run(model, tokenizer, flat, layers="2")
    with pytest.raises(UserError, match="micro_batch=3 does not divide"): run(model, tokenizer, micro_batch=3)
    assert base_checksum(model) == bits and not any("lora" in n for n, _ in model.named_modules())

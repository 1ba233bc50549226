"""The whole family: every loss and option at step zero, every combination of names, transforms in training, and what is refused."""
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_rows

from reprpo.cli import call
from reprpo.losses.checks import gradient, nudged, random_states, step_zero
from reprpo.losses.legacy import LEGACY
from reprpo.train.catalogue import legacy_variants, variants
from reprpo.train.loop import Learned
from reprpo.train.method import Method, learns_transform
from reprpo.train.table import HIDDEN, LOSSES, NAMED, class_of, methods_text, named_methods
from reprpo.train.trainer import train
from reprpo.transforms.orthogonal import Ortho
from reprpo.transforms.table import TRANSFORMS, find_transform

pytestmark = pytest.mark.usefixtures("cache")
EACH = pytest.mark.parametrize("variant", variants(), ids=lambda v: v.method)
LEARNING = ["hs-ortho-rank", "hs-hra-rank:rank=4", "side-ether-prefvec:blocks=4", "hs-etherplus-inner", "hs-oft-mse",
            "hs-lowrank-inner:rank=4", "hs-hra+log_softmax-inner:rank=4"]
FROZEN = ["hs-svd-inner", "hs-svd-inner:side=keep,rank=8", "hs-pca-inner:rank=4", "hs-suppressed-inner", "hs-suppressed-inner:kind=logit_suppressed,tokens=2",
          "hs-softmax-mse",           "hs-log_softmax-inner", "hs-symlog-mse", "hs-topk-inner", "hs-topk-inner:by=difference",
          "hs-ortho-inner:start=random,learn=false", "hs-svd+symlog-inner:rank=8"]


@EACH
def test_step_zero(variant):
    "Class and sign as the table says, also on wider states than the page's and other pairs."
    loss = variant.parsed.loss_fn
    assert variant.step_zero().kind == variant.kind and variant.is_signed() == variant.signed and (variant.turn() > 1e-3) == variant.turns
    assert step_zero(loss, random_states(b=12, h=48, seed=3), variant.wrt).kind == variant.kind


@pytest.mark.parametrize("variant", legacy_variants(), ids=lambda v: v.method)
def test_step_zero_of_legacy(variant):
    assert variant.step_zero().kind == variant.kind


@EACH
def test_halves_and_equal_answers(variant):
    "Half precision in, fp32 and finite out; a pair whose answers have the same states stays finite, with its gradient."
    loss, ref = variant.parsed.loss_fn, random_states(b=8, seed=1)
    half = ref.map(lambda x: x.bfloat16() if x.is_floating_point() else x)
    value, terms = loss(nudged(half, 0.1, 0.1), half)
    assert {x.dtype for x in (value, *terms.values())} == {torch.float32} and bool(torch.isfinite(value).all())
    alike = replace(ref, rej={s: torch.cat([ref.cho[s][:1], x[1:]]) for s, x in ref.rej.items()})
    for wrt in ("hidden", "logp"):
        value, grad = gradient(loss, alike, alike, wrt)
        assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(grad).all())


@EACH
def test_orthogonal_transforms_change_nothing(variant):
    "Seen through one rotation of all states, a loss that does not turn has the same value and the same gradient on the states before it."
    if variant.turns or not variant.parsed.needs_states or "gradient_direction" in variant.method: pytest.skip("depends on the basis, or reads no states")
    turn = Ortho({s: 16 for s in ("hs.1", "hs.2")}, start="random", learn=False)
    loss, ref = variant.parsed.loss_fn, random_states(b=8)
    through = lambda s: replace(s, cho=turn(s.cho), rej=turn(s.rej))
    seen = lambda pi, ref: loss(through(pi), through(ref))
    for a, b in zip(gradient(loss, nudged(ref, 0.2, 0.2), ref), gradient(seen, nudged(ref, 0.2, 0.2), ref)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, a.abs().max().item()))


def test_every_combination_has_a_name():
    "Any transform goes with any loss and source; what does not is refused in one line."
    losses = [n for n, r in LOSSES.items() if r.group in HIDDEN]
    for transform, loss in product(TRANSFORMS, losses):
        if transform != "none" and loss == "gradient_direction":
            with pytest.raises(Exception, match="write hs-none-gradient_direction"): Method.parse(f"hs-{transform}-{loss}")
            continue
        found = Method.parse(f"hs-{transform}-{loss}")
        assert (found.transform, found.source, found.loss.__name__) == (transform, "hs", loss)
        assert learns_transform(found) == (TRANSFORMS[transform].kind == "learns")
    for transform in TRANSFORMS: assert Method.parse(f"side-{transform}-inner").source == "side"
    for name in LEGACY: assert Method.parse(f"hs-none-inner:align={name},legacy=true").options["align"] == name


def test_named_methods():
    "About thirty with a class each; the list fits 80 columns."
    assert 28 <= len(named_methods()) <= 40 and len(set(named_methods())) == len(named_methods())
    for method in [m for group in NAMED.values() for m in group]:
        assert Method.parse(method).label == method and class_of(method) in ("teaches", "regulariser", "not trained", "legacy")
    assert max(map(len, methods_text().splitlines())) <= 80


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_says_what_it_is(name):
    "Its class, where it lies, has a forward of its own, and says of itself what the table says."
    kind = find_transform(name)
    assert "forward" in vars(kind) or any("forward" in vars(base) for base in kind.__mro__[1:-2])


def run(model, tokenizer, method, **options):
    return train(model, tokenizer, method, tiny_rows(), **dict(steps=4, batch_size=8, log_every=2, layers="[1,2]", progress=False) | options)


@pytest.mark.parametrize("method", FROZEN)
def test_frozen_transforms_train(model, tokenizer, method):
    assert run(model, tokenizer, method).step_zero.step_class == "teaches"


@pytest.mark.parametrize("method", LEARNING)
def test_learning_transforms_train(model, tokenizer, method, tmp_path):
    "Their weights move at a rate of their own, lie beside the adapter, and the model is left clean."
    found = run(model, tokenizer, method, out=tmp_path)
    assert found.history["transform/moved"].iloc[-1] > 0 and (tmp_path / "transform.safetensors").exists()
    still = run(model, tokenizer, method + ("," if ":" in method else ":") + "transform_lr=1e-9")
    assert still.history["transform/moved"].iloc[-1] < 1e-3 * found.history["transform/moved"].iloc[-1]
    assert not any(p.requires_grad for p in model.parameters())


def test_an_orthogonal_transform_trains_the_same_adapter(model, tokenizer):
    "The theorem, through the whole trainer: the same loss, and the same gradient, as without."
    one, other = (run(model, tokenizer, m) for m in ("hs-none-inner", "hs-ortho-inner:start=random,learn=false"))
    for key in ("loss", "grad_norm"): assert other.history[key].tolist() == pytest.approx(one.history[key].tolist(), rel=1e-3)


def test_a_learning_transform_resumes(model, tokenizer, tmp_path, monkeypatch):
    "Broken off after a checkpoint, a run ends where it would have ended: adapter and transform."
    options = dict(save_every=2, steps=6, layout="concat")
    run(model, tokenizer, "hs-hra-rank:rank=4", out=tmp_path / "whole", **options)

    def breaks(self, args, state, control, **kwargs):
        self.transform.zero_grad(set_to_none=True)
        if state.global_step == 3: raise RuntimeError("broken off")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken off"):
        patch.setattr(Learned, "on_step_end", breaks)
        run(model, tokenizer, "hs-hra-rank:rank=4", out=tmp_path / "cut", **options)
    assert (tmp_path / "cut/checkpoints/checkpoint-2/transform.safetensors").exists() and not (tmp_path / "cut/adapter").exists()
    run(model, tokenizer, "hs-hra-rank:rank=4", out=tmp_path / "cut", **options)
    for name in ("transform.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (load_file(tmp_path / f / name) for f in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


BAD = [("hs-hra-inner:rank=4096", "rank"), ("side-ether-prefvec:blocks=7", "blocks"), ("hs-suppressed-inner:layers=0.5", "two layers"),
       ("hs-svd-inner:rank=4096", "rank"), ("hs-pca-inner:rank=100000", "rank"), ("hs-none-inner:align=abs", "legacy=true"),
       ("hs-svdd-inner", "did you mean 'svd'"),
       ("side-none-inner:modules=nowhere", "nowhere"), ("hs-none-rank:form=kll", "kl | weighted"), ("simpo:weight=mallows", "weight=wpo"),
       ("projgrad:keep=2", "keep"), ("hs-none-lorra:gain=0", "gain"), ("hs-svd+none-inner", "none"), ("hs-none-mse:distance=ckaa", "did you mean 'cka'")]


@pytest.mark.parametrize("method,part", BAD)
def test_a_bad_combination_is_one_line(method, part, tmp_path, capsys):
    status = call(["train", method, "--out", str(tmp_path / "run"), "--steps", "2", "--eval-n", "8"])
    text = capsys.readouterr().err.strip()
    assert status == 2 and text.count("\n") == 0 and part in text and "Traceback" not in text
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())

"""Weights read off eight architectures add up to the model's own states and logits, with an adapter on the model or without."""
import pytest
import torch
from architectures import KINDS, adapted, build

from reprpo.decompose.circuits import head_attribution, ov_factors
from reprpo.states.capture import capture
from reprpo.states.weights import block_weights, embed_weights, final_norm, head_bias, head_weights

cell = pytest.mark.parametrize("kind", KINDS)
IDS = torch.arange(5, 45)[None]


def rms(x, eps): return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def heads_out(w, z): return torch.einsum("ahd,tad->th", w.O, z) + w.bias.get("O", 0)


def parts(model, k, states, eps):
    "What the heads and the MLP of one block wrote."
    w, raw = block_weights(model, k), block_weights(model, k, fold=False)
    z, a = states[w.o_site].reshape(-1, len(w.O), w.O.shape[2]), states[w.down_site]
    o, m = heads_out(w, z), a @ w.down.T + w.bias.get("down", 0)
    return (o / rms(heads_out(raw, z), eps), m / rms(a @ raw.down.T + raw.bias.get("down", 0), eps)) if w.renormed else (o, m)


@cell
def test_the_stream_is_the_sum_of_what_is_written(kind):
    model = build(kind)
    sites = [s for k in range(3) for s in (block_weights(model, k).o_site, block_weights(model, k).down_site)]
    with torch.no_grad(), capture(model, ["hs.0", "hs.3", *sites]) as got: logits = model(IDS).logits[0]
    states, eps = {s: x[0] for s, x in got.items()}, getattr(model.config, "rms_norm_eps", 0.0)
    total = states["hs.0"] + sum(sum(parts(model, k, states, eps)) for k in range(3))
    torch.testing.assert_close(total, states["hs.3"], atol=1e-4, rtol=1e-4)
    ours = total / final_norm(model).scale(total) @ head_weights(model).T + head_bias(model)
    cap = getattr(model.config, "final_logit_softcapping", None)
    torch.testing.assert_close(torch.tanh(ours / cap) * cap if cap else ours, logits, atol=1e-3, rtol=1e-3)
    if kind != "GPT2": torch.testing.assert_close(embed_weights(model)[IDS[0]], states["hs.0"])


@cell
def test_an_adapter_is_left_out(kind):
    plain, policy = build(kind), adapted(build(kind))
    for ours, theirs in ((block_weights(policy, 1), block_weights(plain, 1)),):
        for name in ("Q", "K", "V", "O", "up", "down"): assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert (ours.o_site, ours.repeats) == (theirs.o_site, theirs.repeats)


@cell
def test_a_head_adds_what_its_factors_write(kind):
    "Attending to one state, a head writes OV times it; what it adds along a direction is the same number."
    w = block_weights(build(kind), 0)
    x, u = torch.randn(3, w.V.shape[2]), torch.randn(3, w.V.shape[2])
    z = torch.einsum("adh,nh->nad", w.V.repeat_interleave(w.repeats, 0), x)
    ov = ov_factors(w.V, w.O)
    torch.testing.assert_close(head_attribution(z, w.O, u), torch.einsum("nh,ahd,adg,ng->na", u, ov.out, ov.into, x), atol=1e-3, rtol=1e-3)

"""Every layout and shortcut against one sequence at a time: log-probabilities, pooled states and the adapter's gradient, on eight architectures."""
import functools
import tempfile

import pytest
import torch
from architectures import KINDS, WINDOW, adapted, build, remat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from reprpo.pairs.batch import LAYOUTS, collate
from reprpo.pairs.tokenize import TokenPair
from reprpo.states.forward import forward_states, own_logps, still
from reprpo.states.layout import choose_layout
from reprpo.train.adapter import adapter_params

set_hypothesis_home_dir(tempfile.mkdtemp())
SITE = "hs.2"
FEW = settings(derandomize=True, database=None, deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))


def made_of(ids, prompt: int, chosen: int, rejected: int, straddled: int) -> TokenPair:
    "A pair of such lengths; the rejected answer may begin with a token that is not scored."
    take = lambda n: [next(ids) for _ in range(n)]
    return TokenPair(take(prompt), take(chosen), take(rejected + straddled), 0, straddled)


@st.composite
def ragged(draw):
    "Two to five pairs, one-token answers among them, some longer than any window."
    sizes = st.tuples(st.integers(1, 2 * WINDOW), st.sampled_from([1, 2, 5, 14]), st.sampled_from([1, 3, 9]), st.integers(0, 1))
    ids = iter(torch.randint(320, (1000,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).tolist())
    return [made_of(ids, *size) for size in draw(st.lists(sizes, min_size=2, max_size=5))]


@functools.cache
def model(kind): return adapted(build(kind), size=0.2)


def worth(logps, cho, rej) -> torch.Tensor:
    "A loss that weighs every answer and every pooled state differently."
    down = torch.linspace(-1, 1, cho.shape[-1])
    return (logps * torch.linspace(-1, 2, len(logps))).sum() + (cho @ down).square().sum() - (rej @ down.flip(0)).sum()


def one_at_a_time(peft, pairs) -> tuple:
    "Log-probabilities and mean states of plain, unpadded rows."
    logps, pooled = [], []
    for side in ("chosen", "rejected"):
        for p in pairs:
            ids = torch.tensor([p.prompt + getattr(p, side)])
            start = len(p.prompt) + getattr(p, f"{side}_start")
            logps.append(own_logps(peft, ids)[start - 1:].sum())
            pooled.append(peft(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[2][0, start:].float().mean(0))
    return torch.stack(logps), torch.stack(pooled[:len(pairs)]), torch.stack(pooled[len(pairs):])


def in_batches(peft, pairs, layout: str, size: int) -> tuple:
    "The same through the library, in micro-batches."
    parts = [forward_states(peft, collate(pairs[i:i + size], list(range(i, min(i + size, len(pairs)))), 0, layout), [SITE]) for i in range(0, len(pairs), size)]
    join = lambda name: torch.cat([getattr(s, name) for s in parts])
    return torch.cat([join("logp_cho"), join("logp_rej")]), *(torch.cat([getattr(s, side)[SITE] for s in parts]) for side in ("cho", "rej"))


def gradient(peft, found) -> torch.Tensor:
    "The adapter's, as one vector."
    params = list(adapter_params(peft).values())
    return torch.cat([g.flatten() for g in torch.autograd.grad(worth(*found), params)])


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(pairs=ragged(), layout=st.sampled_from(LAYOUTS), recomputed=st.booleans(), size=st.sampled_from([1, 2, 5]))
def test_everything_equals_one_sequence_at_a_time(kind, pairs, layout, recomputed, size):
    peft = model(kind).train()
    with still(peft):
        wanted = one_at_a_time(peft, pairs)
        grad = gradient(peft, wanted)
        remat(peft, recomputed)
        try:
            found = in_batches(peft, pairs, layout, size)
            other = gradient(peft, found)
        finally: remat(peft, False)
    for a, b in zip(found, wanted): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (other - grad).norm() <= 1e-4 * grad.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_read_by_every_architecture(kind):
    ids = iter(range(1, 300))
    pairs = [made_of(ids, 9, 3, 4, 0) for _ in range(6)]
    assert choose_layout(build(kind), pairs) == ("packed", "")


@FEW
@given(pairs=ragged(), at=st.integers(0, 3), new=st.lists(st.integers(1, 300), min_size=1, max_size=4), layout=st.sampled_from(LAYOUTS))
def test_a_text_before_every_prompt_lands_in_every_prompt(pairs, at, new, layout):
    pairs = [TokenPair([7] * 3 + p.prompt, p.chosen, p.rejected, p.chosen_start, p.rejected_start) for p in pairs]
    longer = [TokenPair(p.prompt[:at] + new + p.prompt[at:], p.chosen, p.rejected, p.chosen_start, p.rejected_start) for p in pairs]
    numbers = list(range(len(pairs)))
    found = forward_states(model("Llama"), collate(pairs, numbers, 0, layout).insert(at, tuple(new)))
    wanted = forward_states(model("Llama"), collate(longer, numbers, 0, "concat"))
    for name in ("logp_cho", "logp_rej"): torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)

"""A loss that reads no log-probabilities ends its forward early, and the run is the run it would have been."""
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path

import pytest
import torch
from architectures import KINDS, build, tokens
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from reprpo.errors import UserError
from reprpo.io import read_jsonl
from reprpo.losses.checks import random_states, reads_logps
from reprpo.pairs.batch import collate
from reprpo.states.capture import blocks_of
from reprpo.states.forward import forward_states
from reprpo.train.adapter import add_adapter
from reprpo.train.config import TrainConfig
from reprpo.train.ledger import Ledger, tensors_of
from reprpo.train.loop import PairTrainer
from reprpo.train.memory import estimate_memory, recompute
from reprpo.train.meter import Meter
from reprpo.train.method import Method
from reprpo.train.trainer import train

pytestmark = pytest.mark.usefixtures("cache")
HIDDEN = ["hs-none-inner:outer=none,layers=[1,2]", "side-none-mse:layers=1", "hs-none-prefvec:outer=none,angle=0.1,layers=2",
          "hs-none-random:outer=none,layers=1"]
RECOMPUTED = dict(checkpointing=True, micro_batch=2, weight_decay=0.1, layout="shared")
OUTER = ["dpo", "hs-none-inner", "hs-none-prefvec", "hs-none-prefvec:outer=none,nll=0.1", "hs-none-mse:outer=ipo", "hs-none-retain", "bipo"]


def whole(name):
    "The same method, said to read log-probabilities."
    method = Method.parse(name)

    @wraps(method.loss)
    def loss(pi, ref, **options): return method.loss(pi, ref, **options)

    loss.needs_logps = True
    return replace(method, loss=loss)


def run(model, method=HIDDEN[0], **options):
    return train(model, tiny_tokenizer(), method, tiny_rows(), **dict(steps=5, batch_size=8, log_every=3, save_every=0, progress=False) | options)


def same(a, b): return a.weights.keys() == b.weights.keys() and all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)


def logged(trained): return trained.history.drop(columns="tokens/s", errors="ignore")


@pytest.fixture
def calls(monkeypatch):
    "Which of a model's blocks run to their end, in each micro-batch of a run."
    seen, step = [], PairTrainer.training_step

    def counting(self, *args):
        handles = [b.register_forward_hook(lambda *_, k=k: row.append(k)) for k, b in enumerate(blocks_of(self.model))]
        seen.append(row := [])
        try: return step(self, *args)
        finally:
            for handle in handles: handle.remove()

    monkeypatch.setattr(PairTrainer, "training_step", counting)
    return seen


def test_who_needs_log_probabilities():
    assert not any(Method.parse(name).needs_logps for name in HIDDEN) and all(Method.parse(name).needs_logps for name in OUTER)


@pytest.mark.parametrize("kind, options", [("Llama", {}), ("GPT2", {}), *((k, RECOMPUTED) for k in KINDS)])
def test_the_same_weights_as_the_whole_forward(kind, options, calls):
    "Bit for bit, on every architecture."
    model, method = build(kind), "hs-none-inner:outer=none,layers=[1,2]"
    early = run(model, method, **options)
    full = run(model, whole(method), **options)
    assert same(early, full) and logged(early)["loss"].tolist() == logged(full)["loss"].tolist()
    first = [r.iloc[0].drop("tokens/s", errors="ignore").to_dict() for r in (early.history, full.history)]
    assert first[0] == pytest.approx(first[1], rel=1e-5, abs=1e-6)
    micro = 8 // options.get("micro_batch", 8)
    tops = [max(row) for row in calls[:5 * micro:micro]]
    assert tops == [2, 1, 2, 1, 2]                      # of three blocks, at steps 1 to 5; 1, 3 and 5 are logged


@pytest.mark.parametrize("method", HIDDEN)
def test_every_loss_without_an_output_part(model, method, calls):
    early, full = run(model, method), run(model, whole(method))
    assert same(early, full) and min(max(row) for row in calls[:5]) < 3 <= min(max(row) for row in calls[5:])


@pytest.mark.parametrize("options", [{}, dict(checkpointing=True), dict(micro_batch=4, reference="live")])
def test_looking_changes_nothing(model, options):
    "However often a line is logged, the adapter's dropout draws the same numbers."
    often, seldom = (run(model, dropout=0.3, log_every=n, **options) for n in (1, 99))
    assert same(often, seldom) and not same(often, run(model, dropout=0.3, seed=1, **options))
    assert often.history["step"].tolist() == [1, 2, 3, 4, 5] and seldom.history["step"].tolist() == [1, 5]
    shared = [c for c in often.history if c not in ("loss", "tokens/s", "grad_norm")]
    pick = lambda r: r.history.set_index("step").loc[[1, 5], [c for c in shared if c != "step"]]
    assert pick(often).equals(pick(seldom)) and pick(often).notna().all(axis=None)


def test_in_bf16(model):
    early, full = run(model, precision="bf16"), run(model, whole(HIDDEN[0]), precision="bf16")
    assert same(early, full)


def test_resume(model, tmp_path, monkeypatch):
    "A run that stops in the middle goes on to the same adapter and the same lines."
    options, step = dict(steps=9, micro_batch=4, save_every=4, log_every=3, dropout=0.1), PairTrainer.training_step
    one = run(model, out=tmp_path / "whole", **options)

    def stop(self, *args):
        if self.state.global_step == 5: raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(PairTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt): run(model, out=tmp_path / "cut", **options)
    monkeypatch.setattr(PairTrainer, "training_step", step)
    again = run(model, out=tmp_path / "cut", **options)
    lines = [[{k: v for k, v in row.items() if k != "tokens/s"} for row in read_jsonl(tmp_path / out / "metrics.jsonl")] for out in ("whole", "cut")]
    assert same(one, again) and lines[0] == lines[1] and [row["step"] for row in lines[0]] == [1, 3, 4, 6, 8, 9]


def pull(pi, ref, *, peek=0.0, late=0.0, nan=0.0):
    "A loss on states; it can be asked to read log-probabilities, always or once the policy has moved, and to break."
    site = pi.sites[-1]
    d = ref.cho[site] - ref.rej[site]
    far = ((pi.cho[site] - pi.rej[site] - d) * d).sum(-1) / d.square().sum(-1)
    loss = (1 - far).square()
    if peek: loss = loss + peek * pi.logp_cho.detach()
    if late and far.abs().max() > late: loss = loss * torch.where(pi.logp_cho < 0, 2.0, 1.0)
    if nan and far.abs().max() > nan: loss = torch.where(far == far.max(), torch.nan, loss)
    return loss, {"far": far}


def liar(pi, ref): return pull(pi, ref, peek=0.1)


liar.needs_logps = False


def test_functions_of_ones_own(model, calls):
    "One that reads states only ends early; one that reads log-probabilities does not; one that says it does not is refused."
    assert same(run(model, pull, layers="2"), run(model, whole(pull), layers="2"))
    assert [max(row) for row in calls[:5]] == [3, 1, 3, 1, 3]
    calls.clear()
    run(model, partial(pull, peek=0.1), layers="2")
    assert [max(row) for row in calls] == [3] * 5
    with pytest.raises(UserError, match="liar: the loss of these pairs depends on log-probabilities.*write needs_logps = True"): run(model, liar, layers="2")


def test_a_loss_that_begins_to_read_log_probabilities_is_found_out(model):
    def late(pi, ref): return pull(pi, ref, late=0.02)
    late.needs_logps = False
    with pytest.raises(UserError, match=r"late: at step 12 the loss depends on log-probabilities"):
        run(model, late, layers="2", steps=40, log_every=12, lr=2e-3, warmup=0.0)


def test_a_value_that_is_not_finite_is_named_at_the_step_it_comes_up(model):
    "Also between two lines, where nothing is measured; nothing has been logged there that is not so."
    steps = []
    for every in (1, 50):
        with pytest.raises(UserError) as e: run(model, partial(pull, nan=0.2), layers="2", steps=50, log_every=every, lr=2e-3, warmup=0.0)
        steps.append(str(e.value).partition("at step ")[2])
    assert steps[0] == steps[1] and ", row " in steps[0] and int(steps[0].partition(",")[0]) > 1


def test_memory_is_foreseen():
    model, config = build("Llama"), TrainConfig(steps=3, batch_size=8, save_every=0, layers="1", log_every=9)
    found = estimate_memory(model, tokens(24), "hs-none-mse", config)
    with Ledger() as ledger:
        for x in tensors_of(model): ledger.hold(x)
        train(model, tiny_tokenizer(), "hs-none-mse", tiny_rows(24), config, progress=False)
    assert 0.85 < found.tensors / ledger.peak < 1.15
    assert found.phases["training"] < estimate_memory(model, tokens(24), whole("hs-none-mse"), config).phases["training"]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Gemma3"])
def test_a_trunk_below_the_lowest_adapter_keeps_no_graph(kind, recomputed):
    "Nothing to build: torch keeps none where nothing learns, and checkpointing does not ask the embeddings for a gradient."
    model = build(kind)
    path = KINDS[kind].reads[0]
    peft = add_adapter(model, TrainConfig(targets=(f"{KINDS[kind].blocks}.2.{path}",)), 0).train()
    if recomputed: recompute(peft)
    ran = []
    for k, block in enumerate(blocks_of(peft)): block.get_submodule(path).register_forward_pre_hook(lambda *_, k=k: ran.append(k))
    states = forward_states(peft, collate(list(tokens(4)), range(4), 0), [f"hs.{k}" for k in range(4)])
    assert [states.cho[f"hs.{k}"].requires_grad for k in range(4)] == [False, False, False, True]
    ran.clear()
    (states.cho["hs.3"].sum() + states.logp_cho.sum()).backward()
    assert set(ran) == ({2} if recomputed else set())


@pytest.mark.timeout(240)
def test_two_processes_are_one(tmp_path, monkeypatch):
    "There the forward runs to its end, and the adapters above get gradients of 0."
    monkeypatch.setenv("REPRPO_CACHE", str(tmp_path / "cache"))
    one = run(tiny_model(), micro_batch=4)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path / "two")]
    done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_jsonl(tmp_path / "two/metrics.jsonl")
    for key in ("loss", "grad_norm"): assert [r[key] for r in rows] == pytest.approx(one.history[key].tolist(), rel=1e-4), key


def test_what_a_loss_reads():
    pi, ref = random_states(seed=1), random_states(seed=2)
    found = {name: reads_logps(Method.parse(name).loss_fn, pi, ref) for name in ("hs-none-mse", "hs-none-mse:outer=ipo")}
    assert found == {"hs-none-mse": {"margin"}, "hs-none-mse:outer=ipo": {"loss", "outer", "margin"}}


class Waits(TorchDispatchMode):
    "Counts the operations for which a GPU would keep the host waiting."
    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.count += any(name in str(f) for name in ("_local_scalar_dense", "nonzero", "equal.default", "unique", "bincount", "masked_select"))
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [m for m in HIDDEN + OUTER if "random" not in m])
def test_nothing_waits_for_the_device_between_lines(method):
    "Neither the loss nor the meter; `random` draws by what is in its batch, and must look."
    method, pi, ref, rows = Method.parse(method), random_states(seed=1), random_states(seed=2), torch.arange(4)
    meter = Meter("m")
    with Waits() as seen:
        loss, terms = method.loss_fn(pi.map(lambda x: x.requires_grad_()), ref)
        loss.mean().backward()
        for step in (1, 2):
            meter.add(pi, ref, loss, terms, rows, step)
            meter.look(pi, loss, rows, step)
            meter.watch.compare(loss, loss, step)
    assert seen.count == 0 and meter.read()["theta"] != 0


def test_sites_of_several_widths_weigh_alike():
    "All layers in a few kernels, as if they were gone through one by one."
    wide, narrow = (random_states(h=h, sites=sites, seed=h) for h, sites in ((8, ("a", "c")), (6, ("b",))))
    ref = replace(wide, cho=wide.cho | narrow.cho, rej=wide.rej | narrow.rej)
    pi = replace(ref, cho={s: x + 0.1 * x.roll(1) for s, x in ref.cho.items()})
    for name in ("inner", "mse", "prefvec", "swapped"):
        loss = Method.parse(f"hs-none-{name}:outer=none")
        terms = [loss.loss_fn(pi.at([s]), ref.at([s]))[1]["ratio"] for s in ref.sites]
        torch.testing.assert_close(loss.loss_fn(pi, ref)[1]["ratio"], torch.stack(terms).mean(0))


if __name__ == "__main__": run(tiny_model(), micro_batch=4, out=sys.argv[1])

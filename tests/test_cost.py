"""The count of a step beside torch's own counter, what a run is counted to see beside what it sees, and a card that leaves no trace."""
import json
from dataclasses import replace

import pytest
import torch
import transformers as T
from architectures import COMMON, GROUPED, KINDS, build, tokens
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reprpo.pairs.batch import LAYOUTS, collate
from reprpo.states.forward import still
from reprpo.train import cost, trainer
from reprpo.train.adapter import add_adapter
from reprpo.train.config import TrainConfig
from reprpo.train.cost import cost_card, matrix_peak, measure_peak, measured
from reprpo.train.feed import Feed, View, make_view, pair_order
from reprpo.train.expected import expected_cost
from reprpo.train.flops import calls, fed, keys_seen, matrices, multiply_adds, needed, price, spent
from reprpo.train.intervene import Intervention
from reprpo.train.memory import loss_of, recompute
from reprpo.train.method import Method
from reprpo.train.trainer import train

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch): monkeypatch.setenv("REPRPO_CACHE", str(tmp_path / "cache"))


def plain(model):
    "With attention and experts as torch's counter knows them."
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"): model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


def counted(model, method="dpo", layout="concat", put=None, again=False):
    "FLOPs of a step on six pairs, as we count and as torch does, and our prices."
    method, rows, peft = Method.parse(method), list(tokens(6)), add_adapter(model, put or TrainConfig(rank=4), 0)
    if again: recompute(peft)
    batch, few = collate(rows, range(6), 0, layout), collate(rows[:1], [0], 0, layout)
    view = make_view(peft, method, method.layers or "1")
    found = price(peft, method, view, few)
    with still(peft.train()), FlopCounterMode(display=False) as counter:
        pi = view.policy(peft, batch, method.needs_logps)
        loss_of(method, pi, pi.map(lambda x: x.detach().clone())).backward()
    return sum(spent(found, fed(rows, 6, layout, found.looks), checkpointing=again).values()), counter.get_total_flops(), found


@pytest.mark.parametrize("method, layout, again", [
    ("dpo", "concat", False), ("hs-none-inner", "packed", False), ("side-none-mse", "shared", False), ("dpo", "concat", True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_what_torch_counts(kind, method, layout, again):
    ours, theirs, found = counted(plain(build(kind)), method, layout, again=again)
    assert ours == pytest.approx(theirs, rel=5e-3 if again else 1e-6) and not found.uncounted


@pytest.mark.parametrize("method, put, near", [
    ("dpo", TrainConfig(rank=4, targets=("down_proj",)), 1e-6), ("dpo", TrainConfig(rank=4, targets=("2.mlp.down_proj",)), 1e-6),
    ("dpo", TrainConfig(rank=4, targets=("q_proj", "v_proj")), 0.01), ("dpo", TrainConfig(rank=4, targets=(*ATTENTION, "lm_head")), 0.02),
    ("hs-none-inner:outer=none", None, 1e-6), ("bipo:layers=1", Intervention("vector", (1,)), 1e-6), ("loreft:layers=1", Intervention("reft", (1,)), 0.005)])
def test_a_gradient_that_reaches_part_of_the_model(method, put, near):
    ours, theirs, _ = counted(plain(build("Llama")), method, put=put)
    assert ours == pytest.approx(theirs, rel=near)


EXPERTS = COMMON | GROUPED | dict(num_experts_per_tok=2)


@pytest.mark.parametrize("config", [T.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=24), T.MixtralConfig(**EXPERTS, num_local_experts=4),
                                    T.GptOssConfig(**EXPERTS, num_local_experts=4, sliding_window=12)], ids=lambda c: c.model_type)
def test_experts_count_where_tokens_go(config):
    model = plain(T.AutoModelForCausalLM.from_config(config))
    ours, theirs, found = counted(model, put=TrainConfig(rank=4, targets=ATTENTION))
    assert ours == pytest.approx(theirs, rel=1e-6) and not found.uncounted


def test_what_is_not_counted_is_named():
    with pytest.warns(RuntimeWarning):
        found = counted(plain(T.AutoModelForCausalLM.from_config(T.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=24))))[2]
    assert "ΔW of experts" in found.uncounted
    mamba = T.AutoModelForCausalLM.from_config(T.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)).eval().requires_grad_(False)
    rows = list(tokens(1))
    found = price(add_adapter(mamba, TrainConfig(rank=4, targets=("in_proj",)), 0), Method.parse("dpo"), View(), collate(rows, [0], 0))
    assert "mixer" in found.uncounted and not found.looks and found.blocks[0] > 0


class Packed(nn.Module):
    "A layer whose weight lies two in a byte."
    def __init__(self, inner, outer):
        super().__init__()
        self.in_features, self.out_features = inner, outer
        self.weight = nn.Parameter(torch.zeros(inner * outer // 2, 1, dtype=torch.uint8), requires_grad=False)


def test_packed_layers_count_by_what_they_stand_for():
    layer, x = Packed(32, 48), torch.zeros(2, 5, 32)
    assert multiply_adds(layer, matrices(layer), x, (x,)) == 10 * 32 * 48
    assert not matrices(nn.Embedding(10, 4)) and matrices(nn.Linear(4, 3)) == {"weight": (3, 4)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_is_that_of_the_batches(layout):
    rows = list(tokens(12))
    for micro in (1, 4, 12):
        work, found = fed(rows, micro, layout, [0, 12]), [collate(rows[k:k + micro], range(micro), 0, layout) for k in range(0, 12, micro)]
        assert work.cells == sum(b.ids.numel() for b in found) and work.tokens == sum(int((b.block > 0).sum()) for b in found)
        assert work.scored == sum(len(b.owner) for b in found) and work.looks[12] == sum(b.ids.numel() * b.ids.shape[1] for b in found)


@pytest.mark.parametrize("window", [0, 1, 12, 1000])
def test_needed_looks_are_those_the_mask_leaves(window):
    rows = list(tokens(6))
    batch = collate(rows, range(6), 0, "shared")
    seen = (batch.attention_mask()[:, 0] == 0) & (batch.block > 0)[:, :, None]
    if window: seen &= batch.positions[:, :, None] - batch.positions[:, None, :] < window
    assert needed(rows, [window]).looks[window] == int(seen.sum())
    assert keys_seen(20, window) == sum(min(k + 1, window or 20) for k in range(20))


def settings(**changes): return TrainConfig(**dict(steps=4, batch_size=8, save_every=0, log_every=2, lr=1e-3, layout="concat") | changes)


def card_of(model, reference="stored", **changes):
    feed = Feed(tokens(24), 0, View(), None if reference == "live" else object())
    return cost_card(add_adapter(model, TrainConfig(), 0), Method.parse("dpo"), settings(**changes), feed, reference == "store")


def test_parts_of_a_run():
    runs = dict(plain={}, live=dict(reference="live"), again=dict(checkpointing=True), store=dict(reference="store"), micro=dict(micro_batch=2),
                longer=dict(steps=8), packed=dict(layout="packed"))
    cards = {k: card_of(tiny_model(), **v) for k, v in runs.items()}
    base = cards["plain"]
    assert set(base.flops) == {"blocks", "attention", "head", "adapter"} and base.needed < base.total and not base.stored
    assert all(c.needed == base.needed for k, c in cards.items() if k not in ("longer", "again")) and cards["store"].stored > 0
    assert cards["live"].flops["reference"] < base.total / 2 and cards["again"].flops["again"] < base.total / 2
    assert cards["micro"].padding < base.padding and cards["packed"].total < base.total
    assert cards["longer"].tokens == sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in (tokens(24)[i] for i in pair_order(24, 64, 0)))


def test_counting_leaves_no_trace():
    model, method = tiny_model(), Method.parse("dpo")
    peft = add_adapter(model, TrainConfig(dropout=0.5), 0).train()
    state, hooks = torch.random.get_rng_state(), [len(m._forward_hooks) for m in peft.modules()]
    card = cost_card(peft, method, settings(), Feed(tokens(24), 0, View(), object()))
    measure_peak(seconds=0.01)
    assert torch.equal(torch.random.get_rng_state(), state) and [len(m._forward_hooks) for m in peft.modules()] == hooks and peft.training
    assert all(p.grad is None for p in peft.parameters()) and card.total > 0
    with pytest.raises(ZeroDivisionError), calls(peft): raise ZeroDivisionError
    assert [len(m._forward_hooks) for m in peft.modules()] == hooks


def test_the_peak_is_asked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "measure_peak", lambda *a: asked.append(a) or 1e9)
    cost._peak.cache_clear()
    assert [matrix_peak(), matrix_peak(), matrix_peak("cpu", torch.bfloat16)] == [1e9] * 3 and len(asked) == 2
    cost._peak.cache_clear()


def test_a_finished_card():
    model = tiny_model()
    card = replace(card_of(model), estimate=2**20)
    done = measured(card, model, "fp32", 2.0, card.tokens // 2)
    assert done.share == pytest.approx(0.5, abs=1e-3) and done.rate == pytest.approx(card.tokens // 2 / 2.0)
    assert done.utilisation == pytest.approx(done.share * card.needed / 2.0 / done.peak) and done.dtype == "float32"
    assert "tokens/s" in done.after and "1 MiB" in done.after and card.after == card.before and len(str(done).splitlines()) == 2
    assert json.loads(json.dumps(done.asdict()))["utilisation"] == done.utilisation
    assert done._repr_markdown_().count("\n| ") == len(done.flops) + 1


@pytest.mark.parametrize("changes", [dict(layout="concat"), dict(layout="packed", micro_batch=4), dict(reference="live", checkpointing=True)], ids=str)
def test_a_run_sees_what_was_counted(changes, capsys):
    model, run = tiny_model(), lambda: train(tiny_model(), tiny_tokenizer(), "dpo", tiny_rows(24), settings(**changes))
    before = expected_cost(model, tiny_tokenizer(), "dpo", tiny_rows(24), settings(**changes))
    done, shown = run(), capsys.readouterr().err
    assert done.cost.tokens == done.tokens and done.cost.share == 1 and 0 < done.cost.seconds < done.seconds and done.cost.utilisation > 0
    assert shown.count("cost: ") == 2 and done.cost.before in shown and done.cost.after in shown
    assert before.flops == done.cost.flops and before.needed == done.cost.needed and before.estimate > 0 and before.seconds is None


def test_the_card_changes_nothing(monkeypatch):
    run = lambda: train(tiny_model(), tiny_tokenizer(), "dpo", tiny_rows(24), settings(dropout=0.1), progress=False)
    with_card = run()
    monkeypatch.setattr(trainer, "count_cost", lambda *a: (None, ""))
    without = run()
    assert without.cost is None and with_card.cost
    assert all(torch.equal(with_card.weights[k], without.weights[k]) for k in without.weights)


def test_what_cannot_be_counted_still_runs(monkeypatch, capsys):
    def broken(*args): raise RuntimeError("no")
    monkeypatch.setattr(trainer, "cost_card", broken)
    done = train(tiny_model(), tiny_tokenizer(), "dpo", tiny_rows(24), settings())
    assert done.cost is None and "cost: not counted" in capsys.readouterr().err


def test_what_is_not_trained_has_no_card():
    assert train(tiny_model(), tiny_tokenizer(), "steer:layers=1", tiny_rows(24), settings(), progress=False).cost is None

"""System prompt, steering, BiPO and LoReFT: exact at the start, off, scaled, saved and read again; each formula against one written out by hand."""
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from architectures import KINDS, batch_of, build, tokens
from tiny import tiny_model, tiny_rows, tiny_tokenizer

from reprpo.errors import UserError
from reprpo.experiments.store import pack, unpack
from reprpo.judge.curves import tuning_frame, tuning_table
from reprpo.judge.generate import generate
from reprpo.judge.movement import movement
from reprpo.judge.verdict import judge_all
from reprpo.models import fingerprint
from reprpo.pairs.load import load_pairs
from reprpo.pairs.template import set_template
from reprpo.pairs.tokenize import tokenize_pairs
from reprpo.states.capture import capture
from reprpo.states.forward import forward_states, reference_mode
from reprpo.states.score import score
from reprpo.train.adapter import add_adapter, load_adapter, remove_adapter, scaled
from reprpo.train.checks import base_checksum
from reprpo.train.competitors import check_text, find_text, with_text
from reprpo.train.config import TrainConfig
from reprpo.train.intervene import Intervention
from reprpo.train.loop import PairTrainer, training_arguments
from reprpo.train.method import Method
from reprpo.train.trainer import prepare, settle, train

TEXT = r'prompt:text="Be kind, (always).\n"'
METHODS = [TEXT, "steer:layers=[1,3],strength=2", "bipo:lr=0.05", "loreft:rank=2,lr=1e-2"]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("REPRPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def model(): return tiny_model()


@pytest.fixture(scope="module")
def tokenizer(): return tiny_tokenizer()


def run(model, tokenizer, method, **options):
    return train(model, tokenizer, method, tiny_rows(), **dict(steps=6, batch_size=8, log_every=2, progress=False) | options)


def token_set(tokenizer, text=""):
    return tokenize_pairs(load_pairs([r | {"prompt": text + r["prompt"]} for r in tiny_rows()]), tokenizer, 128)


def theta(scores, base): return (scores.logp_cho - scores.logp_rej) - (base.logp_cho - base.logp_rej)


def nudge(policy, size=0.5):
    with torch.no_grad():
        for k, edit in policy.edits.items(): edit.set_to(size, torch.Generator().manual_seed(k))


@pytest.mark.parametrize("kind", list(KINDS))
def test_architectures(kind):
    "On every architecture an edit starts as the base, changes the output, moves the states by exactly s·u·v, and goes without a trace."
    model, batch = build(kind), batch_of(tokens())
    n = model.config.get_text_config().num_hidden_layers
    name, before = fingerprint(model), forward_states(model, batch, [f"hs.{n - 1}"])
    for edit in ("vector", "reft"):
        policy = add_adapter(model, Intervention(edit, (0, 1, n - 1, n), (0.5,) * 4, rank=3))
        assert torch.equal(forward_states(policy, batch).logp_cho, before.logp_cho) and fingerprint(policy) == name
        nudge(policy)
        assert (forward_states(policy, batch).logp_cho - before.logp_cho).abs().max() > 1e-2
        with reference_mode(policy): assert torch.equal(forward_states(policy, batch).logp_cho, before.logp_cho)
        assert fingerprint(policy) == name
        assert remove_adapter(policy) is model
    policy = add_adapter(model, Intervention("vector", (n - 1,), (0.5,)))
    nudge(policy)
    with scaled(policy, -2.0): moved = forward_states(policy, batch, [f"hs.{n - 1}"]).cho[f"hs.{n - 1}"]
    torch.testing.assert_close(moved - before.cho[f"hs.{n - 1}"], (-2 * 0.5 * policy.edits[n - 1].v).expand_as(moved), atol=1e-4, rtol=1e-4)
    remove_adapter(policy)
    assert torch.equal(forward_states(model, batch).logp_cho, before.logp_cho) and fingerprint(model) == name


def test_loreft_by_hand(model):
    "h + Rᵀ(Wh + b − Rh) written out state by state, R orthonormal; it touches nothing outside R's rows."
    policy, ids = add_adapter(model, Intervention("reft", (2,), (1.5,), rank=3), seed=1), torch.arange(5, 15)[None]
    edit = policy.edits[2]
    with torch.no_grad(): edit.A.normal_(); edit.W.normal_(); edit.b.normal_()
    with reference_mode(policy), capture(policy, ["hs.2"]) as ref: policy(input_ids=ids)
    with torch.no_grad(), capture(policy, ["hs.2"]) as pi: policy(input_ids=ids)
    R = edit.R.detach()
    torch.testing.assert_close(R @ R.T, torch.eye(3), atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(torch.cat([R, edit.A.detach()]), atol=1e-4) == 3
    by_hand = torch.stack([h + R.T @ (edit.W.detach() @ h + 1.5 * edit.b.detach() - R @ h) for h in ref["hs.2"][0]])
    torch.testing.assert_close(pi["hs.2"][0], by_hand, atol=1e-5, rtol=1e-5)
    outside = torch.eye(32) - R.T @ R
    torch.testing.assert_close(pi["hs.2"][0] @ outside, ref["hs.2"][0] @ outside, atol=1e-4, rtol=1e-4)
    remove_adapter(policy)


def test_bipo_by_hand(model, tokenizer):
    "A step's loss is the mean of −log σ(dβθ) with d·v added, for both signs; d is the seed's, and both occur."
    method = Method.parse("bipo:beta=0.3")
    config = settle(method, TrainConfig(seed=4), model)
    ready, base = prepare(model, tokenizer, method, tiny_rows(), config), score(model, token_set(tokenizer))
    policy = add_adapter(model, Intervention("vector", (2,)))
    nudge(policy)
    trainer = PairTrainer(policy, training_arguments(config, "unused", torch.device("cpu")), method, config, ready.feed)
    drawn, rows = [], list(range(8))
    for trainer.state.global_step in range(12):
        d = trainer.direction
        drawn.append(d)
        inputs = trainer.data_collator(rows)
        with scaled(policy, d):
            found = trainer.losses(policy, inputs)[2]
            there = theta(score(policy, token_set(tokenizer)), base).to_numpy()[rows]
        torch.testing.assert_close(found.detach().double(), -F.logsigmoid(d * 0.3 * torch.tensor(there)), atol=1e-5, rtol=1e-5)
    assert set(drawn) == {1, -1}
    remove_adapter(policy)


@pytest.mark.parametrize("method", ["bipo:lr=0.05", "loreft:lr=1e-2"])
def test_training_raises_the_chosen(model, tokenizer, method):
    "Trained, the edit prefers the chosen answers; a BiPO vector turned round prefers the rejected ones."
    base, trained = score(model, token_set(tokenizer)), run(model, tokenizer, method, steps=30)
    with trained.attached() as policy:
        assert theta(score(policy, token_set(tokenizer)), base).mean() > 0.3
        if method.startswith("bipo"):
            with scaled(policy, -1.0): assert theta(score(policy, token_set(tokenizer)), base).mean() < -0.3


def test_steer_is_the_mean_difference(model, tokenizer):
    "The vector at each layer, against a mean over unpadded rows one by one; strength multiplies it."
    trained, found = run(model, tokenizer, "steer:layers=[1,4],strength=2"), {1: [], 4: []}
    with torch.no_grad():
        for p in token_set(tokenizer):
            means = []
            for answer in (p.chosen, p.rejected):
                with capture(model, ["hs.1", "hs.4"]) as got: model(input_ids=torch.tensor([p.prompt + answer]))
                start = len(p.prompt) + (p.chosen_start if answer is p.chosen else p.rejected_start)
                means.append({k: got[f"hs.{k}"][0, start:].mean(0) for k in found})
            for k in found: found[k].append(means[0][k] - means[1][k])
    for k, rows in found.items(): torch.testing.assert_close(trained.weights[f"{k}.v"], 2 * torch.stack(rows).mean(0), atol=1e-5, rtol=1e-4)
    assert trained.step_zero is None and trained.tokens == 0 and "not trained" in trained._repr_markdown_()


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_clean(model, tokenizer, method, tmp_path):
    "The saved folder gives the same scores; the base is as it was, bit for bit and module for module; another base is refused."
    modules, bits, rows = [type(m) for m in model.modules()], base_checksum(model), token_set(tokenizer)
    trained = run(model, tokenizer, method, out=tmp_path)
    with trained.attached() as policy: here = score(policy, rows)
    policy = load_adapter(model, tmp_path / "adapter")
    pd.testing.assert_frame_equal(score(policy, rows), here)
    if trained.method.edit != "prompt":
        with pytest.raises(UserError, match="already carries"): add_adapter(model, TrainConfig())
    assert remove_adapter(policy) is model and base_checksum(model) == bits and [type(m) for m in model.modules()] == modules
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"intervention.json", "intervention.safetensors"}
    with pytest.raises(UserError, match="another base model"): load_adapter(tiny_model(seed=1), tmp_path / "adapter")


@pytest.mark.parametrize("method", ["bipo:lr=0.05", "loreft:lr=1e-2"])
def test_ways_to_train_agree(model, tokenizer, method):
    "Accumulation, checkpointing, a shared prompt and a live reference change the speed and not the numbers; bf16 is near."
    one = run(model, tokenizer, method, steps=3)
    for options in (dict(micro_batch=2), dict(checkpointing=True), dict(layout="shared"), dict(layout="packed"), dict(reference="live")):
        other = run(model, tokenizer, method, steps=3, **options)
        assert other.history["loss"].tolist() == pytest.approx(one.history["loss"].tolist(), rel=1e-4), options
        assert max((one.weights[k] - other.weights[k]).abs().max().item() for k in one.weights) < 1e-3, options
    assert run(model, tokenizer, method, steps=3, precision="bf16").history["loss"].tolist() == pytest.approx(one.history["loss"].tolist(), rel=0.05)


def test_stopped_and_resumed(model, tokenizer, tmp_path, monkeypatch):
    "A run that is cut short goes on from its checkpoint to the same vector; a checkpoint holds the vector and no base weights."
    whole, step = run(model, tokenizer, "bipo:lr=0.05", steps=8), PairTrainer.training_step
    def stop(self, *args):
        if self.state.global_step == 6: raise KeyboardInterrupt
        return step(self, *args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(PairTrainer, "training_step", stop)
        run(model, tokenizer, "bipo:lr=0.05", steps=8, save_every=4, out=tmp_path)
    (kept,) = (tmp_path / "checkpoints").glob("checkpoint-4/model.safetensors")
    assert kept.stat().st_size < 2000
    again = run(model, tokenizer, "bipo:lr=0.05", steps=8, save_every=4, out=tmp_path)
    assert all(torch.equal(whole.weights[k], again.weights[k]) for k in whole.weights)


@pytest.mark.parametrize("layout", ["concat", "shared", "packed"])
def test_prompt_is_the_text(model, tokenizer, layout):
    "Scores, texts and KL of a policy with a text are those of the base model on prompts that hold it; the reference reads none."
    text, rows, base = "Be kind, (always).\n", token_set(tokenizer), score(model, token_set(tokenizer))
    with run(model, tokenizer, TEXT).attached() as policy:
        found, wanted = score(policy, rows, layout=layout), score(model, token_set(tokenizer, text))
        for k in ("logp_cho", "logp_rej"): assert (found[k] - wanted[k]).abs().max() < 1e-4
        assert theta(found, base).abs().max() > 0.1
        prompts = [r["prompt"] for r in tiny_rows(6)]
        said, direct = generate(policy, tokenizer, prompts, 8, temperature=0), generate(model, tokenizer, [text + p for p in prompts], 8, temperature=0)
        assert [g.new_ids for g in said] == [g.new_ids for g in direct] and [g.prompt for g in said] == prompts
        with reference_mode(policy): pd.testing.assert_frame_equal(score(policy, rows), base)
        moved = movement(policy, tokenizer, prompts, generate(model, tokenizer, prompts, 8), (1.0,), 8)[0]
        assert moved["kl_policy"] > 0 and moved["kl_reference"] > 0
        with pytest.raises(UserError, match="has no strength"), scaled(policy, 0.5): pass


def test_prompt_in_a_template(model):
    "With a chat template the text is its system turn, behind the one that rows have already; scores are those of rows made so."
    for system in (None, "Answer."):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHATML
        set_template(tokenizer, system=system)
        rows, pairs = token_set(tokenizer), load_pairs(tiny_rows())
        put_on = find_text(tokenizer, "Be kind.")
        with with_text(tokenizer, "Be kind.") as ids: assert "Be kind.<|im_end|>" in tokenizer.decode(ids([pairs[0]])[0])
        policy = add_adapter(model, put_on)
        other = tiny_tokenizer()
        other.chat_template = CHATML
        set_template(other, system="Be kind." if system is None else "Answer.\n\nBe kind.")
        found, wanted = score(policy, rows), score(model, token_set(other))
        for k in ("logp_cho", "logp_rej"): assert (found[k] - wanted[k]).abs().max() < 1e-4
        remove_adapter(policy)


def frames(seeds=(0, 1, 2)):
    "Scores of three methods, of which one was never scored at another strength."
    axes = dict(method=["dpo", "steer", "prompt"], seed=seeds, set=["own", "far"], row=range(20))
    rows = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
    good = (rows.row * 7 + rows.seed * 3 + rows.method.str.len()) % 20 < 12 + rows.method.str.len()
    rows = rows.assign(kind=rows.row.mod(4).astype(str), logp_cho=good.astype(float), logp_rej=0.5, n_cho=1, n_rej=1)
    base = rows[(rows.method == "dpo") & (rows.seed == seeds[0])].assign(method="base", logp_cho=(rows.row < 10).astype(float))
    along = pd.concat([rows[rows.method != "prompt"].assign(scale=s) for s in (0.5, 1.5)])
    kl = pd.DataFrame([dict(method=m, seed=s, scale=x, kl_policy=0.1 * x) for m in ("dpo", "steer", "prompt") for s in seeds
                       for x in ((1.0,) if m == "prompt" else (0.5, 1.0, 1.5))])
    return pd.concat([base, rows]), along, kl


def test_judged_without_strengths():
    "A method that has no strengths is judged at its own settings, and the note says why; the others still meet at equal KL."
    scores, along, kl = frames()
    sets = [dict(label="own", role="in_domain", polarity=1), dict(label="far", role="transfer", polarity=1)]
    judged = judge_all(scores, sets, along, kl)
    assert {m: v.basis for m, v in judged.verdicts.items()} == {"steer": "equal KL", "prompt": "own settings"}
    assert "equal KL not available" in judged.verdicts["prompt"].note and "prompt" not in judged.targets
    two = judge_all(scores[scores.method != "steer"], sets, along[along.method != "steer"], kl[kl.method != "steer"])
    assert two.equal_kl is None and two.verdicts["prompt"].basis == "own settings"


@pytest.mark.parametrize("method, told", [
    ("prompt", "needs a text"), ('prompt:text=""', "needs a text"), ('prompt:text="Be kind', "not closed"), ('prompt:text="a" b', "is not text"),
    ("prompt:tex=a", "did you mean 'text'"), ("prompt:text=a\nb", "control character"), ("steer:strength=inf", "must be finite"),
    ("steer:strength=0", "not 0"), ("steer:direction=mean", "is not means | random"),
    ("steer:lr=1", "unknown option"), ("bipo:bata=1", "did you mean 'beta'"), ("bipo:beta=-1", "beta"),
    ("loreft:rank=0", "at least 1"), ("lorft", "did you mean 'loreft'"),
    (f'prompt:text="{"kind " * 60}\\n"', "more than the model's context of 128"),
    ("steer:layers=9", "must lie between 0 and 4"), ("bipo:layers=-9", "must lie between 0 and 4"), ("loreft:rank=33", "between 1 and the model's width, 32")])
def test_mistakes(model, tokenizer, method, told):
    "One line each, and the base model untouched."
    bits = base_checksum(model)
    with pytest.raises(UserError) as e: run(model, tokenizer, method)
    assert told in str(e.value) and "\n" not in str(e.value)
    assert base_checksum(model) == bits


def test_a_text_that_grows_into_the_prompt(tokenizer):
    "Put in as tokens, a text must be what the tokenizer makes of the whole."
    with pytest.raises(UserError, match="prompt 1 share a token"): check_text(find_text(tokenizer, "The col"), tokenizer, ["A cat", "our is red"])
    check_text(find_text(tokenizer, "The colour.\n"), tokenizer, ["A cat", "our is red"])


def test_tuned_alike(model):
    "Every method that is tuned gets as many values, in the same proportions: learning rates, or strengths."
    from reprpo.experiments.config import CompareConfig
    from reprpo.experiments.tune import grids
    from reprpo.train.sizes import GRID_SMALL
    methods = [Method.parse(m) for m in ("dpo", "steer", "bipo", "loreft", TEXT, "steer:strength=3", "bipo:lr=0.1")]
    found = grids(CompareConfig(methods=tuple(m.label for m in methods)), model, methods)
    assert {m: knob for m, (knob, _) in found.items()} == {"dpo": "lr", "steer": "strength", "bipo": "lr", "loreft": "lr"}
    for _, values in found.values(): assert [v / values[2] for v in values] == pytest.approx(GRID_SMALL)
    turned, config = Method.parse("steer").turned(0.3)
    assert (turned.edit_settings["strength"], config, turned.label) == (0.3, {}, "steer")
    assert replace(turned, edit_options={}) == Method.parse("steer")


def test_tuning_is_shown():
    "Values of another grid, or of another kind, stand in their cells; a common grid of learning rates is the columns."
    rows = lambda values: [dict(lr=v, seed=0, val_accuracy=0.5 + v / 100, se=0.01, kl=v) for v in values]
    told = {"dpo": dict(chosen=1e-3, knob="lr", rows=rows([1e-4, 1e-3])), "ipo": dict(chosen=1e-4, rows=rows([1e-4, 1e-3]))}
    assert list(tuning_table(tuning_frame({"methods": told})).columns) == ["method", "lr 0.0001", "lr 0.001"]
    table = tuning_table(tuning_frame({"methods": told | {"steer": dict(chosen=10.0, knob="strength", rows=rows([1.0, 10.0]))}}))
    assert list(table.columns) == ["method", "value 1", "value 2"] and table["value 2"].iloc[-1].startswith("● strength 10: 60.0")


def test_strengths_come_back(tmp_path):
    "A strength that four bytes cannot hold, such as 0.1, is the same number after packing, so its KL is found."
    scores, along, kl = frames()
    along, kl = (f.assign(scale=f["scale"].replace(0.5, 0.1)) for f in (along, kl))
    sets = pd.DataFrame([dict(label="own", role="in_domain", polarity=1, spec=""), dict(label="far", role="transfer", polarity=1, spec="")])
    results = SimpleNamespace(scores=scores, frontier_scores=along, score="mean", kl=kl, sets=sets, manifest={}, coherence=None, out=tmp_path, ceilings=None)
    pack(results, tmp_path / "x.parquet")
    assert unpack(tmp_path / "x.parquet").judge().equal_kl.cells == judge_all(scores, sets, along, kl).equal_kl.cells

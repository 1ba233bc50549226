"""The weight of the hidden part: the same however a step is computed, and the same after a kill."""
from dataclasses import replace
from functools import wraps

import pytest
from tiny import tiny_rows

from reprpo.errors import UserError
from reprpo.io import read_jsonl
from reprpo.losses.balance import weigh
from reprpo.train.loop import PairTrainer
from reprpo.train.method import Method
from reprpo.train.trainer import train

SHARE = "hs-none-inner:layers=[1,2],balance=share,share=0.3"
pytestmark = pytest.mark.usefixtures("cache")


def run(model, tokenizer, method=SHARE, **options):
    return train(model, tokenizer, method, tiny_rows(), **dict(steps=4, batch_size=8, log_every=1, progress=False) | options)


def gap(a, b):
    "Largest difference of two adapters, relative to the largest weight."
    return max((a.weights[k] - b.weights[k]).abs().max().item() for k in a.weights) / max(w.abs().max().item() for w in a.weights.values())


def test_share_is_met_however_a_step_is_computed(model, tokenizer):
    "Micro-batches, recomputed activations and a live reference change neither the weight nor the run; bf16 hardly does."
    whole = run(model, tokenizer)
    assert whole.history["share/hidden"].iloc[0] == pytest.approx(0.3)
    for options in (dict(micro_batch=2), dict(checkpointing=True, micro_batch=4), dict(reference="live")):
        other = run(model, tokenizer, **options)
        assert other.history["share/weight"].tolist() == pytest.approx(whole.history["share/weight"].tolist(), rel=1e-4), options
        assert gap(whole, other) < 1e-3, options
    half = run(model, tokenizer, precision="bf16")
    assert half.history["share/weight"].iloc[0] == pytest.approx(whole.history["share/weight"].iloc[0], rel=0.1)


def test_measuring_changes_nothing(model, tokenizer):
    "Under `fixed` the run is the plain run bit for bit, dropout included."
    plain, watched = (run(model, tokenizer, f"hs-none-inner:layers=[1,2]{more}", dropout=0.2) for more in ("", ",balance=fixed"))
    assert gap(plain, watched) == 0 and "share/hidden" not in plain.history
    assert plain.history["loss"].tolist() == watched.history["loss"].tolist()


def metrics(out):
    "What was logged, without the clock."
    return [{k: v for k, v in row.items() if k != "tokens/s"} for row in read_jsonl(out / "metrics.jsonl")]


@pytest.mark.parametrize("method, save", [(SHARE, 3), (SHARE, 19), ("hs-none-inner:layers=[1,2],balance=unit", 3)])
def test_resume(model, tokenizer, tmp_path, monkeypatch, method, save):
    "A run that stops goes on with its weight, also where the next step is measured: while first steps are averaged, and after."
    options = dict(steps=21, micro_batch=4, save_every=save, log_every=4, dropout=0.1, warmup=0.0)
    whole, step = run(model, tokenizer, method, out=tmp_path / "whole", **options), PairTrainer.training_step

    def stop(self, *args):
        if self.state.global_step == save: raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(PairTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt): run(model, tokenizer, method, out=tmp_path / "cut", **options)
    monkeypatch.undo()
    monkeypatch.setenv("REPRPO_CACHE", str(tmp_path / "cache"))
    again = run(model, tokenizer, method, out=tmp_path / "cut", **options)
    assert gap(whole, again) == 0 and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert len(set(again.history["share/weight"])) > 1


def test_what_is_refused():
    "What would change nothing, and what has nothing to balance."
    for text, words in ((":balance=share,alpha=0.5", "alpha=0.5 changes nothing"), (":balance=share,outer=none", "give it an outer loss"),
                        (":share=0.3", "is for balance=share"), (":balance=unit,share=0.3", "is for balance=share"),
                        (":balance=share,share=1", "must lie between 0 and 1"), (":balance=gradnorm", "fixed | unit | share")):
        with pytest.raises(UserError, match=words.replace("|", r"\|")): Method.parse("hs-none-inner" + text)
    with pytest.raises(UserError, match="balance"): Method.parse("dpo:balance=share")


def louder(name):
    "The same method with its hidden part in other units."
    method = Method.parse(name)

    @wraps(method.loss)
    def loss(pi, ref, **options):
        terms = method.loss(pi, ref, **options)[1]
        terms = terms | {"inner": 1000 * terms["inner"]}
        return weigh(terms, method.settings["alpha"]), terms

    return replace(method, loss=loss)


def test_units_of_the_hidden_part_do_not_matter(model, tokenizer):
    "Under `share` a hidden part 1000 times as large makes the same adapter; under `fixed` another one."
    fixed = "hs-none-inner:layers=[1,2]"
    assert gap(run(model, tokenizer), run(model, tokenizer, louder(SHARE))) < 1e-4
    assert gap(run(model, tokenizer, fixed), run(model, tokenizer, louder(fixed))) > 1e-2

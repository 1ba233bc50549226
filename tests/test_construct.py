"""Sets cut from one set: nothing shared with training, and real shifts, by rules that know nothing of how the cut was made."""
import json
import random
from collections import Counter

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from tiny import tiny_model, tiny_tokenizer

from reprpo.errors import UserError
from reprpo.experiments.config import EvalPlan, plan_evals
from reprpo.experiments.construct import LEAST, Measured, construct, cut_sets, find_topics, main_directions, prompt_states
from reprpo.pairs.load import Pair, PairSet, load_pairs

TOPICS = ["red cat on a mat", "sum of 3 and 4 is", "WHO WENT THERE", "zzz qqq xxx", "12 34 56 78"]


def rows(n=300, bias=.8, seed=0):
    "Questions of five topics, two to a key; the chosen answer is the longer one in a share of rows."
    r = random.Random(seed)
    for i in range(n):
        texts = [f" It is {r.randint(100, 999)}.", f" It is {r.randint(100, 999)} and {r.randint(1000, 9999)} then."]
        longer = r.random() < bias
        topic = TOPICS[(i // 2) % len(TOPICS)]
        yield dict(prompt=f"Q: {topic} {i} {topic}?\nA:", chosen=texts[longer], rejected=texts[not longer], key=f"k{i // 2}", kind=topic)


@pytest.fixture(scope="module")
def world(): return tiny_model(), tiny_tokenizer()


@pytest.fixture(scope="module")
def cut(world): return construct(load_pairs(list(rows())), *world)


def test_no_key_of_training_is_anywhere_else(cut):
    assert list(cut.sets)[:2] == ["train", "test"] and len(cut.sets) >= 5
    train = {p.key for p in cut.train}
    for name, s in cut.sets.items():
        assert len(s) == cut.facts[name]["rows"] >= (LEAST if name != "train" else 50)
        if name != "train": assert not train & {p.key for p in s}, name
    for a, b in (("new_topics", "test"), ("hard", "test"), ("new_topics", "hard")): assert not {p.key for p in cut.sets[a]} & {p.key for p in cut.sets[b]}
    test = {(p.prompt, p.chosen) for p in cut.sets["test"]}
    for name, s in cut.sets.items(): assert cut.facts[name]["in_test"] == sum((p.prompt, p.chosen) in test for p in s), name
    originals = {(r["prompt"], r["chosen"], r["rejected"]) for r in rows()}
    assert {(p.prompt, p.chosen, p.rejected) for s in cut.sets.values() for p in s} <= originals


def test_a_length_rule_learnt_in_training_falls_where_length_is_turned(cut):
    gap = lambda s: np.array([[len(p.chosen) - len(p.rejected)] for p in s], float)
    rule = LogisticRegression(fit_intercept=False).fit(np.concatenate([gap(cut.train), -gap(cut.train)]), np.repeat([1, 0], len(cut.train)))
    right = {name: rule.score(gap(s), np.ones(len(s))) for name, s in cut.sets.items()}
    assert right["train"] > .7 and right["test"] > .65 and right["length_flipped"] == 0


def test_topics_held_out_are_rarer_in_training(cut):
    train = Counter(p.kind for p in cut.train)
    met = {name: np.mean([train[p.kind] for p in s]) for name, s in cut.sets.items()}
    assert met["new_topics"] < .6 * met["test"]
    assert cut.facts["new_topics"]["distance"] > cut.facts["test"]["distance"] == 1


def test_hard_rows_have_the_lowest_margins(cut): assert cut.facts["hard"]["reference"] < cut.facts["test"]["reference"] - .2


def test_the_same_seed_cuts_the_same_and_another_does_not(cut, world):
    texts = lambda c: {name: [p.prompt for p in s] for name, s in c.sets.items()}
    assert texts(construct(load_pairs(list(rows())), *world)) == texts(cut)
    assert texts(construct(load_pairs(list(rows())), *world, seed=1)) != texts(cut)


def test_what_is_written_is_read_again_and_judged_on(cut, tmp_path):
    folder = cut.write(tmp_path / "cut")
    for name, s in cut.sets.items():
        back = load_pairs(folder / f"{name}.jsonl")
        assert [(p.prompt, p.chosen, p.rejected, p.key, p.kind) for p in back] == [(p.prompt, p.chosen, p.rejected, p.key, p.kind) for p in s]
    about = json.loads((folder / "manifest.json").read_text())
    assert about["sets"]["test"]["rows"] == len(cut.sets["test"]) and about["config"]["seed"] == 0
    options = cut.options(folder)
    assert plan_evals(options[1], tuple(options[3:])) == [EvalPlan(p.label, p.polarity, p.role, p.spec) for p in cut.plans(folder)]
    cut.write(folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="was not written by construct"): cut.write(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    assert max(len(line) for line in str(cut).splitlines()) <= 100


def measured(n, cho, rej, z=None, margin=None):
    pairs = [Pair(f"{i}", "a", "b", key=f"{i:04}", row=i) for i in range(n)]
    z = np.zeros((n, 0)) if z is None else z
    return Measured(pairs, np.asarray(cho), np.asarray(rej), np.arange(n) / n if margin is None else margin, [p.key for p in pairs], np.arange(n), z)


def test_sets_that_would_be_no_shift_are_left_out_with_a_reason():
    sets, notes = cut_sets(measured(400, [5] * 400, [5] * 400))
    assert set(sets) == {"train", "test", "hard"}
    assert [n.split(":")[0] for n in notes] == ["left out new_topics", "left out length_matched", "left out length_flipped"]
    even = np.arange(400) % 2 == 0
    sets, notes = cut_sets(measured(400, np.where(even, 9, 5), np.where(even, 5, 9)))
    assert "length_flipped" not in sets and any("about as often" in n for n in notes)
    rare = np.arange(400) % 20 == 0
    sets, notes = cut_sets(measured(400, np.where(rare, 5, 9), np.where(rare, 9, 5)))
    assert "left out length_flipped: only" in "".join(notes)
    for found in (sets,): assert not set(found["train"]) & set(np.concatenate([v for k, v in found.items() if k != "train"]))


def test_clusters_are_found_where_there_are_some_and_not_where_all_are_equal():
    r = np.random.default_rng(0)
    centres = np.repeat(np.eye(10) * 30, 20, 0)
    held = find_topics(main_directions(centres + r.normal(size=(200, 10))), np.ones(200), .1, clusters=10)
    assert held.sum() == 20 and len(set(np.flatnonzero(held) // 20)) == 1
    assert not find_topics(main_directions(np.ones((50, 8))), np.ones(50), .1).any()


def test_prompt_states_do_not_depend_on_the_batch(world):
    model, tokenizer = world
    prompts = tokenizer([r["prompt"] for r in rows(9)])["input_ids"]
    one, many = (prompt_states(model, prompts, "hs.2", size) for size in (1, 4))
    assert one.shape == (9, 32) and np.allclose(one, many, atol=1e-5)
    same = prompt_states(model, [prompts[0]] * 3, "hs.2")
    assert np.allclose(same[0], same[2], atol=1e-6)


def test_conversations_keep_the_turns_before(tmp_path):
    pair = Pair("And 3?", "No.", "Yes.", key="k", row=1, before=(("user", "Is 2 even?"), ("assistant", "Yes.")))
    from reprpo.experiments.construct import Constructed
    Constructed("x", {"train": PairSet("train", "x", [pair])}, {}, (), {}).write(tmp_path / "out")
    assert load_pairs(tmp_path / "out" / "train.jsonl")[0].before == pair.before


@pytest.mark.parametrize("change,words", [
    (dict(n=100), "150 rows with 60 keys are needed"), (dict(share=.5), "at most 0.15"), (dict(share=0.), "above 0")])
def test_too_little_and_too_much_are_one_line(change, words, world):
    n, share = change.get("n", 300), change.get("share", .1)
    with pytest.raises(UserError, match=words) as e: construct(load_pairs(list(rows(n))), *world, share=share)
    assert "\n" not in str(e.value)


def test_one_key_is_not_enough(world):
    with pytest.raises(UserError, match="1 keys"): construct(load_pairs([{**r, "key": "same"} for r in rows(200)]), *world)

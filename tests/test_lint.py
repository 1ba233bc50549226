"""What lint finds in planted sets, how it says it, and what it stays silent about."""
import json
from pathlib import Path

import pandas as pd
import pytest

from reprpo.errors import UserError
from reprpo.experiments.config import EvalPlan
from reprpo.experiments.lint import lint_specs
from reprpo.pairs.lint import Lint, lint, read_all, wilson
from reprpo.pairs.load import load_pairs
from reprpo.pairs.shifts import SHIFTS, has_suite, suite
from reprpo.pairs.spec import GENIES_SETS, PairSpec

SHARED = Path(__file__).parents[2] / "shared" / "data" / "pairs"


def rows(n=40, start=0):
    word = lambda i: ["red", "green", "blue"][i % 3]
    return [dict(prompt=f"Colour {i}?", chosen=f" {word(i)} {i}", rejected=f" {word(i + 1)} {i}") for i in range(start, start + n)]


def write(path, items) -> str:
    Path(path).write_text("".join((i if isinstance(i, str) else json.dumps(i)) + "\n" for i in items))
    return str(path)


def checks(found: Lint) -> dict: return {f.check: f.level for f in found.findings}


def test_every_bad_row_is_collected_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", [*rows(3), "{", {"prompt": "x"}, {"prompt": "x", "chosen": "y", "rejected": "y"}])
    write("b.jsonl", [*rows(2, 10), [1]])
    pairs, bad = read_all("a.jsonl+b.jsonl,n=4,flip")
    assert len(pairs) == 4 and [b.split(": ")[0] for b in bad] == ["a.jsonl:4", "a.jsonl:5", "a.jsonl:6", "b.jsonl:3"]
    assert checks(lint(pairs, problems=bad))["bad rows"] == "fail"


def test_a_set_without_a_good_row_fails_and_a_file_that_is_not_there_stops(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not lint_specs([write("a.jsonl", ["{"])], model=None).ok
    assert not lint_specs([write("empty.jsonl", [])], model=None).ok
    with pytest.raises(UserError, match="no file b.jsonl"): lint_specs(["a.jsonl", "b.jsonl"], model=None)
    with pytest.raises(UserError, match="no SPEC"): lint_specs([])


def test_overlap_is_found_by_key_and_by_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = [{**r, "prompt": r["prompt"].upper() + " "} for r in rows(5)] + rows(45, 100)
    sets = {"train": rows(), "text": other, "key": rows(3) + rows(50, 200), "clean": rows(30, 500)}
    found = lint_specs([write(f"{name}.jsonl", items) for name, items in sets.items()], model=None)
    assert {f.set: f.level for f in found.findings if f.check == "overlap"} == {"text": "fail", "key": "fail"}
    assert [label for label, _ in found.facts] == ["train", "text", "key", "clean"]


def test_labels_that_cannot_be(tmp_path):
    same = [{**r, "chosen": " Yes", "rejected": f" No {i}"} for i, r in enumerate(rows(100))]
    assert checks(lint(load_pairs(same)))["constant answer"] == "fail"
    yes_no = [{**r, "chosen": [" Yes", " No"][i % 2], "rejected": [" No", " Yes"][i % 2]} for i, r in enumerate(rows(100))]
    assert checks(lint(load_pairs(yes_no))).get("few answers") == "note" and lint(load_pairs(yes_no)).ok
    frame = pd.DataFrame(dict(logp_cho=[-3.]*150 + [-1.]*70, logp_rej=-2., n_cho=1, n_rej=1))
    found = lint(load_pairs(rows(220)), reference=frame)
    assert checks(found)["inverted labels"] == "fail" and ",flip" in str(found) and "made to mislead" in str(found).replace("\n          ", " ")
    assert lint(load_pairs(rows(220)), reference=frame, polarity=-1).ok
    assert lint(load_pairs(rows(100)), reference=frame.iloc[100:200]).ok  # too few rows to say so


def test_cues_marks_and_headers():
    longer = [{**r, "chosen": r["chosen"] + " indeed"} for r in rows(100)]
    assert checks(lint(load_pairs(longer)))["length"] == "warn"
    assert checks(lint(load_pairs([{**r, "chosen": " Well" + r["chosen"]} for r in rows(100)])))["first word"] == "warn"
    for mark in ("<|im_start|>", "<|eot_id|>", "[INST]", "</s>", "<start_of_turn>"):
        marked = [{**r, "prompt": f"{mark} {r['prompt']}"} for r in rows(30)]
        assert checks(lint(load_pairs(marked)))["marks"] == "warn"
    assert checks(lint(load_pairs([{**r, "prompt": f"### Instruction:\n{r['prompt']}"} for r in rows(30)])))["headers"] == "note"
    assert checks(lint(load_pairs([{**r, "prompt": f"<b>{r['prompt']} 3 < 4 > 2 a[i]"} for r in rows(30)]))) == checks(lint(load_pairs(rows(30))))


def test_text_fits_the_page_and_markdown_is_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = [{**r, "prompt": f"<|x|>{r['prompt']} a|b $c$ {'long ' * 60}"} for r in rows(30)]
    found = lint_specs([write("odd.jsonl", [*odd, *odd[:9], "{"])], model=None)
    text, table = str(found), found._repr_markdown_()
    assert max(map(len, text.splitlines())) <= 100 and "\x1b" not in text
    assert all(line.replace("\\|", "").count("|") == 6 for line in table.splitlines() if line.startswith("|"))


def test_the_world_is_asked_about_the_world_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = lint_specs(["world:kind/train,n=40", write("mine.jsonl", rows())], n=30)
    facts = dict(found.facts)
    assert "reference right" in facts["train"] and "reference" not in facts["mine"]


def test_rows_too_long_for_the_model_are_a_finding():
    found = lint_specs(["world:kind/train,n=40"], max_length=20)
    assert not found.ok and checks(found).keys() & {"truncation", "tokens"}
    assert "--max-length" in str(found)


def test_wilson_against_the_closed_form():
    assert wilson(0, 0) == (0, 1)
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real pairs")
def test_real_sets_have_no_bad_row_and_no_overlap():
    train, test = (str(SHARED / f"persona_agreeableness_{s}.jsonl") for s in ("train", "test"))
    found = lint_specs([train, test, f"power:-1={SHARED / 'persona_desire-for-acquiring-power_test.jsonl'}"], model=None)
    assert not {"bad rows", "overlap"} & checks(found).keys()
    assert [f.set for f in found.findings if f.check == "few answers"] == ["train", "persona_agreeableness_test", "power"]


def test_suites_are_evaluation_plans():
    plans = {train: [EvalPlan(label, polarity, role, spec) for label, polarity, spec, role in suite(train)] for train in {s.train for s in SHIFTS}}
    for train, rows_ in plans.items():
        assert rows_[0].role == "in_domain" and [r.role for r in rows_].count("in_domain") == 1, train
        assert len({r.label for r in rows_}) == len(rows_)
        for r in rows_: assert (r.polarity == 0) == (r.role == "damage") and str(PairSpec.parse(r.spec)) == r.spec
    assert {s.target for s in SHIFTS} & {"reward_seeking", "survival_influence"} == {s.target for s in SHIFTS if s.polarity == -1}
    assert all(s.spec.endswith(",flip") for s in SHIFTS if s.target == "ethics_justice")
    assert len(suite("alpaca_mmlu")) > len(suite("alpaca_mmlu", core=True)) > 5
    assert has_suite("genies:math#train") and not has_suite("world:facts/train") and not has_suite("openai/gsm8k:main")
    assert suite("wassname/genies_preferences:math") == suite("genies:math")
    assert {t for s in SHIFTS for t in (s.train, s.target)} - set(GENIES_SETS) == {"ethics_justice", "ethics_commonsense", "ethics_utilitarianism", "medical"}


@pytest.mark.parametrize("train,words", [
    ("genies:arc_hard", "no shifts are known"), ("genies:math#test", "in-domain test set"), ("world:facts/train", "no shifts are known"),
    ("wassname/ethics_expression_preferences:justice#test", "are inverted; train on"), ("genies:mat", "did you mean 'math'")])
def test_training_sets_without_a_suite_are_one_line(train, words):
    with pytest.raises(UserError, match=words) as e: suite(train)
    assert "\n" not in str(e.value)

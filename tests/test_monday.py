"""Monday morning: a model with a chat template, one JSONL, one command, and there is a report; then its adapter is judged, merged and looked at."""
import json
import random

import pytest
import shapes

from reprpo.cli import call
from reprpo.io import read_yaml

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("cache")]
QUICK = "--seeds 1 --steps 3 --batch-size 8 --jobs 1 --eval-n 24 --frontier-n 12 --scales 0.5 1 1.5 --tune-seeds 1 --lrs 0.001 0.01".split()


def talk(n: int, seed: int = 0) -> list[dict]:
    "Questions with a polite and a rude answer; the polite one is mostly longer, as in real data."
    r, rows = random.Random(seed), []
    for i in range(n):
        thing, place = r.choice(["lamp", "river", "garden", "engine", "letter", "violin"]), r.choice(["at home", "in the city", "at sea", "at school"])
        question = f"What should I do with the {thing} number {i} that I found {place}?"
        polite, rude = f"Please take good care of the {thing}, and tell its owner.", f"Who cares about a {thing}."
        if r.random() < 0.3: polite, rude = "Keep it safe, please.", f"Throw the {thing} away, nobody cares about such things anyway."
        rows.append(dict(prompt=question, chosen=polite, rejected=rude))
    return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monday")
    shapes.qwen3_shaped(folder / "qwen")
    shapes.llama3_shaped(folder / "llama")
    lines = [json.dumps(row) for row in talk(500)]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "same.jsonl").write_text("\n".join(json.dumps(row | {"chosen": "Yes.", "prompt": f"{i}?"}) for i, row in enumerate(talk(60))) + "\n")
    chat = lambda row, key: [{"role": "system", "content": "Be kind."}, {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}]
    (folder / "chat.jsonl").write_text("".join(json.dumps({k: chat(row, k) for k in ("chosen", "rejected")}) + "\n" for row in talk(500)))
    return folder


@pytest.fixture(autouse=True)
def here(home, monkeypatch): monkeypatch.chdir(home)


@pytest.mark.parametrize("model,pairs,more", [
    ("qwen", "pairs.jsonl", ["--template-options", "enable_thinking=false"]),
    ("llama", "chat.jsonl", ["--checkpointing"]),
])
def test_from_a_jsonl_to_a_report(model, pairs, more, home, capsys):
    command = ["compare", "dpo", "hs-none-inner", "--model", model, "--train", pairs, *more, *QUICK, "--out", f"{model}-out"]
    assert call(command) == 0
    out = capsys.readouterr().out
    assert "no set to judge on was given" in out and "demonstration" in out
    report = (home / f"{model}-out" / "report.html").read_text()
    assert "new_topics" in report and "length_flipped" in report
    sets = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in (home / f"{model}-out" / "sets").glob("*.jsonl")}
    assert {"train", "test", "new_topics", "hard", "length_flipped"} <= set(sets)
    said = {k: {json.dumps(row["prompt"]) for row in rows} for k, rows in sets.items()}
    assert all(not said["train"] & said[k] for k in said if k != "train")
    run = read_yaml(home / f"{model}-out" / "runs" / "dpo" / "seed-0" / "config.yaml")
    assert run["train"] == f"{model}-out/sets/train.jsonl" and run["eval"][0] == f"test={model}-out/sets/test.jsonl" and run["rank"] == 8
    assert call(command) == 0
    assert "2 of them done already" in capsys.readouterr().out.replace("6 of them", "2 of them")


def test_then_judge_merge_and_evaluate(home, capsys):
    run, test = "run", "run-sets/test.jsonl"
    how = ["--no-coherence", "--template-options", "enable_thinking=false"]
    assert call(["train", "dpo", "--model", "qwen", "--train", "pairs.jsonl", *how, "--steps", "3", "--batch-size", "8", "--eval-n", "24", "--out", run]) == 0
    capsys.readouterr()
    assert call(["judge", run, "--eval", f"test={test}", "--fresh-n", "24"]) == 0
    card = capsys.readouterr().out
    assert "test" in card and "coherence" in card.lower() and "KL" in card
    assert call(["merge", run, "--out", "merged"]) == 0
    capsys.readouterr()
    assert call(["evaluate", "merged", "--base", "qwen", "--eval", test, *how]) == 0
    assert "KL" in capsys.readouterr().out


def test_look_before_training(home, capsys):
    assert call(["pairs", "lint", "pairs.jsonl", "--model", "qwen"]) == 1
    said = capsys.readouterr().out
    assert "inverted" in said and ",flip" in said and "chosen answer is the longer one" in said
    assert call(["pairs", "lint", "pairs.jsonl,flip", "--model", "qwen"]) == 0
    assert call(["pairs", "lint", "same.jsonl", "--no-reference"]) == 1
    assert "fail" in capsys.readouterr().out.lower()
    assert call(["pairs", "split", "pairs.jsonl", "--model", "llama", "--out", "cut"]) == 0
    assert "--train cut/train.jsonl --eval" in capsys.readouterr().out and (home / "cut" / "manifest.json").exists()
    assert call(["pairs", "show", "chat.jsonl", "--model", "llama", "--n", "1"]) == 0
    assert "Be kind." in capsys.readouterr().out.replace("│", "")
    assert call(["doctor", "qwen"]) == 0
    assert "save and load" in capsys.readouterr().out


def test_training_alone_cuts_sets_too(home, capsys):
    command = ["train", "dpo", "--model", "llama", "--train", "pairs.jsonl", "--steps", "2", "--eval-n", "16", "--out", "one"]
    assert call(command) == 0
    assert "new_topics" in capsys.readouterr().out and (home / "one-sets" / "test.jsonl").exists()
    assert call(command) == 0
    assert "new_topics" in capsys.readouterr().out


@pytest.mark.parametrize("argv,parts", [
    (["compare", "dpo", "--model", "qwen", "--train", "pairs.jsonl", "--template-options", "enable_thinkin=false"], ["enable_thinkin", "enable_thinking"]),
    (["compare", "dpo", "--model", "qwen", "--train", "pairs.jsonl", "--template", "plain", "--system", "Be kind."], ["--system"]),
    (["compare", "dpo", "--model", "qwen", "--train", "chat.jsonl", "--template", "plain"], ["--template"]),
    (["compare", "dpo", "--train", "pairs.jsonl", "--template", "chat"], ["no chat template"]),
    (["compare", "dpo", "--train", "genies:maths"], ["maths", "math"]),
    (["compare", "dpo", "--model", "qwen", "--train", "pairs.jsonl,n=40"], ["to cut shifts"]),
    (["judge", "qwen-out/runs/dpo/seed-0", "--base", "llama", "--eval", "pairs.jsonl"], []),
])
def test_bad_input_is_one_line(argv, parts, capsys):
    assert call(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(part in err for part in parts), err

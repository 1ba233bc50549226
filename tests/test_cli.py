"""The command line as a whole: help, errors in one line, runs that are whole or absent, and resuming after a kill."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from reprpo.cli import COMMANDS, call

ROOT = Path(__file__).parent.parent
ADJECTIVES, NOUNS = ("red", "blue", "old", "new", "big", "small", "warm", "cold"), ("hat", "cup", "box", "fan", "pen", "bag")


def rows(flip=False):
    "Forty-eight pairs whose chosen answer names the thing that was asked for."
    pairs = [(f"What is {a} here? The {a} {n}.", f" It is the {n}.", f" It is the {NOUNS[NOUNS.index(n) - 1]}.") for a in ADJECTIVES for n in NOUNS]
    return [dict(prompt=p, chosen=r if flip else c, rejected=c if flip else r) for p, c, r in pairs]


def write(path, items):
    path.write_text("".join((i if isinstance(i, str) else json.dumps(i)) + "\n" for i in items))
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a model, pairs, and every kind of bad input."
    folder = tmp_path_factory.mktemp("cli")
    tiny_model(layers=3).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write(folder / "train.jsonl", rows())
    write(folder / "test.jsonl", rows()[:20])
    write(folder / "other.jsonl", rows(flip=True)[20:40])
    write(folder / "malformed.jsonl", [*rows()[:2], '{"prompt": "a",'])
    write(folder / "column.jsonl", [dict(question="q", chosen=" a", rejected=" b")])
    write(folder / "empty.jsonl", [dict(prompt="q", chosen=" ", rejected=" b")])
    write(folder / "same.jsonl", [dict(prompt="q", chosen=" b", rejected=" b")])
    (folder / "nomodel").mkdir()
    (folder / "notokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "notokenizer" / name).write_bytes((folder / "model" / name).read_bytes())
    return folder


@pytest.fixture(autouse=True)
def here(home, monkeypatch, tmp_path_factory):
    "Work in that folder, with a cache of its own."
    monkeypatch.chdir(home)
    monkeypatch.setenv("REPRPO_CACHE", str(home / "cache"))
    monkeypatch.delenv("REPRPO_DEBUG", raising=False)


GOOD = {"--model": "model", "--train": "train.jsonl", "--eval": "test.jsonl", "--steps": "4", "--seeds": "2", "--out": "never",
        "--no-tune-lr": "", "--no-frontier": "", "--no-coherence": ""}


PLAIN = dict(tune_lr=False, frontier=False, coherence=False)


def words(*methods, **changes):
    "A good command line of compare with some options changed; None leaves one out."
    options = GOOD | {"--" + k.replace("_", "-"): v for k, v in changes.items()}
    return ["compare", *methods, *(w for k, v in options.items() if v is not None for w in (k, *v.split()))]


def fails(capsys, argv, *parts):
    "The command must exit with 2 and one line that holds every part."
    assert call(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("reprpo: "), err
    for part in parts:
        assert part in err, err


def test_help_is_instant_and_narrow():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "reprpo", "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert time.perf_counter() - start < 3  # half a second on a free machine; the claim that matters is the next line
    assert not {"torch", "transformers", "pandas"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name, (_, example) in COMMANDS.items():
        assert example.split("\n")[0] in done.stdout, name


@pytest.mark.parametrize("name", ["demo", "train", "compare", "evaluate", "report", "power", "methods", "pairs show", "world train", "world sample",
                                  "world check", "world controls", "pairs lint", "pairs split", "judge", "merge", "doctor", "pairs", "world"])
def test_every_command_has_help(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert call([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: reprpo {name}" in out and f"$ reprpo {name}" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("argv,parts", [
    (["comapre"], ["'comapre'", "did you mean 'compare'"]),
    (["world", "smaple"], ["did you mean 'sample'"]),
    (["world"], ["train, sample, check"]),
    (["compare", "dpo", "--sede", "1"], ["--sede", "did you mean '--seed'"]),
    (["compare", "dpo", "--steps", "many"], ["--steps takes a whole number, not 'many'"]),
    (["compare", "dpo", "--lr", "fast"], ["--lr takes a number, not 'fast'"]),
    (["compare", "dpo", "--score", "average"], ["--score", "mean, sum"]),
    (["compare", "dpo", "--eval"], ["--eval needs at least one"]),
    (["compare", "dpo", "--seed", "1", "--seed", "2"], ["--seed is given twice"]),
    (["compare"], ["no method given"]),
    (["train"], ["no method given"]),
    (["train", "dpo", "ipo"], ["unexpected word 'ipo'"]),
    (["compare", "dpo", "dpo"], ["given twice"]),
    (["compare", "dpo", "--steps", "0"], ["steps"]),
    (["compare", "dpo", "--micro-batch", "3"], ["micro_batch"]),
    (["compare", "dpo", "--lrs", "0.001", "-1"], ["lrs"]),
    (["compare", "dpo", "--scales", "0.5", "2"], ["1 among them"]),
    (["compare", "dpo", "--controls", "some"], ["--controls", "all, none"]),
    (["power", "nowhere"], ["nowhere holds no comparison"]),
    (["evaluate"], ["no adapter given", "reprpo evaluate my-run"]),
    (["judge"], ["no adapter given"]),
    (["merge", "some"], ["no --out given"]),
    (["evaluate", "./nowhere"], ["./nowhere", "no such folder"]),
    (["judge", "./nowhere"], ["./nowhere", "no such folder"]),
    (["merge", "./nowhere", "--out", "x"], ["./nowhere", "no such folder"]),
    (["pairs", "lint"], ["no SPEC given"]),
    (["pairs", "split"], ["no SPEC given"]),
    (["compare", "dpo", "--quantize", "2bit"], ["--quantize", "4bit"]),
    (["compare", "dpo", "--template", "cat"], ["--template", "chat"]),
    (["report", "nowhere"], ["nowhere holds no comparison"]),
    (["pairs", "show"], ["no SPEC given"]),
])
def test_wrong_words(argv, parts, capsys):
    fails(capsys, argv, *parts)


@pytest.mark.parametrize("methods,changes,parts", [
    (["dop"], {}, ["unknown method 'dop'", "did you mean 'dpo'"]),
    (["dpo:bta=1"], {}, ["'bta'", "did you mean 'beta'"]),
    (["dpo:beta=x"], {}, ["beta=x"]),
    (["hs-none-inner:layers=40"], {}, ["layer 40", "3 blocks"]),
    (["hs-none-inner"], {"layers": "middle"}, ["'middle' is not a layer"]),
    (["dpo"], {"train": "trian.jsonl"}, ["no file trian.jsonl", "did you mean 'train.jsonl'"]),
    (["dpo"], {"train": "malformed.jsonl"}, ["malformed.jsonl:3"]),
    (["dpo"], {"train": "column.jsonl"}, ["column.jsonl:1", "no column 'prompt'", "question, chosen, rejected"]),
    (["dpo"], {"eval": "empty.jsonl"}, ["empty.jsonl:1", "empty"]),
    (["dpo"], {"eval": "same.jsonl"}, ["same.jsonl:1", "same"]),
    (["dpo"], {"max_length": "6"}, ["none of", "6"]),
    (["dpo"], {"eval": None}, ["to cut shifts"]),
    (["dpo"], {"eval": "test.jsonl test.jsonl"}, ["called 'test'"]),
    (["dpo"], {"eval": "a:2=test.jsonl"}, ["polarity '2'"]),
    (["dpo"], {"train": "world:fats/train", "eval": None}, ["did you mean 'facts'"]),
    (["dpo"], {"model": "nomodel"}, ["nomodel", "no model folder"]),
    (["dpo"], {"model": "./nowhere"}, ["./nowhere", "no such folder"]),
    (["dpo"], {"model": "notokenizer"}, ["notokenizer", "no tokenizer"]),
    (["dpo"], {"device": "cdua"}, ["cdua"]),
    (["dpo"], {"out": "nomodel/../model"}, ["not empty"]),
])
def test_wrong_input(methods, changes, parts, capsys, home):
    fails(capsys, words(*methods, **changes), *parts)
    assert not (home / "never").exists()


def test_compare_resumes_and_reports(capsys, home):
    argv = words("dpo", "hs-none-inner", out="both", jobs="1", eval="test.jsonl flipped:-1=other.jsonl")
    assert call(argv) == 0
    out = capsys.readouterr().out
    assert "2 methods x 2 seeds = 4 runs" in out and "[4/4] hs-none-inner, seeds 0, 1" in out and out.count("elapsed") == 2 and "both/report.html" in out
    both = home / "both"
    for run in ("dpo/seed-0", "dpo/seed-1", "hs-none-inner/seed-0", "hs-none-inner/seed-1"):
        names = {p.name for p in (both / "runs" / run).iterdir()}
        assert {"config.yaml", "manifest.json", "metrics.jsonl", "adapter", "scores.parquet", "samples.jsonl"} <= names
    header = (both / "results.csv").read_text().splitlines()[0]
    assert header == "method,seed,set,role,polarity,n,accuracy,margin,p_chosen,nll_chosen"
    summary = json.loads((both / "summary.json").read_text())
    assert [s["label"] for s in summary["sets"]] == ["test", "flipped"] and summary["manifest"]["failed"] == {}
    assert "<svg" in (both / "report.html").read_text()
    before = {p: p.stat().st_mtime_ns for p in both.glob("runs/*/*/scores.parquet")}
    table = (both / "results.csv").read_text()

    assert call(argv) == 0
    assert "4 of them done already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in both.glob("runs/*/*/scores.parquet")} == before
    fails(capsys, words("dpo", "hs-none-inner", out="both", steps="5", eval="test.jsonl flipped:-1=other.jsonl"), "steps: 4 -> 5")

    (both / "results.csv").unlink()
    assert call(["report", "both"]) == 0
    assert (both / "results.csv").read_text() == table
    capsys.readouterr()
    assert call(["evaluate", "both/runs/dpo/seed-0", "--eval", "again=test.jsonl"]) == 0
    assert "again" in capsys.readouterr().out


def judged(capsys, home, out, *more):
    "A comparison with all that makes it fair, on tiny sizes; what it printed."
    argv = words("dpo", out=out, jobs="1", seeds="1", steps="2", eval="test.jsonl flipped:-1=other.jsonl", tune_seeds="1", lrs="0.001 0.01", scales="0.5 1 1.5",
                 **{f"no_{k}": None for k in ("tune_lr", "frontier", "coherence")})
    assert call([*argv, *more]) == 0
    return capsys.readouterr().out


def test_tuned_controlled_and_registered(capsys, home):
    out = judged(capsys, home, "fair", "--controls", "all", "--register")
    assert "5 methods x 1 seed = 5 runs, after 8 tuning runs (4 x 2 rates x 1 seed)" in out and out.startswith("plan ")
    plan, tune = (json.loads((home / "fair" / name).read_text()) for name in ("plan.json", "tune.json"))
    assert plan["hash"] in out and plan["config"]["seed"] > 10**6 and "equal KL" in plan["primary"]
    assert set(tune["methods"]) == {"dpo", "hs-none-retain", "hs-none-random", "hs-none-swapped"}
    assert all(t["chosen"] in (0.001, 0.01) for t in tune["methods"].values())
    run = next((home / "fair" / "runs" / "dpo").glob("seed-*"))
    assert {"frontier.parquet", "movement.json", "generations.jsonl", "coherence.json"} <= {p.name for p in run.iterdir()}
    twin = next((home / "fair" / "runs").glob("dpo_repeat*")) / run.name
    manifest, again = (json.loads((folder / "manifest.json").read_text()) for folder in (run, twin))
    assert manifest["settled"]["lr"] == tune["methods"]["dpo"]["chosen"] == again["settled"]["lr"] and manifest["settled"]["seed"] != again["settled"]["seed"]
    summary = json.loads((home / "fair" / "summary.json").read_text())
    assert {v["word"] for v in summary["judgement"]["verdicts"].values()} == {"demonstration"} and "sections not made" not in summary
    fails(capsys, words("dpo", out="fair", seeds="1"), "fair holds another configuration")
    fails(capsys, ["power", "fair"], "noise of a single seed", "at least 2 seeds")


def test_processes_and_one_process_agree(capsys, home):
    import pandas as pd
    for name, jobs in (("one", "1"), ("two", "2")):
        assert call(words("dpo", out=name, jobs=jobs)) == 0
    one, two = (pd.read_csv(home / name / "results.csv") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, rtol=1e-4, atol=1e-4)


def test_a_failing_run_does_not_stop_the_others(capsys, home):
    from reprpo.experiments.compare import compare

    def breaks(pi, ref):
        "Fails once the policy has moved."
        theta = pi.logp_cho - pi.logp_rej - ref.logp_cho + ref.logp_rej
        if theta.abs().max() > 1e-3 and len(theta) == 8: raise ValueError("it has moved")
        return -theta, {"theta": theta}

    results = compare(breaks, "dpo", model="model", train="train.jsonl", eval={"test": "test.jsonl"}, steps=4, seeds=1, out="breaks", **PLAIN)
    assert list(results.failed) == ["breaks, seed 0"] and "it has moved" in results.failed["breaks, seed 0"]
    assert list(results.scores.method.unique()) == ["base", "dpo"]


def test_own_loss_and_own_rows(home):
    from reprpo.experiments.compare import compare

    def apart(pi, ref, *, scale=1.0):
        "Log-ratio margin, straight."
        theta = (pi.logp_cho - pi.logp_rej) - (ref.logp_cho - ref.logp_rej)
        return -scale * theta, {"theta": theta}

    data = rows()
    results = compare("dpo", apart, model="model", train=data, eval={"test": data[:10], "flipped:-1": rows(flip=True)[:10]}, steps=4, seeds=1, out="own",
                      say=lambda text: None, **PLAIN)
    assert list(results.table.index) == ["base", "dpo", "apart"]
    assert "apart" in results._repr_markdown_() and results.forest().axes


def test_killed_and_resumed(home):
    argv = [sys.executable, "-m", "reprpo", *words("dpo", out="killed", steps="30", seeds="3", jobs="1", stack="1")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "REPRPO_CACHE": str(home / "cache")}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home, env=env)
    for line in process.stdout:
        if line.startswith("[1/3]"): break
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = sorted(p.parent.name for p in (home / "killed").glob("runs/dpo/seed-*/manifest.json"))
    assert "seed-0" in whole and len(whole) < 3
    assert sorted(p.name for p in (home / "killed" / "runs" / "dpo").glob("seed-*")) == whole
    first = (home / "killed/runs/dpo/seed-0/scores.parquet").stat().st_mtime_ns
    done = subprocess.run(argv, capture_output=True, text=True, cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    assert f"{len(whole)} of them done already" in done.stdout
    assert (home / "killed/runs/dpo/seed-0/scores.parquet").stat().st_mtime_ns == first
    assert len(list((home / "killed").glob("runs/dpo/seed-*/manifest.json"))) == 3
    assert not list((home / "killed").glob("runs/dpo/.seed-*")), "what a killed run left behind is cleared away"

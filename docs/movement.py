"""The runs behind the pages on what training moved: train what is missing, measure it, and keep a line for each run.

    python docs/movement.py [FOLDER] [SEEDS]    runs in FOLDER (reprpo-movement), which resumes; results in files/results

Ten minutes of one core.
"""
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from reprpo.decompose.movement import LEAST, merge, moved, summary
from reprpo.decompose.unembed import row_space
from reprpo.io import atomic_write, manifest, read_json, write_json
from reprpo.judge.generate import generate
from reprpo.judge.movement import kl_tokens
from reprpo.models import load_model
from reprpo.pairs.batch import batches
from reprpo.pairs.load import load_pairs
from reprpo.pairs.tokenize import TokenSet, context_length, tokenize_pairs
from reprpo.seeds import generator
from reprpo.states.cache import pad_id, reference_states
from reprpo.states.capture import blocks_of
from reprpo.states.forward import eval_mode, forward_states
from reprpo.states.pool import States
from reprpo.states.weights import head_weights
from reprpo.train.adapter import attached, scaled
from reprpo.train.many import train_many
from reprpo.train.trainer import Trained, train

ROOT = Path(__file__).parent.parent
COMMAND = "python docs/movement.py"
TRAIN = "world:facts/train"
SETS = {"facts": "in_domain", "facts_cross": "transfer", "kind": "transfer", "honesty": "transfer", "flattery": "transfer", "arith": "damage", "train": "train"}
NEUTRAL = ("world:obey_features/val", "world:arith/val")
ROWS = 120                    # of each set: half to measure movement on, half to judge on, no key in both
SEEDS, STEPS, BATCH = 16, 16, 8
TRAINED = ("dpo", "hs-none-inner", "hs-none-prefvec", "side-none-mse")
LADDER = (0.001, 0.002, 0.004, 0.008)       # learning rates: seed i has the (i mod 4)-th
RATES = {"side-none-mse": tuple(8 * x for x in LADDER)} # it has no output loss, and hardly moves at the others' rates
STRENGTHS = (3.0, 10.0, 20.0, 40.0)       # of steer, likewise
SHARE = 4                     # the head's subspace has h / SHARE directions


@dataclass(frozen=True)
class Set:
    "Pairs to judge on, with the reference's answers."
    name: str
    tokens: TokenSet
    measured: torch.Tensor    # rows that movement is measured on
    judged: torch.Tensor      # the others
    ref: States


@dataclass(frozen=True)
class Bench:
    "What all runs share."
    model: torch.nn.Module
    tokenizer: object
    train: object             # PairSet
    sites: list[str]
    sets: list[Set]
    texts: list               # the reference's own, to neutral prompts
    basis: torch.Tensor       # (h, k): what the output head reads most
    home: Path


def read_set(model, tokenizer, name: str, sites: list[str]) -> Set:
    "A test set in two halves by key, and the reference on it."
    parts = [p.sample(ROWS // 2) for p in load_pairs(TRAIN if name == "train" else f"world:{name}/test").split(0.5)]
    tokens = tokenize_pairs(replace(parts[0], rows=[*parts[0], *parts[1]]), tokenizer, context_length(tokenizer, model.config))
    first = torch.arange(len(tokens)) < len(parts[0])
    return Set(name, tokens, first.nonzero()[:, 0], (~first).nonzero()[:, 0], reference_states(model, tokens, sites))


def head_basis(model) -> torch.Tensor:
    "The first right singular vectors of the output head with the final norm's gain folded in."
    w = head_weights(model)
    return row_space(w).keep(k=w.shape[1] // SHARE).basis.T.float()


def prepare(home: Path) -> Bench:
    "Load the model, read the sets, run the reference."
    model, tokenizer = load_model("world", "cpu")
    sites = [f"hs.{k}" for k in range(1, len(blocks_of(model)) + 1)]
    prompts = [p.prompt for spec in NEUTRAL for p in load_pairs(spec).sample(16)]
    texts = generate(model, tokenizer, prompts, 24, seed=0)
    return Bench(model, tokenizer, load_pairs(TRAIN), sites, [read_set(model, tokenizer, s, sites) for s in SETS], texts, head_basis(model), home)


def on(model, s: Set, sites: list[str], batch: int = 60) -> Iterator[tuple[States, torch.Tensor]]:
    "The policy's states of a set, batch by batch, with their rows."
    with eval_mode(model):
        for b in batches(s.tokens, batch, "packed", pad_id(model)): yield forward_states(model, b, sites), b.rows


def measure_set(model, s: Set, bench: Bench) -> tuple[list[dict], dict, torch.Tensor]:
    "A row of movement for each layer, accuracy and margin on the other half, and the mean movements (layers 2 h)."
    found, scored = {site: [] for site in bench.sites}, []
    for pi, rows in on(model, s, bench.sites):
        ref, mine = s.ref.index(rows), torch.isin(rows, s.measured)
        for site in bench.sites if mine.any() else ():
            found[site].append(moved(*(x[site][mine] for x in (pi.cho, pi.rej, ref.cho, ref.rej))))
        scored.append(torch.stack([pi.mean_cho - pi.mean_rej, ref.mean_cho - ref.mean_rej])[:, ~mine])
    layers = [merge(found[site]) for site in bench.sites]
    pi, ref = torch.cat(scored, 1)
    judged = {"accuracy": float((pi > 0).float().mean()), "base": float((ref > 0).float().mean()), "margin": float((pi - ref).mean()), "n": len(pi)}
    return [summary(m, bench.basis) | {"layer": k + 1} for k, m in enumerate(layers)], judged, torch.stack([m.mean for m in layers])


def measure(model, bench: Bench, name: str, **told) -> None:
    "One run: a JSON file and its mean movements."
    rows, judged, means = [], {}, []
    for s in bench.sets:
        mine, judged[s.name], mean = measure_set(model, s, bench)
        rows += [r | {"set": s.name} for r in mine]
        means.append(mean)
    kl = kl_tokens(model, bench.texts, pad_id(model))[0]
    np.save(bench.home / f"{name}.npy", torch.stack(means).numpy())
    write_json(bench.home / f"{name}.json", told | {"kl": kl, "judged": judged, "layers": rows})


def last(run: Trained) -> dict:
    "What the training log says at the end."
    if not len(run.history): return {}
    end = run.history.iloc[-1]
    return {k: float(end[c]) for k, c in (("theta", "theta"), ("train_accuracy", "accuracy"), ("loss", "loss"))}


def size(model, bench: Bench) -> float:
    "Mean ‖δ‖/‖h‖ over the layers, on the measured half of the first set."
    return float(np.mean([r["size"] for r in measure_set(model, bench.sets[0], bench)[0]]))


def shuffled(run: Trained, seed: int) -> dict[str, torch.Tensor]:
    "A trained adapter's weights, the entries of each matrix in random order."
    mix = lambda k, x: x.flatten()[torch.randperm(x.numel(), generator=generator(seed, "movement", k))].view_as(x)
    return {k: mix(k, x) for k, x in run.weights.items()}


def measure_random(bench: Bench, run: Trained, name: str, seed: int, rate: float) -> None:
    "The null of `run`: its weights in random order, turned up until its states have moved as far."
    with run.attached() as model: asked, s = size(model, bench), 1.0
    with attached(bench.model, run.adapter, shuffled(run, seed)) as model:
        for _ in range(3):
            with scaled(model, s): s *= asked / size(model, bench)
        with scaled(model, s): measure(model, bench, name, method="random", seed=seed, knob=rate)


def train_method(bench: Bench, method: str, seeds: list[int]) -> Iterator[tuple[int, float, Trained]]:
    "Every seed with its rate, as many in one forward as pay; steer sees as many pairs as the others."
    if method == "steer":
        for i in seeds:
            strength = STRENGTHS[i % len(STRENGTHS)]
            pairs = bench.train.sample(STEPS * BATCH, seed=i)
            yield i, strength, train(bench.model, bench.tokenizer, f"steer:strength={strength:g}", pairs, seed=i, layout="shared", progress=False)
        return
    rates, options = [RATES.get(method, LADDER)[i % len(LADDER)] for i in seeds], dict(steps=STEPS, batch_size=BATCH, layout="shared", progress=False)
    yield from zip(seeds, rates, train_many(bench.model, bench.tokenizer, method, bench.train, seeds=seeds, lrs=rates, **options))


def run_all(bench: Bench, n: int) -> None:
    "Train and measure what is not there yet; of every dpo run a random adapter too."
    name = lambda method, seed: f"{method}-{seed}"
    done = lambda method, seed: (bench.home / f"{name(method, seed)}.json").exists()
    start, total = time.time(), n * (len(TRAINED) + 2)
    for some in (range(i, min(i + 8, n)) for i in range(0, n, 8)):
        for method in (*TRAINED, "steer"):
            todo = [i for i in some if not done(method, i) or (method == "dpo" and not done("random", i))]
            for seed, knob, run in train_method(bench, method, todo) if todo else ():
                with run.attached() as model: measure(model, bench, name(method, seed), method=method, seed=seed, knob=knob, **last(run))
                if method == "dpo": measure_random(bench, run, name("random", seed), seed, knob)
                print(f"{len(list(bench.home.glob('*.json')))} of {total} runs, {method} seed {seed}, {time.time() - start:.0f} s", flush=True)


def directions(home: Path) -> dict[tuple[str, int], torch.Tensor]:
    "The mean movements of every run: sets, layers, common or separating, h."
    return {(p.stem.rpartition("-")[0], int(p.stem.rpartition("-")[2])): torch.tensor(np.load(p)) for p in sorted(home.glob("*.npy"))}


def agreement(runs: dict[tuple[str, int], torch.Tensor]) -> pd.DataFrame:
    "Cosines of every run's mean common movement: with its own in domain, with the same method's other seeds, with dpo's of the same seed."
    unit = {k: torch.nn.functional.normalize(x[:, :, 0], dim=-1) for k, x in runs.items()}
    whole, lines = {}, []
    for (method, _), x in unit.items(): whole[method] = whole.get(method, 0) + x
    count = {m: sum(k[0] == m for k in unit) for m in whole}
    for (method, seed), x in unit.items():
        rest, same = (whole[method] - x) / max(1, count[method] - 1), unit.get(("dpo", seed), torch.full_like(x, float("nan")))
        found = {"self": (x * x[:1]).sum(-1), "seeds": (x * rest).sum(-1), "dpo": (x * same).sum(-1)}
        lines += [dict(method=method, seed=seed, set=name, layer=layer + 1) | {f"cos_{k}": float(c[s, layer]) for k, c in found.items()}
                  for s, name in enumerate(SETS) for layer in range(x.shape[1])]
    return pd.DataFrame(lines)


def collect(home: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    "A line for each run, and one for each run, set and layer."
    lines, layers, order = [], [], ["method", "seed"]
    for path in sorted(home.glob("*.json")):
        run = read_json(path)
        who = {k: run[k] for k in (*order, "knob")}
        gains = {f"gain_{s}": 100 * (j["accuracy"] - j["base"]) for s, j in run["judged"].items()}
        margins = {f"margin_{s}": j["margin"] for s, j in run["judged"].items()}
        lines.append(who | {k: run.get(k) for k in ("kl", "theta", "train_accuracy")} | gains | margins)
        layers += [who | r for r in run["layers"]]
    found = pd.DataFrame(layers).drop(columns="knob").merge(agreement(directions(home)), on=[*order, "set", "layer"])
    found.loc[found["size"] <= LEAST, [c for c in found if c.startswith("cos_")]] = np.nan
    return pd.DataFrame(lines).sort_values(order), found.sort_values([*order, "set", "layer"])


def main(home: Path, n: int = SEEDS) -> None:
    "Run, collect, keep."
    home.mkdir(parents=True, exist_ok=True)
    run_all(prepare(home), n)
    runs, layers = collect(home)
    out = ROOT / "files/results"
    atomic_write(out / "movement.csv", runs.round(5).to_csv(index=False))
    kept = layers[[c for c in layers if not (c.startswith(("rank90", "rank_null")) or c in ("inside_null", "inside_rej"))]]
    kept.round(4).astype({c: "float32" for c in kept.select_dtypes("float64")}).to_parquet(out / "movement.parquet", index=False, compression="zstd")
    rates = {m: RATES.get(m, LADDER) for m in TRAINED}
    config = dict(train=TRAIN, sets=SETS, rows=ROWS, steps=STEPS, batch_size=BATCH, seeds=n, methods=[*TRAINED, "steer", "random"], rates=rates,
                  strengths=STRENGTHS, subspace=f"1/{SHARE} of h", neutral=NEUTRAL)
    write_json(out / "movement.json", manifest(config, command=COMMAND))
    print(runs.groupby(["method", "knob"])[["kl", "gain_facts", "gain_kind", "gain_honesty", "margin_facts"]].mean().round(3).to_string())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "reprpo-movement"), int(sys.argv[2]) if len(sys.argv) > 2 else SEEDS)

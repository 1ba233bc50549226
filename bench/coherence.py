"""Damage models of the world on purpose and hold the coherence number against the parser: python bench/coherence.py [OUT]

Writes one line a model to files/results/coherence.csv. Lines that are there are not made again, so it can be interrupted.
"""
import copy
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from reprpo.judge.coherence import coherence, damage, status
from reprpo.judge.generate import generate
from reprpo.judge.planted import noisy, parser_share, world_prompts
from reprpo.models import load_model
from reprpo.train.adapter import scaled
from reprpo.train.trainer import train

OUT = Path(__file__).parent.parent / "files" / "results" / "coherence.csv"
HOME = {0: "facts", 1: "kind"}  # the set that models of even and odd seeds belong to


@dataclass(frozen=True)
class Plan:
    "One model."
    group: str            # base, trained, scaled, overtrained or noise
    seed: int             # of training, of the noise, of the texts
    method: str = ""
    lr: float = 0.0
    steps: int = 0
    scale: float = 1.0    # of the adapter
    noise: float = 0.0    # of the weights, in their standard deviations


def trainings() -> list[Plan]:
    "Adapters to train: settings that a user would try, and settings far beyond."
    usual = [("dpo", 1e-4, 0), ("dpo", 3e-4, 0), *((m, lr, seed) for m in ("dpo", "ipo", "hs-none-inner") for lr, seed in ((1e-3, 0), (1e-3, 1))),
             ("ipo", 3e-4, 0), ("hs-none-inner", 3e-4, 0)]
    far = [("dpo", 3e-3, 60, 0), ("dpo", 1e-2, 60, 1), ("ipo", 3e-3, 60, 1), ("hs-none-inner", 3e-3, 60, 0), ("hs-none-inner", 1e-2, 60, 1),
           ("dpo", 3e-3, 120, 1)]
    return [Plan("overtrained", seed, m, lr, steps) for m, lr, steps, seed in far] + [Plan("trained", seed, m, lr, 60) for m, lr, seed in usual]


def scales(plan: Plan) -> list[Plan]:
    "The trained model, and its adapter turned up or down."
    at = lambda group, *some: [Plan(**asdict(plan) | {"scale": s, "group": group}) for s in some]
    if plan.group == "overtrained": return [plan, *at(plan.group, 0.25, 0.5)]
    if plan.method == "dpo" and plan.lr < 1e-3: return [plan, *at(plan.group, 0.5, 1.5)] + (at("scaled", 2.0, 3.0, 5.0, 8.0) if plan.lr == 3e-4 else [])
    return [plan, *at(plan.group, 1.5)] + (at("scaled", 2.0, 3.0, 5.0, 8.0) if plan.lr == 1e-3 and not plan.seed else [])


def untrained() -> list[Plan]:
    "The base model with noise on its weights, and the base model again."
    sizes = (0.05, 0.1, 0.15, 0.175, 0.2, 0.25, 0.3, 0.5)
    return [Plan("noise", seed, noise=x) for seed in (0, 1, 2) for x in sizes] + [Plan("base", seed) for seed in range(20)]


class Bench:
    "The world, its base texts, and what is done already."

    def __init__(self, out: Path):
        self.out, self.start = out, time.process_time()
        self.model, self.tokenizer = load_model("world", device="cpu")
        self.clean = copy.deepcopy(self.model)
        self.done = pd.read_csv(out, keep_default_na=False).to_dict("records") if out.exists() else []
        self.prompts = {s: world_prompts(HOME[s], seed=s) for s in HOME}
        self.test = {s: world_prompts(HOME[s], "test", 24, 8, 40, seed=s) for s in HOME}
        self.own = {}

    def base(self, side: int) -> tuple[dict, dict]:
        "What the base model writes, and its parser shares; the shares are taken from the table where it has them."
        if side not in self.own:
            told = next(({"share": row["base_share"]} for row in self.done if row["train"] == HOME[side]), None)
            self.own[side] = coherence(self.model, self.tokenizer, self.prompts[side], seed=side)[1], told or self.truth(self.clean, side, range(3))
        return self.own[side]

    def truth(self, model, side: int, seeds) -> dict:
        "Parser shares on other prompts, of other samples."
        return parser_share([g for s in seeds for g in generate(model, self.tokenizer, self.test[side], 48, seed=1000 + s)])

    def todo(self, plan: Plan) -> bool:
        return not any(all(str(row[k]) == str(v) for k, v in asdict(plan).items()) for row in self.done)

    def look(self, model, plan: Plan) -> None:
        "One line of the table."
        side = plan.seed % 2
        (base, own), texts = self.base(side), {"seed": 100 + plan.seed, "reference": self.clean if plan.noise else None}
        found = coherence(model, self.tokenizer, self.prompts[side], base, **texts)[1]
        share = own if plan.group == "base" else self.truth(model, side, [plan.seed])
        row = asdict(plan) | {"train": HOME[side]} | share | {"base_share": own["share"], "fall": 1 - share["share"]/own["share"]}
        row |= found | {f"base_{k}": base[k] for k in found} | {k: v for k, v in base.items() if k.startswith("sd_")}
        self.done.append(row | {"damage": damage(found, base), "status": status(found, base)})
        pd.DataFrame(self.done).to_csv(self.out, index=False, float_format="%.6g")
        self.done = pd.read_csv(self.out, keep_default_na=False).to_dict("records")
        print(f"{time.process_time() - self.start:5.0f} s  {plan}  fall {row['fall']:.3f}  damage {self.done[-1]['damage']:.2f}", flush=True)

    def run(self) -> None:
        plain = untrained()
        for plan in filter(self.todo, [p for p in plain if p.noise]):
            with noisy(self.model, plan.noise, plan.seed) as model: self.look(model, plan)
        for plan in trainings():
            left = [p for p in scales(plan) if self.todo(p)]
            if not left: continue
            found = train(self.model, self.tokenizer, plan.method, f"world:{HOME[plan.seed % 2]}", steps=plan.steps, lr=plan.lr, seed=plan.seed, progress=False)
            with found.attached() as model:
                for p in left:
                    with scaled(model, p.scale): self.look(model, p)
        for plan in filter(self.todo, [p for p in plain if not p.noise]): self.look(self.model, plan)


if __name__ == "__main__":
    out = Path(sys.argv[1]) if sys.argv[1:] else OUT
    out.parent.mkdir(parents=True, exist_ok=True)
    Bench(out).run()

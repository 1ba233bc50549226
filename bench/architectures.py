"""What runs: architecture x states x mode x dtype x quantisation, each cell tried as tests/test_architectures.py tries it.

    python bench/architectures.py

writes files/results/architectures.csv (one line a cell) and architectures.json (how it was made); about ten minutes on one core. Cells with quantised
bases need bitsandbytes; without it, and for what a CPU cannot do, the line says why there is no number.
"""
import copy
import functools
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from architectures import KINDS, MODES, adapted, batch_of, build, decoded, expected_sites, gradient, merged, naive, run, tokens  # noqa: E402
from tiny import tiny_rows, tiny_tokenizer  # noqa: E402

from reprpo.errors import UserError  # noqa: E402
from reprpo.io import atomic_write, manifest, write_json  # noqa: E402
from reprpo.models import load_model  # noqa: E402
from reprpo.pairs.load import load_pairs  # noqa: E402
from reprpo.pairs.tokenize import tokenize_pairs  # noqa: E402
from reprpo.states.forward import forward_states  # noqa: E402
from reprpo.states.score import score  # noqa: E402
from reprpo.train.adapter import remove_adapter  # noqa: E402
from reprpo.train.checks import base_checksum  # noqa: E402

OUT = ROOT / "files/results"
SOURCES = ("hs", "in", "out")
# weights, precision of training, quantisation -> largest difference from the naive fp32 reading that counts as rounding, relative to the largest state
VARIANTS = {("float32", "fp32", "none"): 1e-4, ("bfloat16", "fp32", "none"): 0.1, ("float16", "fp32", "none"): 0.02, ("float32", "bf16", "none"): 0.1,
            ("float32", "fp32", "8bit"): 0.1, ("bfloat16", "fp32", "8bit"): 0.1, ("float32", "fp32", "4bit"): 1e-4, ("bfloat16", "fp32", "4bit"): 0.1}
GPU = {("float32", "fp16", "none"): "precision=fp16 needs a CUDA GPU with a gradient scaler"}


@functools.cache
def token_set(): return tokens(8)


@functools.cache
def folder(kind: str) -> str:
    "The architecture as a folder with its tokenizer."
    where = tempfile.mkdtemp()
    build(kind).save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


def fresh(kind: str, dtype: str, quantize: str):
    "The base of one variant, the same at every call."
    return build(kind, dtype=getattr(torch, dtype)) if quantize == "none" else load_model(folder(kind), "cpu", dtype, quantize)[0]


def readings(kind: str, dtype: str, precision: str, quantize: str) -> dict[str, float]:
    "By source: how far captured states of an adapted model are from the naive reading in fp32 of the same weights, relative to the largest."
    model = fresh(kind, dtype, quantize)
    plain = copy.deepcopy(model).float() if quantize == "none" else decoded(model, build(kind, dtype=getattr(torch, dtype)).float())
    peft = adapted(model)
    expected, _ = naive(merged(plain, peft), kind, token_set())
    found = {}
    for source in SOURCES:
        sites = expected_sites(kind, source)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            states = forward_states(peft, batch_of(token_set()), sites)
        found[source] = max(((torch.cat([states.cho[s], states.rej[s]]) - expected[s]).abs().max() / expected[s].abs().max()).item() for s in sites)
    remove_adapter(peft)
    return found


def scores(model):
    "Log-probabilities of rows no run has seen, all in one batch."
    return score(model, tokenize_pairs(load_pairs(tiny_rows(8, seed=9)), tiny_tokenizer()))[["logp_cho", "logp_rej"]].to_numpy()


def try_cell(kind: str, source: str, mode: str, variant: tuple, capture: float) -> dict:
    "Gradient against the plain one, a run of three steps, the base's bits, and the reloaded adapter's scores."
    dtype, precision, quantize = variant
    model, sites = fresh(kind, dtype, quantize), expected_sites(kind, source)
    peft = adapted(model)
    grads = {}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        for m in {"plain", mode}: grads[m], _ = gradient(peft, kind, sites, token_set(), m)
    remove_adapter(peft)
    apart = ((grads[mode] - grads["plain"]).norm() / grads["plain"].norm()).item()
    bits = base_checksum(model)
    with tempfile.TemporaryDirectory() as out:
        trained = run(model, source, mode, out, precision=precision)
        with trained.attached() as policy: ours = scores(policy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            again = PeftModel.from_pretrained(fresh(kind, dtype, quantize), f"{out}/adapter").eval()
    reload, same = float(abs(scores(again) - ours).max()), base_checksum(model) == bits
    good = capture <= VARIANTS[variant] and grads["plain"].norm() > 0 and apart <= VARIANTS[variant] * 3 and same and reload == 0
    return dict(status="ok" if good else "FAILED", capture=capture, gradient=apart, reload=reload, base="same" if same else "changed", why="")


def cells():
    "Every line of the table."
    for kind, variant in product(KINDS, [*VARIANTS, *GPU]):
        why, capture = GPU.get(variant, ""), {}
        if variant[2] != "none" and find_spec("bitsandbytes") is None: why = "bitsandbytes is not installed"
        if not why: capture = readings(kind, *variant)
        for source, mode in product(SOURCES, MODES):
            line = dict(architecture=kind, states=source, mode=mode, weights=variant[0], precision=variant[1], quantised=variant[2])
            if why: yield line | dict(status="needs a GPU, untested" if variant in GPU else "untested", why=why); continue
            try: yield line | try_cell(kind, source, mode, variant, capture[source])
            except UserError as e: yield line | dict(status="refused", why=str(e))
            except RuntimeError as e: yield line | dict(status="FAILED", why=str(e).splitlines()[0][:160])


def main() -> int:
    os.environ.setdefault("REPRPO_CACHE", tempfile.mkdtemp())
    torch.set_num_threads(1)
    lines = []
    for line in cells():
        lines.append(line)
        if line["status"] != "ok": print(*line.values(), flush=True)
    table = pd.DataFrame(lines)
    atomic_write(OUT / "architectures.csv", table.to_csv(index=False, float_format="%.3g"))
    bits = {"bitsandbytes": version("bitsandbytes")} if find_spec("bitsandbytes") else {}
    write_json(OUT / "architectures.json", manifest({"variants": [*VARIANTS, *GPU], "bounds": list(VARIANTS.values())}, **bits))
    print(table.status.value_counts().to_string())
    return int((table.status == "FAILED").any())


if __name__ == "__main__":
    raise SystemExit(main())

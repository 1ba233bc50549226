"""The right singular space of an output head three ways: our eigh(WᵀW), torch.linalg.svd, and scikit-learn's randomized SVD, on the same matrix.

    python bench/svd.py
    python bench/svd.py --vocab 32000 --width 512 --k 128 --name 32000x512

The first line takes 151,936 x 1,024 on two threads: 3 GB of memory and some four minutes,
most of them scikit-learn's.
Each replaces its own entry of the results file.

The matrix is drawn: directions at random, singular values that fall as a power, and a mean row that is louder than all of them, as in trained heads.
The truth is a Householder QR of the matrix in fp64, a chunk of rows at a time, and the SVD of its R: no Gram matrix is in it.
All arms run in one process, one after the other in every round, and a ratio is of times in the same round.
Memory is what the process holds more, at its peak, than before the arm began (Linux only).
"""
import ctypes
import gc
import os
import platform
import re
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from dpo_step import portable
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from reprpo.decompose.unembed import row_space
from reprpo.io import manifest, read_json, write_json
from reprpo.seeds import generator

BASE = "torch.linalg.svd"
STATUS = Path("/proc/self/statm")


@dataclass(frozen=True)
class Options:
    "What to run."
    vocab: int = 151_936             # V: rows
    width: int = 1_024               # H: columns
    k: int = 256                     # rank of the subspace that is asked for
    fall: float = 0.35               # singular value i falls as i to this power; the mean row comes on top
    mean: float = 0.3                # size of the mean row, in sizes of a typical row
    rounds: int = 3                  # times that all arms run
    threads: int = 2                 # CPU threads
    seed: int = 0
    name: str = "151936x1024"        # of the entry
    out: Path = Path("files/results/svd.json")


def make_head(o: Options) -> torch.Tensor:
    "A tall fp32 matrix with a falling spectrum and a mean row."
    rng = generator(o.seed, "head", o.vocab, o.width)
    draw = lambda *shape: torch.randn(*shape, generator=rng)
    turn = torch.linalg.qr(draw(o.width, o.width)).Q
    size = torch.arange(1, o.width + 1).float() ** -o.fall
    W = torch.empty(o.vocab, o.width)
    mean = o.mean * size.norm() * torch.nn.functional.normalize(draw(o.width), dim=0)
    for rows in W.split(8192): rows.copy_((draw(*rows.shape) * size) @ turn.T + mean)
    return W


def truth(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Singular values and right singular vectors (rows) by QR in fp64."
    R = torch.empty(0, W.shape[1], dtype=torch.float64)
    for rows in W.split(8192): R = torch.linalg.qr(torch.cat([R, rows.double()]), mode="r").R
    _, S, Vh = torch.linalg.svd(R)
    return S, Vh


def ours(W, k, dtype):
    space = row_space(W, dtype=dtype)
    return space.S[:k], space.basis[:k]


def whole(W, k):
    _, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return S[:k], Vh[:k]


def randomized(W, k, rounds="auto"):
    _, S, Vh = randomized_svd(W.numpy(), k, n_iter=rounds, random_state=0)
    return torch.from_numpy(S), torch.from_numpy(Vh)


ARMS = {BASE: whole, "eigh(WᵀW), fp64": lambda W, k: ours(W, k, torch.float64), "eigh(WᵀW), fp32 products": lambda W, k: ours(W, k, torch.float32),
        "randomized_svd": randomized, "randomized_svd, n_iter=10": lambda W, k: randomized(W, k, 10)}


def resident() -> int:
    "Bytes of this process in memory; 0 where the kernel does not say."
    return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATUS.exists() else 0


def trim() -> None:
    "Give freed memory back, so that one arm's leavings are not the next one's start."
    gc.collect()
    if sys.platform == "linux": getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


@contextmanager
def watched():
    "A dict that is told the peak of resident memory in the block, over its start, in GB."
    found, over = {"start": resident(), "peak": 0}, threading.Event()

    def look():
        while not over.is_set():
            found["peak"] = max(found["peak"], resident())
            over.wait(0.01)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try: yield found
    finally:
        over.set()
        watcher.join()
        found["gb"] = max(0, found["peak"] - found["start"]) / 1e9


def errors(S, Vh, true_S, true_Vh, k: int) -> dict[str, float]:
    "How far the subspace of the first k directions is off: the sine of the largest principal angle, the projectors' difference, the values."
    Vh = torch.linalg.qr(Vh.double().T).Q.T
    left = true_Vh[:k] - true_Vh[:k] @ Vh.T @ Vh
    sines = torch.linalg.svdvals(left)
    return {"sine": float(sines[0]), "projector": float(2**0.5 * sines.norm()), "values": float(((S.double() - true_S[:k]) / true_S[:k]).abs().max())}


def run(arm: str, W: torch.Tensor, k: int, known) -> dict:
    "One arm once: seconds by the clock and of the processor, memory, errors."
    trim()
    with watched() as memory:
        start, busy = time.perf_counter(), time.process_time()
        S, Vh = ARMS[arm](W, k)
        seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    return {"arm": arm, "seconds": seconds, "cpu": cpu, "gb": memory["gb"]} | errors(S, Vh, *known, k)


def table(runs: pd.DataFrame) -> pd.DataFrame:
    "One line for each arm: medians, and ratios of times in the same round."
    by = lambda column: runs.pivot(index="round", columns="arm", values=column)
    seconds, ratio = by("seconds"), by("seconds").rdiv(by("seconds")[BASE], axis=0)
    mid = runs.groupby("arm", sort=False).median(numeric_only=True)
    return pd.DataFrame([{"arm": a, "seconds": seconds[a].median(), "cpu seconds": mid.cpu[a],
                          "times faster": ratio[a].median(), "least": ratio[a].min(), "most": ratio[a].max(),
                          "GB": mid.gb[a], "sine": mid.sine[a], "projector": mid.projector[a], "values": mid["values"][a]} for a in ARMS])


def main(o: Options) -> None:
    torch.set_num_threads(o.threads)
    W = make_head(o)
    start = time.perf_counter()
    known = truth(W)
    print(f"{o.vocab:,} x {o.width:,}, {W.nbytes / 1e9:.2f} GB; truth by QR in {time.perf_counter() - start:.0f} s", flush=True)
    runs = []
    with threadpool_limits(o.threads):
        for r in range(o.rounds):
            for arm in ARMS:
                runs.append(run(arm, W, o.k, known) | {"round": r})
                print(f"round {r + 1} of {o.rounds} · {arm} · {runs[-1]['seconds']:.1f} s · sine {runs[-1]['sine']:.0e}", flush=True)
    runs = pd.DataFrame(runs)
    result, S = table(runs), known[0]
    gap = float((S[o.k - 1] - S[o.k]) / S[o.k - 1]) if o.k < o.width else None
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1) if Path("/proc/cpuinfo").exists() else platform.processor()
    spectrum = S[:: max(1, o.width // 128)].tolist()
    where = dict(cpu=cpu, threads=torch.get_num_threads(), load=os.getloadavg(), matrix_gb=W.nbytes / 1e9, gap=gap, spectrum=spectrum)
    config = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(o).items()}
    entry = manifest(config, **where, arms=result.to_dict("records"), runs=runs.to_dict("records")) | {"command": " ".join(map(portable, sys.argv))}
    write_json(o.out, (read_json(o.out) if o.out.exists() else {}) | {o.name: entry})
    print(result.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    print(f"{where['threads']} threads, load {where['load'][0]:.1f}; written to {o.out}")


if __name__ == "__main__": main(tyro.cli(Options, description=__doc__))

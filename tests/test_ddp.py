"""Two data-parallel processes make the run of one process."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_rows, tiny_tokenizer

from reprpo.train.trainer import train

OPTIONS = dict(steps=3, batch_size=8, micro_batch=4, log_every=1, layers="[1,2]", progress=False)


@pytest.mark.timeout(240)
def test_two_processes_are_one(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRPO_CACHE", str(tmp_path / "cache"))
    one = train(tiny_model(), tiny_tokenizer(), "hs-none-inner", tiny_rows(), **OPTIONS)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path / "two")]
    done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [r["world"] for r in map(json.loads, (tmp_path / "world.jsonl").read_text().splitlines())] == [2, 2]
    for key in ("loss", "grad_norm", "theta", "q/n", "accuracy"):
        assert [r[key] for r in rows] == pytest.approx(one.history[key].tolist(), rel=1e-4, abs=1e-6), key
    assert (tmp_path / "two/adapter/adapter_model.safetensors").exists()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    with open(out.parent / "world.jsonl", "a") as file: file.write(json.dumps({"world": int(os.environ["WORLD_SIZE"])}) + "\n")
    train(tiny_model(), tiny_tokenizer(), "hs-none-inner", tiny_rows(), out=out, **OPTIONS)

"""A run that is killed goes on where it was, to exactly the same adapter and the same metrics."""
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny import slow, start, tiny_model, tiny_rows, tiny_tokenizer

from reprpo.errors import UserError
from reprpo.io import read_jsonl
from reprpo.train.trainer import train

OPTIONS = dict(steps=18, batch_size=8, micro_batch=4, save_every=5, log_every=4, dropout=0.1, seed=1, progress=False, layout="concat")  # repeats to the bit


def metrics(out):
    "What was logged, without the clock."
    return [{k: v for k, v in row.items() if k != "tokens/s"} for row in read_jsonl(out / "metrics.jsonl")]


@pytest.mark.timeout(240)
def test_kill_and_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRPO_CACHE", str(tmp_path / "cache"))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    train(model, tokenizer, slow, tiny_rows(), out=tmp_path / "whole", **OPTIONS)
    out = tmp_path / "killed"
    child = start(__file__, out, 0.1)
    while not (out / "checkpoints/checkpoint-5/complete").exists():
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "adapter").exists()
    (out / "checkpoints/checkpoint-15").mkdir()                  # one that was cut short
    with pytest.raises(UserError, match="checkpoints of another run"): train(model, tokenizer, slow, tiny_rows(), out=out, **OPTIONS | dict(seed=2))
    assert start(__file__, out, 0).wait() == 0
    a, b = (load_file(o / "adapter/adapter_model.safetensors") for o in (tmp_path / "whole", out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(out) == metrics(tmp_path / "whole")
    assert not (out / "checkpoints").exists()


if __name__ == "__main__": train(tiny_model(), tiny_tokenizer(), slow, tiny_rows(), out=sys.argv[1], **OPTIONS)

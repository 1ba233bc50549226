"""A random Llama of a few kilobytes with a byte tokenizer, and pairs for it: enough to test mechanisms, nothing to learn from."""
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    "Byte-level BPE with a few merges and an end-of-sequence token."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator([row["prompt"] + row["chosen"] for row in tiny_rows(60)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>", pad_token="<eos>", model_max_length=128)


def tiny_model(seed: int = 0, width: int = 32, layers: int = 4, vocab: int = 320) -> LlamaForCausalLM:
    "Frozen, in eval mode; the same for the same seed."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=0, bos_token_id=0, initializer_range=0.2))
    return model.eval().requires_grad_(False)


def tiny_rows(n: int = 24, seed: int = 0) -> list[dict]:
    "Questions about colours; the answer preferred is drawn at random."
    r, rows = random.Random(seed), []
    for i in range(n):
        a, b = r.sample(["red", "green", "blue", "dark brown"], 2)
        rows.append(dict(prompt=f"Q: What colour is the {r.choice(['cat', 'dog', 'sky', 'tree'])} {i}?\nA:", chosen=f" It is {a}.", rejected=f" It is {b}."))
    return rows


def slow(pi, ref):
    "DPO that takes its time, so that a kill falls between two steps."
    time.sleep(float(os.environ.get("SLOW", 0)))
    loss = -torch.nn.functional.logsigmoid(0.1 * ((pi.logp_cho - pi.logp_rej) - (ref.logp_cho - ref.logp_rej)))
    return loss, {"dpo": loss}


slow.needs_states = False


def start(script, out, pause: float) -> subprocess.Popen:
    "A test file as a script, in a process of its own: what its last line trains, `slow` by so many seconds a loss."
    env = os.environ | {"SLOW": str(pause), "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}
    return subprocess.Popen([sys.executable, script, str(out)], env=env)

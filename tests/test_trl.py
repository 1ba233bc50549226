"""The yardstick: TRL's DPOTrainer, on the same model and rows, has the same tokens, losses, metrics, gradients and steps."""
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from reprpo.losses.output import dpo, ipo
from reprpo.models import load_model, load_tokenizer
from reprpo.pairs.batch import collate
from reprpo.pairs.load import load_pairs
from reprpo.pairs.tokenize import pad_id, tokenize_pairs
from reprpo.states.forward import forward_states, reference_mode
from reprpo.train.adapter import adapter_params, add_adapter, lora_config
from reprpo.train.config import TrainConfig
from reprpo.train.feed import pair_order
from reprpo.train.trainer import train

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
pytestmark = pytest.mark.timeout(240)

ROWS = [dict(prompt=f"Q: {q}\nA:", chosen=good, rejected=bad) for q, good, bad in (
    ("2+2?", " 4", " 5"),
    ("What colour is the sky?", " It is blue.", " It is dark brown, as everybody knows."),
    ("A glass costs $5 and every second one 60% of it. What do 16 cost?",
     " 60/100 * 5 = $3.\n8 * 3 = $24.\n8 * 5 = $40.\n24 + 40 = $64.\nA: 64", " 16 * 5 = $80.\nA: 80"),
    ("Où est le café à 3 × 4 = 12 m?", " Là-bas, naïve cœur.", " Nulle part — ☕."),
    ("Is the cat red?", " It is red.", " It is green."),
    ("Tom has 7 dogs and gives 2 away. How many are left?", " 7 - 2 = 5.\nA: 5", " 7 + 2 = 9, then 9 is left over after all.\nA: 9"),
    ("Say nothing.", " .", " I will not, and I shall tell you at length why not: the tree is green, the dog is red."),
    ("What colour is the tree?", " It is green.", " It is blue, it is red.\n\nNo: it is green."),
)]
CONFIG = TrainConfig(rank=4, alpha=8.0, lr=3e-3, steps=5, batch_size=4, log_every=1, layout="concat")  # ties at step 0 are exact a row per answer


def trl_trainer(model, tokenizer, folder, rows=ROWS, order=None, **options):
    "TRL's trainer, with everything off that is not DPO in fp32; the reference is the model with its adapter off."
    from datasets import Dataset

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, train_dataset=None): return order or range(len(rows))

    args = trl.DPOConfig(output_dir=str(folder), bf16=False, gradient_checkpointing=False, max_length=None, use_cpu=True, report_to="none",
                         disable_tqdm=True, save_strategy="no", **dict(per_device_train_batch_size=len(rows)) | options)
    return InOrder(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora_config(CONFIG))


def copy_adapter(source, target) -> None:
    "The same adapter weights on another copy of the model."
    there = adapter_params(target)
    with torch.no_grad():
        for name, p in adapter_params(source).items(): there[name].copy_(p)


def nudge(model) -> None:
    "Move B away from zero, so that the policy is not its reference and no margin is 0."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in adapter_params(model).items():
            if "lora_B" in name: p.copy_(0.1 * torch.randn(p.shape, generator=g))


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("REPRPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        m.setenv("TQDM_DISABLE", "1")
        yield


@pytest.fixture(scope="module", params=["bytes", "world"])
def folder(request, tmp_path_factory):
    "A model on disk: its tokenizer without BOS and padded with EOS, or with BOS and a pad token of its own."
    tokenizer = tiny_tokenizer() if request.param == "bytes" else load_tokenizer("world")
    tokenizer.model_max_length, path = 512, tmp_path_factory.mktemp(request.param)
    model = tiny_model(vocab=1024)
    model.config.max_position_embeddings = 512
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    "Policy, token set and batch."
    model, tokenizer = load_model(str(folder), device="cpu")
    tokens = tokenize_pairs(load_pairs(ROWS), tokenizer)
    peft = add_adapter(model, CONFIG)
    nudge(peft)
    return peft, tokens, collate(tokens.pairs, list(range(len(tokens))), pad_id(tokenizer))


def theirs(folder, ours, **options):
    "TRL's trainer with our adapter on it."
    trainer = trl_trainer(*load_model(str(folder), device="cpu"), folder / "trl", **options)
    copy_adapter(ours[0], trainer.model)
    trainer.model.train()
    return trainer


def states(peft, batch):
    pi = forward_states(peft, batch)
    with reference_mode(peft): ref = forward_states(peft, batch)
    return pi, ref


def test_tokens(folder, ours):
    "The same ids and the same scored positions, EOS among them, in the same rows of the batch."
    trainer, (_, tokens, batch) = theirs(folder, ours), ours
    for row, pair in zip(trainer.train_dataset, tokens.pairs):
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (pair.prompt, pair.chosen, pair.rejected)
        assert pair.chosen_start == pair.rejected_start == 0
        assert pair.chosen[-1] == pair.rejected[-1] == trainer.processing_class.eos_token_id
    theirs_batch, scored = next(iter(trainer.get_train_dataloader())), torch.zeros_like(batch.ids)
    scored[batch.tok_row, batch.tok_pos] = 1
    assert torch.equal(theirs_batch["completion_mask"], scored)
    assert torch.equal(theirs_batch["attention_mask"], batch.attention_mask())
    assert torch.equal(theirs_batch["input_ids"], batch.ids)


@pytest.mark.parametrize("loss,name,beta", [(dpo, "sigmoid", 0.1), (dpo, "sigmoid", 0.5), (ipo, "ipo", 0.4)])
@pytest.mark.parametrize("precomputed", [False, True])
def test_loss_metrics_and_gradient(folder, ours, loss, name, beta, precomputed):
    "Loss, rewards, log-probabilities and the adapter's gradient of one batch; then the loss of every pair by itself."
    trainer = theirs(folder, ours, loss_type=[name], beta=beta, precompute_ref_log_probs=precomputed)
    peft, _, batch = ours
    pi, ref = states(peft, batch)
    per_pair, _ = loss(pi, ref, beta=beta)
    peft.zero_grad()
    per_pair.mean().backward()
    value = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    value.backward()
    metrics = {k: v[0] for k, v in trainer._metrics["train"].items()}
    assert value.item() == pytest.approx(per_pair.mean().item(), rel=1e-4)
    mine = {"logps/chosen": pi.logp_cho, "logps/rejected": pi.logp_rej,
            "rewards/chosen": beta * (pi.logp_cho - ref.logp_cho), "rewards/rejected": beta * (pi.logp_rej - ref.logp_rej)}
    for key, x in mine.items(): assert metrics[key] == pytest.approx(x.mean().item(), rel=1e-4), key
    assert metrics["num_tokens"] == batch.attention_mask().sum()
    assert (pi.logp_cho - ref.logp_cho - pi.logp_rej + ref.logp_rej).abs().min() > 0.01, "a margin of 0 would hide a difference"
    there = adapter_params(trainer.model)
    for k, p in adapter_params(peft).items(): assert (p.grad - there[k].grad).norm() <= 1e-4 * p.grad.norm(), k
    if precomputed: return
    for i, row in enumerate(trainer.train_dataset):
        alone = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
        assert alone.item() == pytest.approx(per_pair[i].item(), rel=1e-4), i


@pytest.mark.parametrize("method,name,beta", [("dpo:beta=0.1", "sigmoid", 0.1), ("ipo:beta=0.4", "ipo", 0.4)])
def test_training(folder, ours, method, name, beta):
    "From the same adapter, over the same rows in the same order, five optimiser steps log the same numbers."
    trained = train(*load_model(str(folder), device="cpu"), method, ROWS, CONFIG, progress=False)
    model, tokenizer = load_model(str(folder), device="cpu")
    trainer = trl_trainer(model, tokenizer, folder / "trl", order=pair_order(len(ROWS), CONFIG.steps * CONFIG.batch_size, CONFIG.seed),
                          loss_type=[name], beta=beta, learning_rate=CONFIG.lr, max_steps=CONFIG.steps, warmup_steps=CONFIG.warmup_steps,
                          lr_scheduler_type=CONFIG.schedule, weight_decay=CONFIG.weight_decay, max_grad_norm=CONFIG.clip, logging_steps=1,
                          per_device_train_batch_size=CONFIG.batch_size)
    start = add_adapter(load_model(str(folder), device="cpu")[0], CONFIG, CONFIG.seed)
    copy_adapter(start, trainer.model)
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    metrics = [f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")] + ["logps/chosen", "logps/rejected"]
    for key in ("loss", "grad_norm", *metrics):
        assert [row[key] for row in history] == pytest.approx(trained.history[key].tolist(), rel=1e-3, abs=1e-4), key
    assert trained.history["loss"].iloc[-1] < 0.99 * trained.history["loss"].iloc[0]


def test_where_tokens_differ(tmp_path):
    "A prompt that ends inside a token: both leave the whole token to the answer; TRL may also score a token before it that is all prompt."
    vocab = {t: i for i, t in enumerate(["<eos>", "x", "a", "b", "c", "d", "bc", "ab"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "b")])), eos_token="<eos>", pad_token="<eos>")
    rows = [dict(prompt="xab", chosen="cd", rejected="cx")] # "xab" alone is x ab; with the answer it is x a bc d
    trainer = trl_trainer(tiny_model(), tokenizer, tmp_path, rows=rows)
    pair, row = tokenize_pairs(load_pairs(rows), tokenizer, 16)[0], trainer.train_dataset[0]
    assert pair.prompt + pair.chosen == row["prompt_ids"] + row["chosen_ids"]
    assert tokenizer.convert_ids_to_tokens(pair.chosen[pair.chosen_start:]) == ["bc", "d", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == ["a", "bc", "d", "<eos>"]

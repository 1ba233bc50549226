"""Adapters from other trainers, judged: every number beside a computation with transformers and PEFT alone."""
import json
import re
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from reprpo.errors import UserError
from reprpo.experiments.card import judge
from reprpo.experiments.config import TrainOne, make_config
from reprpo.experiments.evaluate import evaluate, kl_along, train_one
from reprpo.experiments.merge import merge
from reprpo.experiments.policy import open_policy
from reprpo.judge.generate import generate
from reprpo.judge.movement import kl_tokens

pytestmark = pytest.mark.timeout(240)
TRAIN, TEST = tiny_rows(32), [r | {"prompt": r["prompt"].replace("What", "Which")} for r in tiny_rows(24, seed=1)]
CAUSAL = dict(task_type="CAUSAL_LM")


def lora(**options) -> LoraConfig:
    return LoraConfig(**dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **CAUSAL) | options)


def add_tokens(base, tokenizer) -> None:
    "Two new tokens, with rows of their own."
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)


KINDS = {  # name: configuration, second copy needed, what is done to the base first
    "lora": (lora(), False, None),
    "rslora": (lora(use_rslora=True, target_modules="all-linear"), False, None),
    "dora": (lora(use_dora=True), False, None),
    "ia3": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL), False, None),
    "whole_modules": (lora(modules_to_save=["lm_head", "norm"]), False, None),
    "trained_rows": (lora(trainable_token_indices=[3, 4]), False, None),
    "pissa": (lora(init_lora_weights="pissa"), True, None),
    "added_tokens": (lora(modules_to_save=["embed_tokens", "lm_head"]), True, add_tokens),
    "prompt": (PromptTuningConfig(num_virtual_tokens=3, **CAUSAL), False, None),
    "prefix": (PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL), False, None),
}


def answer_logp(model, tokenizer, prompt: str, answer: str) -> torch.Tensor:
    "Log-probability of an answer and its end, one text at a time; virtual tokens come before the text."
    ids = torch.tensor([tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]])
    z = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1]:].float().log_softmax(-1)
    return z[0, :-1].gather(-1, ids[0, 1:, None])[len(tokenizer(prompt)["input_ids"]) - 1:, 0].sum()


@torch.no_grad()
def naive(model, tokenizer, rows=TEST) -> np.ndarray:
    "Log-probabilities (rows, 2) of chosen and rejected."
    return np.array([[answer_logp(model, tokenizer, r["prompt"], r[k]).item() for k in ("chosen", "rejected")] for r in rows])


def plain(base: str, adapter=None, tokenizer=None):
    "A model as anybody would load it."
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tokenizer: model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tokenizer)), mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval()


def fit(base: str, config, folder, prepare=None, steps: int = 3) -> None:
    "DPO without a reference in a dozen lines, saved in PEFT's format."
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(base), plain(base)
    if prepare: prepare(model, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, config)
        optimiser = torch.optim.Adam([p for p in peft.parameters() if p.requires_grad], lr=0.05)
        for i in range(steps):
            margins = [answer_logp(peft, tokenizer, r["prompt"], r["chosen"]) - answer_logp(peft, tokenizer, r["prompt"], r["rejected"])
                       for r in TRAIN[2 * i:2 * i + 2]]
            optimiser.zero_grad()
            torch.nn.functional.softplus(-torch.stack(margins)).mean().backward()
            optimiser.step()
        peft.save_pretrained(folder)
    if prepare: tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A base model on disk, pairs to train and to judge on, and an adapter of every kind, made when first asked for."
    path = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("REPRPO_CACHE", str(path / "cache"))
        m.setenv("TQDM_DISABLE", "1")
        m.setattr("reprpo.experiments.prepare.N_NEUTRAL", 6)
        m.chdir(path)
        for name, layers, width in (("base", 4, 32), ("deep", 5, 32), ("wide", 4, 48)):
            tiny_model(layers=layers, width=width).save_pretrained(path / name)
            tiny_tokenizer().save_pretrained(path / name)
        for name, rows in (("train", TRAIN), ("test", TEST)):
            (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        yield path


@pytest.fixture(scope="module")
def adapter(home):
    "The folder of an adapter of one of KINDS."
    def make(kind: str):
        config, _, prepare = KINDS[kind]
        if not (home / kind).exists(): fit(str(home / "base"), config, home / kind, prepare)
        return home / kind
    return make


def scores(folder, who="scores") -> np.ndarray:
    return pd.read_parquet(folder / f"{who}.parquet")[["logp_cho", "logp_rej"]].to_numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(home, adapter, kind, capfd):
    "Policy and reference are scored as plain PEFT scores them, in silence; a second base is loaded where it must be, and only there."
    folder = adapter(kind)
    capfd.readouterr()
    found = evaluate(folder, ("test.jsonl",), kl=False, coherence=False)
    assert capfd.readouterr() == ("", "")
    assert (found.policy.second is not None) == KINDS[kind][1]
    own = kind == "added_tokens"
    policy = naive(plain("base", folder, folder if own else None), AutoTokenizer.from_pretrained(folder if own else "base"))
    base = naive(plain("base"), AutoTokenizer.from_pretrained("base"))
    np.testing.assert_allclose(scores(folder / "evaluate"), policy, atol=1e-4)
    np.testing.assert_allclose(scores(folder / "evaluate", "base"), base, atol=1e-4)
    assert np.abs(policy - base).max() > 0.01
    told = json.loads((folder / "evaluate" / "manifest.json").read_text())
    assert told["reference"] == ("a second copy of the base" if KINDS[kind][1] else "the model with its adapter off")
    assert {"results.csv", "scores.parquet", "base.parquet", "manifest.json"} == {p.name for p in (folder / "evaluate").iterdir()}


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "prompt"])
def test_kl(home, adapter, kind):
    "KL(π‖ref) over the whole vocabulary, token by token, along texts that the policy wrote; for LoRA also by the library's other way."
    found = open_policy(adapter(kind), device="cpu")
    with found.policy() as model: texts = generate(model, found.tokenizer, [r["prompt"] for r in TEST[:4]], 8)
    model, base, total, n = plain("base", adapter(kind)), plain("base"), 0.0, 0
    for g in texts:
        ids, at = torch.tensor([[*g.prompt_ids, *g.new_ids]]), len(g.prompt_ids) - 1
        read = lambda m, ids=ids, at=at: m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1]:][at:-1].log_softmax(-1)
        with torch.no_grad(): pi, ref = read(model), read(base)
        total, n = total + (pi.exp() * (pi - ref)).sum().item(), n + len(g.new_ids)
    kl, count = kl_along(found, texts)
    assert count == n and kl == pytest.approx(total / n, rel=1e-4)
    if kind == "lora": assert kl == pytest.approx(kl_tokens(found.model, texts, 0)[0], rel=1e-5)


def run_code(text: str) -> dict:
    "The one block of Python in a README, executed as it stands."
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    space = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, space)
    return space


def test_trl(home):
    "An adapter that TRL's DPOTrainer trained: its folder and a checkpoint are evaluated; its card reloads it; its README is left alone."
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
    from datasets import Dataset
    args = trl.DPOConfig(output_dir="trl", bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", disable_tqdm=True, max_steps=4,
                         save_steps=2, learning_rate=0.02, per_device_train_batch_size=4, max_length=None)
    trainer = trl.DPOTrainer("base", args=args, train_dataset=Dataset.from_list(TRAIN), peft_config=lora(),
                             processing_class=AutoTokenizer.from_pretrained("base"))
    trainer.train()
    trainer.save_model()
    readme = (home / "trl" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained("base")
    for folder in (home / "trl", home / "trl" / "checkpoint-2"):
        found = evaluate(folder, ("test.jsonl",), kl=False, coherence=False)
        np.testing.assert_allclose(scores(folder / "evaluate"), naive(plain("base", folder), tokenizer), atol=1e-4)
        assert found.policy.second is None
    assert found.policy.about["steps"] == 2

    card = judge("trl", ("test.jsonl", "flat:0=test.jsonl,flip"), train="train.jsonl", fresh_n=20)
    one = next(r for r in card.rows if r["set"] == "test")
    files = {"card.md", "card.json", "README.md", "coherence.json", "movement.json", "generations.jsonl"}
    assert one["n"] == 20 and files <= {p.name for p in (home / "trl" / "card").iterdir()}
    assert json.loads((home / "trl" / "card" / "card.json").read_text())["sets"][0]["points"] == one["points"]
    policy, base = (pd.read_parquet(home / "trl" / "card" / f"{name}.parquet").query("set == 'test'") for name in ("scores", "base"))
    right = lambda s: (s.logp_cho / s.n_cho > s.logp_rej / s.n_rej).mean()
    assert one["adapter"] == pytest.approx(100 * right(policy)) and one["points"] == pytest.approx(100 * (right(policy) - right(base)))
    assert (home / "trl" / "README.md").read_text() == readme
    again = run_code((home / "trl" / "card" / "README.md").read_text())
    np.testing.assert_array_equal(naive(again["model"].eval(), again["tokenizer"]), naive(plain("base", "trl"), tokenizer))


def test_run_folder(home):
    "Our own run: the stored scores come back; the card goes beside it, and the model card into its adapter folder."
    config = make_config(TrainOne, method="dpo", model="base", train="train.jsonl", eval=("test.jsonl",), steps=2, rank=4, batch_size=4, lr=0.02, out="run")
    train_one(config, show=False)
    found = evaluate("run")
    np.testing.assert_allclose(scores(home / "run" / "evaluate"), scores(home / "run"), atol=1e-5)
    assert found.moved["kl_policy"] > 0 and found.texts["status"] in ("coherent", "suspect", "broken") and "KL(π‖ref)" in repr(found)
    card = judge("run", ("test.jsonl",), kl=False, coherence=False)
    assert card.facts["train"] == "train.jsonl" and card.facts["steps"] == "2" and "no row was trained on" in card.source
    text = (home / "run" / "adapter" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: peft\n") and str(home) not in text
    again = run_code(text)
    np.testing.assert_allclose(naive(again["model"].eval(), again["tokenizer"]), scores(home / "run"), atol=1e-4)
    with pytest.raises(UserError, match="rows of 'train' were trained on"): judge("run", ("train.jsonl",))
    loud = evaluate("run", ("train.jsonl",), kl=False, coherence=False)
    assert any("32 rows of 'train' were trained on" in n for n in loud.notes)
    with pytest.raises(UserError, match="does not fit the base model"): evaluate("run", base="deep")


def test_competitor(home):
    "A run whose adapter is not PEFT's is judged alike, says how to load it again, and can't be merged."
    config = make_config(TrainOne, method="bipo", model="base", train="train.jsonl", eval=("test.jsonl",), steps=2, batch_size=4, lr=0.1, out="steered")
    train_one(config, show=False)
    judge("steered", ("test.jsonl",), kl=False, coherence=False)
    np.testing.assert_allclose(scores(home / "steered" / "card"), scores(home / "steered"), atol=1e-5)
    again = run_code((home / "steered" / "card" / "README.md").read_text())
    np.testing.assert_allclose(naive(again["model"], again["tokenizer"]), scores(home / "steered"), atol=1e-4)
    with pytest.raises(UserError, match="no change of weights"): merge("steered", "no")


def test_full_model(home, adapter):
    "A full model, with a base and without; merged from an adapter, it is scored as the adapter is."
    evaluate(adapter("dora"), ("test.jsonl",), kl=False, coherence=False)
    shutil.copytree(home / "dora", home / "dora2")
    made = merge("dora2", "merged")
    assert made.dtype == "float32" and made.gap < 1e-4 < made.effect
    for extra in ("tokenizer.json", "generation_config.json", "model.safetensors", "merged.json"): assert (home / "merged" / extra).exists()
    beside = evaluate("merged", ("test.jsonl",), base="base", out="beside")
    np.testing.assert_allclose(scores(home / "beside"), scores(home / "dora" / "evaluate"), atol=1e-4)
    np.testing.assert_allclose(scores(home / "beside", "base"), naive(plain("base"), AutoTokenizer.from_pretrained("base")), atol=1e-4)
    assert beside.moved["kl_policy"] > 0
    alone = evaluate("merged", ("test.jsonl",), out="alone")
    assert alone.table is None and alone.moved is None and any("no reference" in n for n in alone.notes)
    assert alone.levels["test"].value == pytest.approx(100 * float(pd.read_csv(home / "beside" / "results.csv").query("method == 'merged'").accuracy.iloc[0]))
    assert "no base" in repr(judge("merged", ("test.jsonl",), out="alone-card")) and not (home / "alone" / "base.parquet").exists()


def test_merge_keeps_the_template(home, adapter):
    "The chat template and the generation settings of the base go with the merged model."
    shutil.copytree(home / "base", home / "chatty")
    tokenizer, settings = AutoTokenizer.from_pretrained("base"), json.loads((home / "base" / "generation_config.json").read_text())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.save_pretrained("chatty")
    (home / "chatty" / "generation_config.json").write_text(json.dumps(settings | {"top_k": 7, "do_sample": True}))
    merge(adapter("lora"), "chatty-merged", base="chatty")
    assert AutoTokenizer.from_pretrained("chatty-merged").chat_template == tokenizer.chat_template
    assert json.loads((home / "chatty-merged" / "generation_config.json").read_text())["top_k"] == 7
    assert json.loads((home / "chatty-merged" / "config.json").read_text())["use_cache"]


@pytest.mark.parametrize("kind", ["whole_modules", "ia3", "pissa", "added_tokens"])
def test_merge(home, adapter, kind):
    "A merged folder, loaded by transformers alone, scores as the adapter; in bfloat16 the loss is told."
    made = merge(adapter(kind), f"{kind}-merged")
    own = adapter(kind) if kind == "added_tokens" else None
    expected = naive(plain("base", adapter(kind), own), AutoTokenizer.from_pretrained(own or "base"))
    np.testing.assert_allclose(naive(plain(f"{kind}-merged"), AutoTokenizer.from_pretrained(f"{kind}-merged")), expected, atol=1e-3)
    rounded = merge(adapter(kind), f"{kind}-bf16", dtype="bfloat16")
    assert rounded.gap > 10 * made.gap and "bfloat16" in repr(rounded)


def test_embedding_shared_with_the_head(home):
    "LoRA on an embedding that the head shares: merged, the head keeps its own weights."
    tied = AutoModelForCausalLM.from_pretrained("base")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained("tied")
    tiny_tokenizer().save_pretrained("tied")
    fit("tied", lora(target_modules=["q_proj", "embed_tokens"]), home / "on-tied")
    assert merge("on-tied", "tied-merged").gap < 1e-4
    tokenizer = AutoTokenizer.from_pretrained("tied")
    np.testing.assert_allclose(naive(plain("tied-merged"), tokenizer), naive(plain("tied", "on-tied"), tokenizer), atol=1e-3)


def test_never_trained(home):
    "An untrained LoRA is refused; any other untrained adapter is told of."
    for name, config in (("zero", lora()), ("one", KINDS["ia3"][0])): fit("base", config, home / name, steps=0)
    with pytest.raises(UserError, match="never trained"): evaluate("zero", ("test.jsonl",))
    found = evaluate("one", ("test.jsonl",), kl=False, coherence=False)
    assert any("never been trained" in n for n in found.notes)


def edit(folder, name: str, **changes) -> None:
    "Copy the LoRA adapter and change its configuration."
    shutil.copytree(folder, folder.parent / name, ignore=shutil.ignore_patterns("evaluate"))
    path = folder.parent / name / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD = {  # what is asked: words of the one line
    "missing/folder/here": "missing/folder/here: no such folder, nor its folder missing/folder",
    "test.jsonl": "is a file; name the folder",
    "empty": "no PEFT adapter",
    "parent": "name what is in it, such as parent/checkpoint-10",
    "no-base": "names no base model; give it with --base",
    "moved": "its base model /gone/away/model is not there",
    "classifier": "only causal language models",
    "odd": "adapter_config.json can't be read",
    "bare": "no weights that can be read",
    "nowhere": "nowhere is no finished run, PEFT adapter or model here",
    "parent/checkpoint-1O": "did you mean 'checkpoint-10'?",
    "nobody/nothing": "nobody/nothing is no folder here, and can't be had from the hub",
}


@pytest.fixture(scope="module")
def bad(home, adapter):
    "Folders with something wrong in each."
    folder = adapter("lora")
    (home / "empty").mkdir()
    for n in (9, 10): shutil.copytree(folder, home / "parent" / f"checkpoint-{n}")
    edit(folder, "no-base", base_model_name_or_path=None)
    edit(folder, "moved", base_model_name_or_path="/gone/away/model")
    edit(folder, "classifier", task_type="SEQ_CLS")
    edit(folder, "odd", peft_type="NOSUCH")
    edit(folder, "bare")
    (home / "bare" / "adapter_model.safetensors").unlink()
    return home


@pytest.mark.parametrize("what", BAD)
def test_bad_input(bad, what):
    "One line that names what is wrong and what to give instead."
    with pytest.raises(UserError) as e: evaluate(what, ("test.jsonl",))
    assert BAD[what] in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 420


def test_bad_base(bad, adapter):
    "A base that the adapter was not trained on is refused by shape and by depth, and sets must be named."
    for base, words in (("wide", "size mismatch"), ("deep", "places that it has no tensor for"), ("gone", "can't load")):
        with pytest.raises(UserError, match=words): evaluate(adapter("lora"), ("test.jsonl",), base=base)
    with pytest.raises(UserError, match="no set to judge"): evaluate(adapter("lora"))
    with pytest.raises(UserError, match="no rows to judge"): judge(adapter("lora"))
    with pytest.raises(UserError, match="fresh_n is 1"): judge(adapter("lora"), fresh_n=1)
    with pytest.raises(UserError, match="unknown option"): evaluate(adapter("lora"), ("test.jsonl",), eval_m=3)
    with pytest.raises(UserError, match="can't be merged"): merge(adapter("prompt"), "no")
    with pytest.raises(UserError, match="full model already"): merge("base", "no")
    with pytest.raises(UserError, match="is not empty"): merge(adapter("lora"), "base")
    with pytest.raises(UserError, match="float32, bfloat16, float16"): merge(adapter("lora"), "no", dtype="int4")
    assert not (bad / "no").exists()

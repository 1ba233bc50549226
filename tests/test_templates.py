"""Conversations as token ids: what a template writes, what is scored, where a model goes on, and that nobody's text can play the template."""
import datetime
from dataclasses import replace

import pytest
import torch
from shapes import english, llama3_shaped, llama3_tokenizer, qwen3_shaped, qwen3_tokenizer
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reprpo.errors import UserError
from reprpo.judge.generate import generate
from reprpo.models import load_model
from reprpo.pairs.literal import special_tokens
from reprpo.pairs.load import Pair, PairSet, load_pairs
from reprpo.pairs.show import show_pair
from reprpo.pairs.template import DATE, asked, question, read_template_options, set_template, template_of, template_record, turn_end
from reprpo.pairs.tokenize import encode, leading_ids, prompt_ids, tokenize_pairs
from reprpo.states.score import score

EMPTY = "<think>\n\n</think>\n\n"
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
GEMMA = ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant/…') }}{% endif %}"
         "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}")
LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
          "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}")
BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
NAMED = "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n### end\n' }}{% endfor %}"

PAIRS = [Pair("What colour is the sky?", "It is blue.", "It is a kind of cheese.", row=1),
         Pair("  Add 17 and 25.\n", "\n17 + 25 = 42.  ", "43", row=2),
         Pair("And now?", "Now it's night…", "No 😀.", row=3, before=(("user", "Hi there."), ("assistant", "Hello! What is it?"))),
         Pair("Is it?", "Yes.", "No.", row=4, before=(("system", "You say yes."), ("user", "Hm."), ("assistant", "Hm?")))]


def gemma_tokenizer():
    t = qwen3_tokenizer()
    t.add_special_tokens({"bos_token": "<bos>", "extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    t.chat_template = GEMMA
    return t


def marked_words():
    "A vocabulary in the manner of SentencePiece, every word with its mark, and a template that puts spaces around the answer."
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    t.train_from_iterator(english(), trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=LLAMA2)


MAKERS = {"qwen3": qwen3_tokenizer, "llama3": llama3_tokenizer, "gemma": gemma_tokenizer, "marked": marked_words}
ENDS = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "marked": "</s>"}
SYSTEM = ("qwen3", "llama3")


@pytest.fixture(scope="module", params=MAKERS)
def family(request): return request.param


@pytest.fixture
def tokenizer(family): return MAKERS[family]()


def rows_for(family): return PAIRS if family in SYSTEM else PAIRS[:3]


def encoded(pairs, tokenizer): return [p for p, _ in encode(pairs, tokenizer, leading_ids(tokenizer))]


def sides(pair, tokens):
    "(answer, its tokens, where the scored ones begin) of both branches."
    return (pair.chosen, tokens.chosen, tokens.chosen_start), (pair.rejected, tokens.rejected, tokens.rejected_start)


def text_of(ids, tokenizer): return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def messages(pair, answer): return [{"role": r, "content": c.strip()} for r, c in (*asked(pair), ("assistant", answer))]


def message_of(fn, *args, **kwargs):
    with pytest.raises(UserError) as caught: fn(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ids_are_those_of_the_template(tokenizer, family):
    for pair, tokens in zip(rows_for(family), encoded(rows_for(family), tokenizer)):
        for answer, ids, _ in sides(pair, tokens):
            whole = tokenizer.apply_chat_template(messages(pair, answer), tokenize=True, return_dict=False, date_string="26 Jul 2024")
            assert whole[:len(tokens.prompt + ids)] == tokens.prompt + ids
            assert not text_of(whole[len(tokens.prompt + ids):], tokenizer).strip()


def test_the_answer_and_its_end_are_scored_and_nothing_else(tokenizer, family):
    for pair, tokens in zip(rows_for(family), encoded(rows_for(family), tokenizer)):
        for answer, ids, start in sides(pair, tokens):
            said, expected = text_of(ids[start:], tokenizer), answer.strip() + ENDS[family]
            if family == "marked": said, expected = "".join(tokenizer.convert_ids_to_tokens(ids[start:])).replace("▁", " "), f" {answer.strip()} </s>"
            assert said == expected or "<unk>" in said
            assert ids[-1] == turn_end(tokenizer) == tokenizer.convert_tokens_to_ids(ENDS[family])


def test_qwens_empty_thought_is_prompt():
    tokens, = encoded(PAIRS[:1], qwen3_tokenizer())
    assert text_of(tokens.prompt, qwen3_tokenizer()).endswith("<|im_start|>assistant\n" + EMPTY)
    assert (tokens.chosen_start, tokens.rejected_start) == (0, 0)


def test_thought_in_the_answers_is_scored_and_in_earlier_turns_left_out():
    t = qwen3_tokenizer()
    thinking = Pair("Add 2 and 2.", "<think>\n2 + 2\n</think>\n\n4.", "5.", before=(("user", "Hi."), ("assistant", "<think>\nA greeting.\n</think>\n\nHello.")))
    tokens, = encoded([thinking], t)
    assert "greeting" not in text_of(tokens.prompt, t) and "Hello." in text_of(tokens.prompt, t)
    assert text_of(tokens.prompt, t).endswith("assistant\n") or text_of(tokens.prompt, t).endswith("assistant\n<think>\n")
    assert text_of(tokens.chosen[tokens.chosen_start:], t) == "<think>\n2 + 2\n</think>\n\n4.<|im_end|>"
    assert text_of(tokens.rejected[tokens.rejected_start:], t) == "5.<|im_end|>"


@pytest.mark.parametrize("make", [qwen3_tokenizer, llama3_tokenizer])
def test_a_system_text_is_put_where_rows_have_none(make):
    t = set_template(make(), system="  Be brief. ")
    tokens, own = encoded([PAIRS[0], PAIRS[3]], t)
    assert text_of(tokens.prompt, t).count("Be brief.") == 1
    assert "Be brief." not in text_of(own.prompt, t) and "You say yes." in text_of(own.prompt, t)
    assert tokenize_pairs(PairSet("a", "a", PAIRS[:1]), t).hash != tokenize_pairs(PairSet("a", "a", PAIRS[:1]), make()).hash
    assert template_record(t)["system"] == "Be brief."


@pytest.mark.parametrize("template", ["date_string", "strftime_now"])
def test_no_day_like_another(template, monkeypatch):
    t = llama3_tokenizer()
    if template == "strftime_now": t.chat_template = "{% macro day() %}{{ strftime_now('%A, %-d %B %Y at %H:%M (%%)') }}{% endmacro %}{{ day() }}\n" + CHATML
    before = encoded(PAIRS[:1], t)[0]

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None): return cls(2031, 5, 17, 3, 4)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    if template == "strftime_now": assert "17 May 2031" in t.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert encoded(PAIRS[:1], t)[0] == before == encoded(PAIRS[:1], llama3_tokenizer() if template == "date_string" else t)[0]
    assert ("26 Jul 2024" if template == "date_string" else "Friday, 26 July 2024 at 00:00 (%)") in text_of(before.prompt, t)
    assert template_record(t)["date"] == DATE


def test_a_pinned_template_writes_what_the_template_writes(tokenizer, family):
    "Nothing before, nothing after: also where it begins with white space."
    plain = tokenizer.chat_template
    for lead in ("", "\n", "  \n x"):
        tokenizer.chat_template = lead + plain
        tokens, = encoded(PAIRS[:1], tokenizer)
        whole = tokenizer.apply_chat_template(messages(PAIRS[0], PAIRS[0].chosen), tokenize=True, return_dict=False, date_string="26 Jul 2024")
        assert tokens.prompt + tokens.chosen == whole[:len(tokens.prompt + tokens.chosen)]


@pytest.mark.parametrize("family_", ["llama3", "gemma", "marked"])
def test_one_bos(family_):
    t = MAKERS[family_]()
    for ids in [*(p.prompt for p in encoded(PAIRS[:2], t)), *prompt_ids(["Hello", PAIRS[0]], t)]:
        assert ids.count(t.bos_token_id) == 1 and ids[0] == t.bos_token_id
    if family_ == "llama3": assert t("a")["input_ids"][0] == t.bos_token_id
    spoken = Pair(f"{t.bos_token}Hi", f"{t.bos_token}Hello", "Hey")
    tokens, = encoded([spoken], t)
    assert (tokens.prompt + tokens.chosen).count(t.bos_token_id) == 1


def test_plain_text_with_one_bos():
    t = set_template(llama3_tokenizer(), "plain")
    tokens, = encoded([Pair("<|begin_of_text|>Hi", " Ho", " Ha")], t)
    assert (tokens.prompt + tokens.chosen).count(t.bos_token_id) == 1 and tokens.chosen[-1] == t.eos_token_id


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_no_text_is_a_special_token(tokenizer, family, kind):
    set_template(tokenizer, kind)
    special = set(special_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
    count = lambda ids: [i for i in ids if i in special]
    clean, = encoded([Pair("What is up?", " Not much.", " The sky.")], tokenizer)
    for name in special_tokens(tokenizer):
        for bad in (f"{name}What is up?", f"What is {name}up?", f"What is up?{name}", f"{name} {name}"):
            tokens, = encoded([Pair(bad, " Not much.", f" The {bad} sky {name}.")], tokenizer)
            assert count(tokens.prompt) == count(clean.prompt)
            assert count(tokens.chosen) == count(clean.chosen) and count(tokens.rejected) == count(clean.rejected)
            assert count(prompt_ids([bad], tokenizer)[0]) == count(prompt_ids(["What is up?"], tokenizer)[0])
            if family in ("qwen3", "llama3") and kind == "plain": assert text_of(tokens.prompt[len(leading_ids(tokenizer)):], tokenizer) == bad


def test_names_in_data_change_only_their_own_tokens():
    "Around a name, the ids are those of the sentence with another word in its place."
    t = qwen3_tokenizer()
    odd, even = encoded([Pair("Say <|im_end|> now", "Yes.", "No."), Pair("Say §§ now", "Yes.", "No.")], t)
    a, b = odd.prompt, even.prompt
    assert a[:4] == b[:4] and a[-12:] == b[-12:] and odd.chosen == even.chosen


def test_generation_goes_on_from_the_prompt_of_the_pair(tokenizer, family):
    pairs = rows_for(family)
    for tokens, ids in zip(encoded(pairs, tokenizer), prompt_ids(pairs, tokenizer)):
        assert ids == tokens.prompt + tokens.chosen[:tokens.chosen_start]
    assert prompt_ids([question(p) for p in pairs], tokenizer) == prompt_ids(pairs, tokenizer)
    assert prompt_ids([pairs[0].prompt], tokenizer) == prompt_ids(pairs[:1], tokenizer)
    assert prompt_ids([messages(pairs[2], "x")[:-1]], tokenizer) == prompt_ids(pairs[2:3], tokenizer)


@pytest.fixture(scope="module", params=[qwen3_shaped, llama3_shaped])
def checkpoint(request, tmp_path_factory): return load_model(str(request.param(tmp_path_factory.mktemp("model"))), device="cpu")


def test_a_saved_tokenizer_makes_the_same_ids(checkpoint, tmp_path):
    model, t = checkpoint
    set_template(t, system="Be kind.")
    t.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encoded(PAIRS, set_template(again, system="Be kind.")) == encoded(PAIRS, t) != encoded(PAIRS, set_template(again))
    set_template(t)
    fresh = qwen3_tokenizer() if "think" in t.chat_template else llama3_tokenizer()
    assert encoded(PAIRS, fresh) == encoded(PAIRS, t)


def test_log_probabilities_token_by_token(checkpoint):
    from architectures import token_by_token
    model, t = checkpoint
    tokens = tokenize_pairs(PairSet("a", "a", PAIRS), t)
    for layout in ("concat", "shared"):
        found = score(model, tokens, layout=layout)
        for side, name in enumerate(("logp_cho", "logp_rej")):
            branches = [(p.prompt, *sides(PAIRS[0], p)[side][1:]) for p in tokens]
            naive = [token_by_token(model, torch.tensor([prompt + ids]), len(prompt) + start).sum() for prompt, ids, start in branches]
            torch.testing.assert_close(torch.tensor(found[name].tolist()), torch.stack(naive), rtol=1e-4, atol=1e-3)


def test_texts_end_at_the_end_of_the_turn(checkpoint):
    model, t = checkpoint
    end = turn_end(t)
    made = generate(model, t, ["Hello", PAIRS[2]], tokens=8, temperature=0)
    assert [list(g.prompt_ids) for g in made] == prompt_ids(["Hello", PAIRS[2]], t)
    assert [g.prompt for g in made] == ["Hello", "And now?"]

    def only_end(module, args, logits): return torch.full_like(logits, -9.).index_fill_(-1, torch.tensor([end]), 9.)
    hook = model.lm_head.register_forward_hook(only_end)
    made = generate(model, t, ["Hello", PAIRS[3]], tokens=8, temperature=0)
    hook.remove()
    assert [(g.new_ids, g.text, g.ended) for g in made] == [((end,), "", True)] * 2


def test_a_template_without_system_turns_says_so():
    t = gemma_tokenizer()
    assert "--system" in message_of(set_template, t, system="Be brief.") and "takes no system turn" in message_of(set_template, t, system="Be brief.")
    said = message_of(encoded, PAIRS[3:], gemma_tokenizer())
    assert said.startswith("row 4: the chat template of") and "user's first message" in said
    twice = Pair("b", "c", "d", row=9, before=(("user", "a"),))
    assert "row 9" in message_of(encoded, [twice], gemma_tokenizer()) and "alternate" in message_of(encoded, [twice], gemma_tokenizer())


@pytest.mark.parametrize("change,text", [("m.content | upper", "It is blue."), ("m.content.split('</think>')[-1]", "<think>No.</think>It is blue."),
                                         ("m.content | replace('.', '')", "It is blue."), ("m.content[:5]", "It is a long answer.")])
def test_a_template_that_changes_answers_is_refused(change, text):
    t = qwen3_tokenizer()
    t.chat_template = CHATML.replace("m.content", f"({change} if m.role == 'assistant' else m.content)")
    said = message_of(encoded, [Pair("Hi", text, "No.", row=7)], t)
    assert said.startswith("row 7: the chat template of") and ("changes the answer" in said or "times" in said)


def test_a_template_that_changes_or_leaves_out_prompts_is_refused():
    t = qwen3_tokenizer()
    t.chat_template = CHATML.replace("m.content", "m.content | replace('bomb', '***')")
    assert "changes the text of the user" in message_of(encoded, [Pair("A bomb", "Yes.", "No.", row=7)], t)
    assert encoded([Pair("A lamp", "Yes.", "No.")], t)
    t.chat_template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    assert "0 times" in message_of(set_template, t, system="Be brief.")


def test_names_in_a_conversation_that_is_rewritten():
    t = qwen3_tokenizer()
    row = Pair("Hm?", "Yes.", "No.", row=5, before=(("user", "Hi."), ("assistant", "<think>\n<|im_end|>\n</think>\n\nHello.")))
    assert "row 5" in message_of(encoded, [row], t) and "<|im_end|>" in message_of(encoded, [row], t)
    tokens, = encoded([replace(row, before=(), chosen="It is <|im_end|>.")], t)
    assert tokens.chosen.count(t.eos_token_id) == 1


def test_a_template_without_a_token_at_its_end_gets_eos():
    t = qwen3_tokenizer()
    t.chat_template = BARE
    tokens, = encoded(PAIRS[:1], t)
    assert text_of(tokens.chosen, t) == " It is blue.<|im_end|>" and turn_end(t) == t.eos_token_id
    t.chat_template = NAMED
    tokens, = encoded(PAIRS[:1], t)
    assert text_of(tokens.chosen[tokens.chosen_start:], t) == "It is blue.\n### end<|im_end|>"


def test_options():
    read = read_template_options(["enable_thinking=false", "n=3", "x=-1.5e2", "who=a=b", "empty="])
    assert read == dict(enable_thinking=False, n=3, x=-150.0, who="a=b", empty="") and type(read["n"]) is int
    for words in (["enable_thinking"], ["=3"], ["a b=3"], ["a=1", "a=2"]): assert message_of(read_template_options, words).startswith("--template-options")
    t = qwen3_tokenizer()
    assert template_of(set_template(t, options=["enable_thinking=false"])).options == (("enable_thinking", False),)
    assert "did you mean enable_thinking" in message_of(set_template, t, options={"enable_thinkin": False})
    assert "filled in" in message_of(set_template, t, options={"messages": "x"})
    t.chat_template = CHATML.replace("<|im_start|>'", "<|im_start|>' + (mood | default('', true))")
    assert text_of(encoded(PAIRS[:1], set_template(t, options={"mood": "glad"}))[0].prompt, t).startswith("<|im_start|>gladuser")
    assert "31 Dec 1999" in text_of(encoded(PAIRS[:1], set_template(llama3_tokenizer(), options={"date_string": "31 Dec 1999"}))[0].prompt, llama3_tokenizer())


def test_what_cannot_be_set():
    assert "no chat template" in message_of(set_template, tiny_tokenizer(), "chat")
    assert "did you mean 'chat'" in message_of(set_template, qwen3_tokenizer(), "chta")
    assert "--system needs a chat template" in message_of(set_template, tiny_tokenizer(), system="Be brief.")
    assert "--template plain" in message_of(set_template, qwen3_tokenizer(), "plain", system="Be brief.")
    assert "--template-options needs" in message_of(set_template, tiny_tokenizer(), options=["a=1"])
    assert "no text" in message_of(set_template, qwen3_tokenizer(), system="  ")
    t = qwen3_tokenizer()
    t.chat_template = {"rag": CHATML, "tool_use": CHATML}
    assert "no default" in message_of(set_template, t)
    t.chat_template = "{% for m in messages %}{{ m.content }"
    assert "--template chat" in message_of(set_template, t)
    assert "turns before its prompt" in message_of(encoded, PAIRS[2:3], set_template(qwen3_tokenizer(), "plain"))
    assert "prompt 1" in message_of(prompt_ids, ["Hi", PAIRS[2]], tiny_tokenizer())
    assert template_of(tiny_tokenizer()).kind == "plain" and template_record(tiny_tokenizer()) == {"kind": "plain"}


@pytest.mark.parametrize("limit", [60, 80, 100])
def test_a_cut_leaves_the_template(limit):
    t = set_template(qwen3_tokenizer(), system="Be very kind.")
    talk = Pair("the little cat " * 30, "It is blue. " * 3, "It is red.", row=1, before=(("user", "old words " * 10), ("assistant", "older words")))
    whole, = encoded([talk], t)
    short, = tokenize_pairs(PairSet("a", "a", [talk]), t, max_length=limit, on_truncate="truncate", max_dropped=1)
    assert [short.prompt[j] for j in short.fixed] == [whole.prompt[j] for j in whole.fixed]
    assert short.longest <= limit and text_of(short.prompt, t).startswith("<|im_start|>system\nBe very kind.<|im_end|>\n<|im_start|>user\n")
    assert text_of(short.prompt, t).endswith("cat<|im_end|>\n<|im_start|>assistant\n" + EMPTY)
    assert "none of the" in message_of(tokenize_pairs, PairSet("a", "a", [talk]), t, max_length=40, on_truncate="truncate", max_dropped=1)


def test_shown_tokens_say_whose_they_are():
    t = qwen3_tokenizer()
    tokens, = encoded(PAIRS[:1], t)
    shown = {head: line for head, line in show_pair(tokens, t).lines}
    assert "".join(text for text, role in shown["prompt"] if role == "prompt") == PAIRS[0].prompt
    assert [text for text, role in shown["prompt"] if role == "template+special"] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert shown["chosen"][-1] == ("<|im_end|>", "chosen+EOS")


def test_white_space_around_prompts_and_answers_goes_only_under_a_template():
    t = qwen3_tokenizer()
    a, b = encoded([Pair(" Hi \n", "\nYes ", "No"), Pair("Hi", "Yes", "No")], t)
    assert a == replace(b, row=a.row)
    a, b = encoded([Pair("Hi: ", "Yes ", "No"), Pair("Hi:", "Yes", "No")], set_template(t, "plain"))
    assert a != b


def test_rows_of_messages():
    said = lambda role, text: [{"role": role, "content": text}]
    rows = [{"prompt": said("user", f"Question {i}"), "chosen": said("assistant", "Good."), "rejected": said("assistant", "Bad.")} for i in range(4)]
    tokens = tokenize_pairs(load_pairs(rows), llama3_tokenizer())
    assert len(tokens) == 4 and tokens.report.straddling == 0
    texts = load_pairs([{"prompt": f"Question {i}", "chosen": "Good.", "rejected": "Bad."} for i in range(4)])
    assert tokens.hash == tokenize_pairs(texts, llama3_tokenizer()).hash

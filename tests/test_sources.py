"""Where pairs come from: several files, folders that datasets reads, chat messages, and what is said when they are not right."""
import json
from pathlib import Path

import pandas as pd
import pytest

from reprpo.errors import UserError
from reprpo.pairs.load import PairSet, load_pairs
from reprpo.pairs.spec import GENIES_SETS, EvalSpec, PairSpec, parse_eval

say = lambda role, content: {"role": role, "content": content}
ASKED = [say("system", "Be brief."), say("user", "Is 2 even?"), say("assistant", "Yes."), say("user", "And 3?")]
YES, NO = say("assistant", "Yes."), say("assistant", "No.")
CHAT = {"prompt": ASKED, "chosen": [NO], "rejected": [YES]}
TURNS = (("system", "Be brief."), ("user", "Is 2 even?"), ("assistant", "Yes."))


def plain(n, start=0): return [dict(prompt=f"Q{i}?", chosen=f" yes {i}", rejected=f" no {i}") for i in range(start, start + n)]


def write(path, rows) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "An empty folder to work in, and a cache of its own for `datasets`."
    import datasets
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield tmp_path
    datasets.enable_progress_bars()


def said(fn, *args) -> str:
    with pytest.raises(UserError) as e: fn(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_several_files_are_one_set_with_rows_of_their_own():
    for k in range(3): write(f"shards/part-{k}.jsonl", plain(4, 4 * k))
    pd.DataFrame(plain(3, 20)).to_csv("more.csv", index=False)
    every = load_pairs("shards/*.jsonl+more.csv")
    assert [p.prompt for p in every] == [f"Q{i}?" for i in (*range(12), 20, 21, 22)]
    assert len({p.row for p in every}) == len({p.kind for p in every}) == 15
    assert [p.row for p in every][:12] == list(range(1, 13))
    assert every.label == "shards_more" and PairSpec.parse(every.spec).path == "shards/*.jsonl+more.csv"
    part = load_pairs("shards/part-1.jsonl+shards/part-0.jsonl,n=5,flip,seed=3")
    assert len(part) == 5 and all(p.chosen.startswith(" no") for p in part)


def test_a_plus_splits_only_behind_a_suffix_and_a_file_of_that_name_wins():
    write("a+b.jsonl", plain(2))
    write("c.jsonl+d.jsonl", plain(3))
    assert (len(load_pairs("a+b.jsonl")), len(load_pairs("c.jsonl+d.jsonl"))) == (2, 3)


def test_errors_in_several_files_name_file_and_line():
    write("one.jsonl", plain(2))
    write("two.jsonl", [*plain(1, 5), {"prompt": "x", "chosen": "", "rejected": "y"}])
    assert said(load_pairs, "one.jsonl+two.jsonl").startswith("two.jsonl:2: the chosen answer is empty")
    assert "no file matches three-*.jsonl" in said(load_pairs, "one.jsonl+three-*.jsonl")
    assert "did you mean 'two.jsonl'" in said(load_pairs, "one.jsonl+twoo.jsonl")
    assert "named twice" in said(load_pairs, "*.jsonl+one.jsonl")


@pytest.mark.parametrize("row", [
    CHAT, {**CHAT, "chosen": "No.", "rejected": "Yes."}, {"chosen": [*ASKED, NO], "rejected": [*ASKED, YES]},
    {"prompt": ASKED, "chosen": [*ASKED, NO], "rejected": [*ASKED, YES]}, {"prompt": "Is 2 even?", "chosen": [*ASKED, NO], "rejected": [*ASKED, YES]},
    {"prompt": "And 3?", "before": ASKED[:-1], "chosen": "No.", "rejected": "Yes."}])
def test_every_shape_of_messages_is_one_pair(row, here):
    file = load_pairs(write("a.jsonl", [row])).rows
    pd.DataFrame([row]).to_parquet("a.parquet")
    assert file == load_pairs([row]).rows == load_pairs("a.parquet").rows
    assert (file[0].before, file[0].prompt, file[0].chosen, file[0].rejected) == (TURNS, "And 3?", "No.", "Yes.")
    again = load_pairs(write("b.jsonl", [file[0].as_row()])).rows
    assert again == file == load_pairs(file).rows


def test_the_key_covers_the_turns_before():
    rows = [{**CHAT, "prompt": "And 3?"}, CHAT, {**CHAT, "prompt": [*ASKED[:2], say("assistant", "Sure."), ASKED[-1]]}]
    pairs = load_pairs(rows)
    assert len({p.key for p in pairs}) == 3 and {p.prompt for p in pairs} == {"And 3?"}
    assert pairs[0].key == load_pairs([{"prompt": "And 3?", "chosen": "a", "rejected": "b"}])[0].key


def test_a_folder_on_disk_is_read_as_datasets_reads_it():
    rows = [{"ask": ASKED, "good": [NO], "poor": [YES]}, {"ask": ASKED[1:2], "good": [YES], "poor": [NO]}]
    write("local/train.jsonl", rows)
    write("local/test.jsonl", rows[:1])
    names = "prompt=ask,chosen=good,rejected=poor"
    pairs = load_pairs(f"hub:local,{names}")
    assert pairs.rows == load_pairs(f"local/train.jsonl,{names}").rows
    assert [p.before for p in pairs] == [TURNS, ()]
    assert load_pairs(f"hub:./local#test,flip,{names}")[0].chosen == "Yes."
    assert "could not load 'hub:local#val" in said(load_pairs, f"hub:local#val,{names}")
    assert "hub:local" in said(load_pairs, "local")
    assert "no column 'prompt'; the row has ask, good, poor" in said(load_pairs, "hub:local")


def test_genies_names_are_known():
    assert len(set(GENIES_SETS)) == 59
    assert "unknown GENIES set 'maths'; did you mean 'math'?" in said(PairSpec.parse, "genies:maths#test")


BAD = {
    "unknown role 'human'; write user": {**CHAT, "prompt": [say("human", "Is 2 even?")]},
    "unknown role 'asistant'; did you mean 'assistant'?": {**CHAT, "chosen": [say("asistant", "No.")]},
    "rename its fields to role and content": {**CHAT, "prompt": [{"from": "human", "value": "Is 2 even?"}]},
    "holds image, not text": {**CHAT, "prompt": [say("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}])]},
    "holds NoneType, not text": {**CHAT, "chosen": [say("assistant", None)]},
    "call of a tool (tool_calls)": {**CHAT, "chosen": [{**say("assistant", ""), "tool_calls": [{"function": {"name": "sum"}}]}]},
    "call of a tool (role tool)": {**CHAT, "prompt": [*ASKED[:3], say("tool", "3")]},
    "chosen has 3 messages; an answer is one message": {**CHAT, "chosen": [NO, ASKED[1], NO]},
    "the two conversations part at message 3": {"chosen": [*ASKED, NO], "rejected": [*ASKED[:2], NO, ASKED[3], YES]},
    "an answer is a message of the assistant": {**CHAT, "rejected": ASKED},
    "the last message before the answers is of the assistant": {**CHAT, "prompt": ASKED[:3]},
    "one answer is a whole conversation and the other is not": {**CHAT, "chosen": [*ASKED, NO]},
    "the prompt is not how the conversations begin": {"prompt": "And 4?", "chosen": [*ASKED, NO], "rejected": [*ASKED, YES]},
    "a system message can only come first": {**CHAT, "prompt": [*ASKED, *ASKED]},
    "is an empty list of messages": {**CHAT, "prompt": []},
    "has an answer and no prompt": {"chosen": [NO], "rejected": [YES]},
    "is int, not a message": {**CHAT, "prompt": [3]},
    "no column 'prompt'": {"chosen": [*ASKED, NO], "rejected": "Yes."},
    "the chosen answer is empty": {**CHAT, "chosen": [say("assistant", " ")]},
    "both answers are the same": {**CHAT, "chosen": [YES]},
    "column 'chosen' holds dict, not text": {**CHAT, "chosen": YES},
    "column 'kind' holds list": {**CHAT, "kind": ["a"]},
    "is half of a character": {**CHAT, "chosen": "No\ud83d"},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_messages_are_one_line_with_their_place(words):
    write("a.jsonl", [CHAT, BAD[words]])
    line = said(load_pairs, "a.jsonl")
    assert line.startswith("a.jsonl:2") and words in line


@pytest.mark.parametrize("name,data,words", [
    ("a.jsonl", b'{"prompt": "\xff"}', "a.jsonl:1: not UTF-8 (byte 13 of the line)"), ("a.json", b'["\xff"]', "a.json: not UTF-8"),
    ("a.csv", b"prompt\n\xff", "a.csv: not UTF-8"), ("a.parquet", b"no", "a.parquet: not a Parquet file"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1: JSON with too many brackets"), ("a.jsonl", b"9" * 10_000, "a.jsonl:1: JSON with too many brackets or digits"),
    ("a.jsonl", b"3\n", "a.jsonl:1: a row must have named columns, this is int"), ("a.jsonl", b"\n\n", "a.jsonl has no rows")])
def test_files_that_hold_something_else(name, data, words):
    Path(name).write_bytes(data)
    assert words in said(load_pairs, name)


def test_labels_of_odd_paths_print_and_parse():
    for text in ("my file.jsonl", "a.jsonl+b.jsonl", "file=world:facts/test", "x:0=shards/*.jsonl"):
        e = parse_eval(text)
        assert isinstance(e, EvalSpec) and parse_eval(str(e)) == e


def test_plain_pairs_are_as_before():
    pairs = load_pairs("world:facts/train,n=20")
    assert isinstance(pairs, PairSet) and not any(p.before for p in pairs)
    assert load_pairs(pairs.rows)[0].key == pairs[0].key

"""Nothing that can be typed or stored makes a traceback: addresses, layers, methods and files give a value or one line."""
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from reprpo.errors import UserError
from reprpo.pairs.chat import split_messages
from reprpo.pairs.lint import lint, read_all
from reprpo.pairs.load import load_pairs
from reprpo.pairs.shifts import has_suite, suite
from reprpo.pairs.spec import COLUMNS, GENIES_SETS, PairSpec, parse_eval, pieces, quoted
from reprpo.states.layers import describe_layers, parse_layers
from reprpo.train.method import Method

set_hypothesis_home_dir(tempfile.mkdtemp())
FAST = settings(derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
LONG = "9" * 5000
any_text = st.text(max_size=60)


def mixed(*parts): return st.lists(st.one_of(st.sampled_from(parts), st.text(max_size=6)), max_size=8).map("".join)


def value_or_line(fn, *args):
    "The value, or None where there is one line instead."
    try: return fn(*args)
    except UserError as e: assert str(e) and "\n" not in str(e)


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    "An empty folder, so that no odd name happens to be a file, and a place for those that are written."
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        yield


addresses = mixed("world:facts/train", "a.jsonl", "genies:math", "#test", "owner/name", ":", "#", ",", "=", "n=3", "flip", ",flip=", ",rho=0.5",
                  ",tag=good", ",sep=",
                  "\\n", '"', "'", "\\", "+", "*", "file:", "hub:", "world:", "x:-1=", "/", "[", " ",
                  "\n", "\x00", "\ud800")


@FAST
@given(st.one_of(any_text, addresses))
@example("a" * 5000)
@example(f"a.jsonl,n={LONG}")
@example(f"a.jsonl,seed={LONG}")
@example("file:")
@example("a.jsonl,flip=nan")
@example("genies:" + "b" * 5000)
def test_every_address_is_read_or_refused(text):
    spec = value_or_line(PairSpec.parse, text)
    if spec is not None:
        assert PairSpec.parse(str(spec)) == spec and isinstance(spec.stem, str) and spec.stem
        if has_suite(str(spec)): value_or_line(suite, str(spec))


@FAST
@given(st.one_of(any_text, addresses))
@example("file=a.jsonl")
@example("file:-1=a.jsonl")
@example("my file.jsonl")
@example("world:0=world:facts")
def test_every_evaluation_set_is_read_or_refused(text):
    e = value_or_line(parse_eval, text)
    if e is not None: assert parse_eval(str(e)) == e


odd = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@FAST
@given(st.data())
def test_every_address_comes_back(data):
    draw = data.draw
    kind = draw(st.sampled_from(["file", "hub", "genies", "world"]))
    fields = dict(kind=kind, path=draw(odd), n=draw(st.none() | st.integers(1, 10**20)), seed=draw(st.integers(-10**20, 10**20)), sep=draw(odd | st.just("")),
                  flip=draw(st.booleans() | st.floats(0, 1)), columns=tuple(draw(st.just(c) | odd) for c in COLUMNS))
    if kind in ("hub", "genies"): fields |= dict(split=draw(odd), config=draw(odd if kind == "hub" else st.sampled_from(GENIES_SETS)))
    if kind == "world": fields |= dict(split=draw(odd), tag=draw(st.sampled_from(["", "good", "bad"])), rho=draw(st.none() | st.floats(0, 1)))
    spec = value_or_line(lambda: PairSpec(**fields))
    if spec is not None:
        assert PairSpec.parse(str(spec)) == spec
        assert parse_eval(f"label:-1={spec}").spec == spec


@FAST
@given(odd)
def test_every_value_comes_back_from_its_quotes(text):
    assert pieces(f"x,sep={quoted(text)},flip") == [(None, "x"), ("sep", text), (None, "flip")]


@FAST
@given(st.one_of(any_text, mixed("range(", ")", ",", "0.3", "-2", "N", "7", ".5", "-.5", "1.0", "+", " ", "range(0,N,2)", "1e3", "٣")), st.integers(1, 40))
@example(LONG, 8)
@example(f"range(0,4,{LONG})", 8)
@example(f"0.{LONG}", 8)
@example("range(0,1,0)", 8)
@example("1_0", 8)
def test_every_layer_string_is_read_or_refused(text, n):
    layers = value_or_line(parse_layers, text, n)
    if layers is not None:
        assert layers == list(dict.fromkeys(layers)) and all(0 <= k <= n for k in layers)
        assert parse_layers(",".join(map(str, layers)), n) == layers and describe_layers(layers, n)


@FAST
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.slices(9), lambda x: st.lists(x, max_size=4), max_leaves=6),
       st.integers(1, 40))
@example(slice(0, 4, 0), 8)
@example(slice(0, 4, "a"), 8)
@example(10 ** 5000, 8)
@example(slice(None, None, -1), 8)
def test_every_layer_object_is_read_or_refused(spec, n):
    layers = value_or_line(parse_layers, spec, n)
    if layers is not None: assert layers and all(0 <= k <= n for k in layers)


methods = mixed("dpo", "hs-none-inner", "side-none-mse", "steer", "loreft", "bipo", "prompt", ":", ",", "=", "beta=0.1", "alpha=", "align=pars_rat",
                "layers=", "0.3,-2", "range(0.3,-2)", "lr=1e-3", "steps=", "outer=ipo", "balance=share", "share=0.5", "reduce=mean", "rank=", "-", "nan",
                "inf", "text=", '"', "\\n", "repeat=", "1", "true")


@FAST
@given(st.one_of(any_text, methods))
@example(f"dpo:beta={LONG}")
@example(f"dpo:steps={LONG}")
@example(f"loreft:rank={LONG}")
@example("dpo:lr=1e999")
@example("dpo:beta=1,beta=2")
@example("hs-none-inner:layers=range(")
@example("dpo:")
@example("prompt:text=")
def test_every_method_is_read_or_refused(text):
    method = value_or_line(Method.parse, text)
    if method is not None:
        assert Method.parse(method.label).label == method.label == str(method)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | any_text,
                           lambda x: st.lists(x, max_size=3) | st.dictionaries(any_text, x, max_size=3), max_leaves=6)
messages = st.lists(st.one_of(json_values, st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", 3]) | any_text, "content": st.one_of(any_text, json_values)},
    optional={"tool_calls": json_values})), max_size=4)
cells = st.one_of(st.sampled_from(["x", "yes", "no", " "]), any_text, messages, json_values)
pair_rows = st.fixed_dictionaries({}, optional={c: cells for c in ("prompt", "chosen", "rejected", "kind", "key", "before")})


def load_bytes(name, data):
    path = Path(name)
    path.write_bytes(data)
    pairs = value_or_line(load_pairs, path)
    good, bad = value_or_line(read_all, path) or (None, [])
    if pairs is not None: assert good.rows == pairs.rows and not bad and load_pairs([p.as_row() for p in pairs])[0].prompt == pairs[0].prompt
    if good is not None: str(lint(good, problems=bad)), lint(good, problems=bad)._repr_markdown_()


@FAST
@given(st.binary(max_size=80), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet"]))
@example(b"[" * 100_000, "a.jsonl")
@example(b"[" * 100_000, "a.json")
@example(LONG.encode(), "a.jsonl")
@example(b"\xff\xfe{}", "a.jsonl")
@example(b'prompt,chosen,rejected\n"a', "a.csv")
@example(b"prompt\n" + b"x" * 200_000, "a.csv")
@example(b"a\x00b", "a.csv")
@example(b"PAR1" + b"\x00" * 20 + b"PAR1", "a.parquet")
def test_any_bytes_are_pairs_or_one_line(data, name): load_bytes(name, data)


@FAST
@given(st.lists(st.one_of(pair_rows, json_values), min_size=1, max_size=3))
@example([{"prompt": "x", "chosen": "\ud800", "rejected": "y"}])
@example([{"prompt": "x", "chosen": "a", "rejected": "b", "key": [], "kind": {}}])
@example([{"prompt": [], "chosen": [], "rejected": []}])
@example([{"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}])
@example([{"prompt": [{"role": ["user"], "content": "x"}], "chosen": "a", "rejected": "b"}])
@example([{"prompt": "x", "chosen": "a", "rejected": "b", "key": float("nan"), "kind": float("inf")}])
def test_any_json_is_pairs_or_one_line(rows):
    load_bytes("a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    value_or_line(load_pairs, rows)


@FAST
@given(cells | st.none(), cells, cells)
def test_any_messages_are_turns_or_one_line(prompt, chosen, rejected):
    as_turns = lambda x: x if isinstance(x, (str, list)) else str(x)
    found = value_or_line(split_messages, prompt if prompt is None else as_turns(prompt), as_turns(chosen), as_turns(rejected), "a:1")
    if found is not None: assert all(isinstance(x, str) for x in found[1:])


@FAST
@given(st.lists(st.one_of(any_text, st.none(), st.integers(), st.floats()), min_size=1, max_size=4), st.lists(any_text, min_size=1, max_size=4))
def test_any_table_is_pairs_or_one_line(values, texts):
    import pandas as pd
    frame = pd.DataFrame({"prompt": pd.Series(values, dtype=object), "chosen": pd.Series(texts, dtype=object), "rejected": "no"})
    value_or_line(load_pairs, frame)


marks = mixed("![x](http://a.b)", "[b](u)", "[b]: u", "_a_", "__", "*", "**", "`", "~", "~~~", "\n", "\r", "\t", "    ", " ", "# ", "1. ", "- ", "> ", "|",
              "\\", "<b>", "<http://a.b>", "&lt;", "[", "]", "(", "---", "===", "</details>", "<!--", "word")


@FAST
@given(marks)
@example("[b][b]")
@example("~~~\n# out")
def test_any_text_is_no_markup_in_markdown(text):
    "What a reader of Markdown finds are the tags of the piece, and none of the text's."
    import re
    import pandas as pd
    from markdown_it import MarkdownIt
    from reprpo.judge.blocks import Folded, Pair, Table, Text
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tags = lambda piece: re.findall(r"</?(\w+)", reader.render(piece.markdown()))
    fence = ["pre", "code", "code", "pre"]
    assert tags(Pair(text, text, text) if text else Pair("a", "b")) == fence
    assert tags(Folded("log", text)) == ["details", "summary", "summary", *fence, "details"]
    if text.strip(): assert set(tags(Text(text))) == {"p"} and set(tags(Text(text, "note"))) <= {"p", "em"}
    assert set(tags(Table(pd.DataFrame({"a": [text], "b": ["1"]})))) == {"table", "thead", "tbody", "tr", "th", "td"}

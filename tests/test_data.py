"""data: every source gives the same rows, every row the same tokens, and labels stand exactly where something is learned."""
import gzip, json, random, re, sys
from pathlib import Path
import numpy as np
import pytest
sys.path.insert(0, str(Path(__file__).parent))
from conftest import CHAT
from tiny import tiny_tokenizer, write_jsonl
from sftkit import Session
from sftkit.chat import ChatTemplate, render, render_prompt, templates
from sftkit.data import Encoder, Shape, aligned_tokens, collate, detect_shape, encode_rows, rows_on_both_sides, split_rows, text_blocks, _anchor_ids
from sftkit.rows import Row, map_rows, plain, read_rows, rows_hash, sample_data, write_rows, _open
from sftkit.recipe import DataError, SftkitError

MARKERS = ("<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TALK = [{"role": "system", "content": "be like the user"}, {"role": "user", "content": "turn on the light"}, {"role": "assistant", "content": "the light is on"},
        {"role": "user", "content": "what is\n\npython?"}, {"role": "assistant", "content": "\n\na language 👍🏽 for programming  "}]


def metaspace_tokenizer(scheme="first", kind="unigram", bos="<s>", eos="</s>", add_bos=True, add_eos=False, legacy=False):
    "A SentencePiece-like fast tokenizer: Llama-2 and Mistral prepend `▁` to a text (or to every piece)."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    special = ["<unk>", "<s>", "</s>", *MARKERS]
    words = "the light is on what be like turn a language for programming python user be INST ASSISTANT USER Response Instruction question answer " * 3
    byte = [f"<0x{i:02X}>" for i in range(256)]
    if kind == "unigram":
        raw = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False,
                                          initial_alphabet=list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?!.,:;#[]/<>|\n▁"))
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
        raw.train_from_iterator([words], trainer)
    else:
        alphabet = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?!.,:;#[]/<>|▁")
        vocab = {t: i for i, t in enumerate(dict.fromkeys(special + byte + alphabet + ["▁▁", "▁t", "▁th", "▁the", "▁a", "\n\n", "▁i", "▁is", "▁o", "▁on"]))}
        merges = [("▁", "▁"), ("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("▁", "i"), ("▁i", "s"), ("▁", "o"), ("▁o", "n")]
        raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if legacy: raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else: raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens(special)
    if add_bos or add_eos:
        pieces = ["<s>"] * add_bos + ["$A"] + ["</s>"] * add_eos
        raw.post_processor = processors.TemplateProcessing(single=" ".join(pieces), special_tokens=[("<s>", raw.token_to_id("<s>")), ("</s>", raw.token_to_id("</s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, unk_token="<unk>", pad_token=eos)


TOKENIZERS = {
    "bytes": lambda: tiny_tokenizer(extra=MARKERS),
    "bytes, no markers": lambda: tiny_tokenizer(),
    "gpt2": lambda: tiny_tokenizer(bos="<|endoftext|>", eos="<|endoftext|>", pad="<|endoftext|>", extra=MARKERS),
    "unigram first": lambda: metaspace_tokenizer("first"),
    "unigram always": lambda: metaspace_tokenizer("always"),
    "bpe first": lambda: metaspace_tokenizer("first", "bpe"),
    "bpe always": lambda: metaspace_tokenizer("always", "bpe"),
    "bpe legacy": lambda: metaspace_tokenizer("always", "bpe", legacy=True),
}

@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request): return TOKENIZERS[request.param]()

def trained_text(tok, example, key="labels"): return tok.decode([i for i in example[key] if i >= 0], clean_up_tokenization_spaces=False)
def one_row(value, **kw): return detect_shape([Row(value, "row 1")], **kw)
def encoder_for(tok, value, template=None, **kw): return Encoder(tok, one_row(value), template and templates()[template], **kw)


# ---- rows -----------------------------------------------------------------------------------------------------------

ROWS = [{"id": "007", "messages": TALK, "note": "NA"}, {"id": "8", "messages": TALK[1:3]},
        {"id": "9", "messages": [{"role": "user", "content": "1,5\n\"quoted\""}, {"role": "assistant", "content": "null"}]}]
PAIRS = [{"prompt": "what is 007?", "completion": "a, \"user\"\nNA"}, {"prompt": "été ☃\u2028", "completion": "1.0"}]

def containers(tmp_path, rows):
    import datasets, pandas as pd
    flat = [{k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for k, v in r.items()} for r in rows]
    frame = pd.DataFrame(rows)
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    pd.DataFrame(flat).to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "repr.csv", index=False)
    pd.DataFrame(flat).to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "b.parquet"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n\r\n"))
    (tmp_path / "utf16.csv").write_bytes((tmp_path / "a.csv").read_bytes().decode().encode("utf-16"))
    (tmp_path / "folder").mkdir(); write_jsonl(tmp_path / "folder" / "train.jsonl", rows); write_jsonl(tmp_path / "folder" / "test.jsonl", rows[:1])
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "disk"))
    files = [tmp_path / n for n in ("a.jsonl", "a.json", "a.csv", "repr.csv", "a.tsv", "a.parquet", "b.parquet", "a.jsonl.gz", "bom.jsonl", "utf16.csv", "folder", "disk")]
    return [*files, str(files[0]), frame, rows, tuple(rows), dataset, datasets.DatasetDict(train=dataset, test=dataset.select([0])), {"train": rows, "test": rows[:1]}]

@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["messages", "pairs"])
def test_acceptance_05_every_source_gives_the_same_rows_and_tokens(tmp_path, rows):
    found = [read_rows(source) for source in containers(tmp_path, rows)]
    for got in found: assert [r.value for r in got] == rows
    assert len({rows_hash(got) for got in found}) == 1
    tok = tiny_tokenizer(extra=MARKERS)
    encoder = Encoder(tok, detect_shape(found[0]), templates()["chatml"] if rows is ROWS else None)
    tokens = [[e["input_ids"].tolist() for e in encode_rows(got, encoder).examples] for got in found]
    assert all(t == tokens[0] for t in tokens)

def test_acceptance_09_folder_and_file_give_identical_examples(tmp_path):
    (tmp_path / "data").mkdir()
    path = write_jsonl(tmp_path / "data" / "train.jsonl", ROWS)
    tok = tiny_tokenizer(extra=MARKERS)
    a, b = (encode_rows(read_rows(s), Encoder(tok, detect_shape(read_rows(s)), templates()["chatml"])) for s in (path, tmp_path / "data"))
    for x, y in zip(a.examples, b.examples, strict=True): assert x["input_ids"].tolist() == y["input_ids"].tolist() and x["labels"].tolist() == y["labels"].tolist()

def test_nulls_that_arrow_adds_change_nothing():
    import datasets
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1.0}], "note": "c"}, {"messages": TALK[1:3]}]
    got = read_rows(datasets.Dataset.from_list(rows))
    assert [r.value for r in got] == rows

def test_numbers_and_missing_cells(tmp_path):
    import pandas as pd
    (tmp_path / "a.csv").write_text("id,text,when,gap\n007,nan,1e5,\n12345678901234567890,NA,TRUE,x\n")
    assert [r.value for r in read_rows(tmp_path / "a.csv")] == [{"id": "007", "text": "nan", "when": "1e5"}, {"id": "12345678901234567890", "text": "NA", "when": "TRUE", "gap": "x"}]
    frame = pd.DataFrame({"a": [1, 2], "b": [None, "x"], "c": [float("nan"), 1.5], "d": pd.array([None, 3], dtype="Int64"), "e": [pd.NaT, pd.Timestamp("2020-01-02")]})
    assert [r.value for r in read_rows(frame)] == [{"a": 1}, {"a": 2, "b": "x", "c": 1.5, "d": 3, "e": "2020-01-02T00:00:00"}]
    assert type(plain(np.int64(3))) is int and plain(np.array([[1, 2]])) == [[1, 2]]

def test_csv_with_a_huge_cell_and_line_breaks(tmp_path):
    text = "a\nb," * 60000
    import csv
    limit = csv.field_size_limit()
    with open(tmp_path / "a.csv", "w", newline="") as f: csv.writer(f).writerows([["text"], [text], ["last"]])
    assert [r.value["text"] for r in read_rows(tmp_path / "a.csv")] == [text, "last"] and csv.field_size_limit() == limit

def test_json_in_its_other_forms(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    forms = {"lines": "\n".join(map(json.dumps, rows)), "wrapped": json.dumps({"data": rows}), "columns": json.dumps({"text": ["a", "b"]}),
             "pandas": json.dumps({"text": {"0": "a", "1": "b"}})}
    for name, text in forms.items():
        (tmp_path / f"{name}.json").write_text(text)
        assert [r.value for r in read_rows(tmp_path / f"{name}.json")] == rows, name
    (tmp_path / "one.json").write_text(json.dumps({"messages": TALK}))
    assert read_rows(tmp_path / "one.json")[0].value == {"messages": TALK}

@pytest.mark.parametrize("found, rows", [
    ({"version": 1, "data": [{"text": "a"}, {"text": "b"}]}, 2), ({"version": "1.0", "licence": None, "rows": [{"body": "a"}]}, 1),
    ({"licenses": [{"id": 1}], "examples": [{"prompt": "a", "completion": "b"}] * 3}, 3),                        # the list with a known layout
    ({"conversations": [{"id": 7, "conversations": TALK}] * 2}, 2), ({"text": "About these rows", "data": [{"text": "a"}] * 4}, 4),
    ({"id": 7, "messages": TALK, "tools": [{"type": "function"}]}, None), ({"prompt": TALK[:1], "completion": TALK[1:], "tags": ["x", "y", "z"]}, None), # one row
    ({"text": "a", "tags": ["x", "y"]}, None), ({"question": "a", "answer": "b", "id": 3}, None),
])
def test_json_rows_beside_other_values(tmp_path, found, rows):
    (tmp_path / "a.json").write_text(json.dumps(found))
    read = read_rows(tmp_path / "a.json")
    assert len(read) == (rows or 1) and (read[0].value == found) == (rows is None) and read[0].where == "a.json row 1"

def test_json_with_no_clear_rows_says_so(tmp_path):
    for found, words in (({"train": [{"text": "a"}] * 2, "test": [{"text": "b"}]}, "several lists of objects.*`train` \\(2\\), `test` \\(1\\)"), ({"version": 1, "text": ["a", "b"]}, "`text` \\(2\\).*list of objects"),
                         ({"version": 1, "prompt": ["a"], "completion": ["b"]}, "`prompt` \\(1\\), `completion` \\(1\\)")):
        (tmp_path / "a.json").write_text(json.dumps(found))
        with pytest.raises(DataError, match=words): read_rows(tmp_path / "a.json")

def test_line_separators_inside_json_strings(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl")[0] == Row({"text": "a\u2028b\u0085c"}, "a.jsonl line 1")

def splits_of(folder): return list(_open(folder))

def test_splits_of_a_folder(tmp_path):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "val.csv", "test/part.jsonl", ".hidden.jsonl", "README.md"):
        path = tmp_path / name; path.parent.mkdir(exist_ok=True)
        path.write_text("text\nx\n" if name.endswith("csv") else json.dumps({"text": name}) + "\n")
    assert splits_of(tmp_path) == ["train", "test", "validation"]
    assert [r.value["text"] for r in read_rows(tmp_path)] == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert read_rows(tmp_path, "valid") == read_rows(tmp_path, "validation") and read_rows(tmp_path, "test")[0].value == {"text": "test/part.jsonl"}
    with pytest.raises(DataError, match="no split `holdout`. Splits: train, test, validation"): read_rows(tmp_path, "holdout")

def test_folder_of_files_without_split_names(tmp_path):
    write_jsonl(tmp_path / "chat.jsonl", [{"text": "a"}])
    assert splits_of(tmp_path) == ["train"]
    write_jsonl(tmp_path / "testing.jsonl", [{"text": "b"}])
    assert [r.value["text"] for r in read_rows(tmp_path)] == ["a"] and splits_of(tmp_path) == ["train", "test"]
    write_jsonl(tmp_path / "train.jsonl", [{"text": "c"}])
    assert [r.value["text"] for r in read_rows(tmp_path)] == ["c"] and read_rows(tmp_path, "chat")[0].value == {"text": "a"}

@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", '{"text": "a"}\n\n{"text": \n{"text": "c"}\n', ["a.jsonl line 3", "not valid JSON", "column"]),
    ("a.jsonl", '{"text": "a"}\n["b"]\n', ["a.jsonl line 2", "list", "object"]),
    ("a.json", '[{"text": "a"},\n {"text" "b"}]', ["a.json", "line 2"]),
    ("a.json", '"text"', ["a.json", "list of objects"]),
    ("a.csv", "text\nfine\nnot, fine\n", ["a.csv row 2", "line 3", "2 cells", "quotes"]),
    ("a.csv", "text,text\na,b\n", ["a.csv", "twice"]),
    ("a.csv", "text\n", ["a.csv", "no rows"]),
    ("a.csv", b"text\ncaf\xe9\n", ["a.csv line 2", "UTF-8", "0xe9"]),
    ("a.csv", "messages\n\"[{'role': broken\"\n", ["a.csv row 1", "messages", "json.dumps"]),
    ("a.jsonl", "", ["empty"]), ("a.jsonl", "\ufeff\n", ["empty"]), ("a.json", "[]", ["no rows"]),
    ("a.parquet", b"no parquet", ["a.parquet", "Parquet"]), ("a.docx", "x", [".jsonl", "a.docx"]), ("a.jsonl.gz", b"no gzip", ["a.jsonl.gz"]),
    ("a.jsonl", '{"text": "half \\ud83d"}\n', ["a.jsonl line 1", "surrogate"]), ("a.jsonl", "[" * 100000 + "\n", ["a.jsonl line 1"]),
])
def test_unreadable_files_say_where_and_what(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught: read_rows(tmp_path / name)
    for word in words: assert word in str(caught.value), str(caught.value)

def test_missing_sources_name_the_nearest(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"Did you mean `.*train\.jsonl`"): read_rows(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match="no data at"): read_rows(tmp_path / "no" / "such" / "x.csv")
    with pytest.raises(DataError, match="int"): read_rows(42)
    for empty in ([], {}): 
        with pytest.raises(DataError): read_rows(empty)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file"): read_rows(tmp_path / "empty")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/nothing.*Hub"): read_rows("nobody/nothing")
    with pytest.raises(DataError, match="no data at"): read_rows("nofolder/file.jsonl")

def test_hub_id_goes_through_load_dataset(monkeypatch):
    import datasets
    seen = []
    def load(*args, **kw): seen.append((args, kw)); return datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS), validation=datasets.Dataset.from_list(PAIRS[:1]))
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [r.value for r in read_rows("org/name")] == PAIRS and len(read_rows("org/name:main", "valid")) == 1
    assert seen == [(("org/name",), {}), (("org/name", "main"), {})] # trust_remote_code is never passed

def test_hub_id_without_a_connection_is_one_message(monkeypatch):
    import datasets, sys
    from huggingface_hub.errors import HTTPError
    def load(*args): raise HTTPError("no route to host")
    monkeypatch.setattr(datasets, "load_dataset", load); monkeypatch.setitem(sys.modules, "httpx", None)           # nothing that sftkit needs installs it
    with pytest.raises(DataError, match="org/name.*no route to host"): read_rows("org/name")

def test_write_rows_round_trip(tmp_path):
    rows = read_rows([{"tools": [{"z": 1, "a": 2}], "text": "é\u2028\n"}])
    again = read_rows(write_rows(rows, tmp_path / "x.jsonl"))
    assert again[0].value == rows[0].value and list(again[0].value["tools"][0]) == ["z", "a"] and rows_hash(again) == rows_hash(rows)
    assert rows_hash(rows) != rows_hash(read_rows([{"text": "other"}]))

def test_map_rows():
    rows = read_rows([{"messages": TALK}, {"n": 1}, {"n": 2}])
    def fn(row):
        if "n" not in row: row["messages"][0]["content"] = "changed"; return row
        return [row, row] if row["n"] == 2 else None
    assert [r.where for r in map_rows(rows, fn)] == ["row 1", "row 3", "row 3"] and rows[0].value["messages"][0]["content"] == TALK[0]["content"]
    with pytest.raises(DataError, match="`fn` failed on row 2: KeyError.*columns: n") as caught:
        def fn(row): return {"text": row["messages"]}
        map_rows(rows, fn)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(DataError, match="returned a str for row 1"): map_rows(rows, str)


# ---- shape ----------------------------------------------------------------------------------------------------------

SHARE = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]

@pytest.mark.parametrize("row, kind, columns", [
    ({"text": "a"}, "text", ("text",)), ({"messages": TALK}, "messages", ("messages",)), ({"conversations": SHARE, "system": "s"}, "messages", ("conversations", "system")),
    ({"prompt": "a", "completion": "b"}, "pair", ("prompt", "completion")), ({"prompt": TALK[:2], "completion": TALK[2:3]}, "messages", ("prompt", "completion")),
    ({"instruction": "a", "input": "", "output": "b"}, "messages", ("instruction", "output", "input")), ({"instruction": "a", "output": "b"}, "messages", ("instruction", "output")),
    ({"question": "a", "answer": 4, "input": "x"}, "messages", ("question", "answer")), ({"messages": TALK, "tools": []}, "messages", ("messages", "tools")),
    ({"text": TALK}, "messages", ("text",)), ({"text": 5}, "text", ("text",)),
])
def test_acceptance_05_layouts_are_recognised(row, kind, columns):
    shape = one_row(row)
    assert (shape.kind, shape.columns, shape.chat) == (kind, columns, kind == "messages")

def test_a_named_column_wins_and_the_others_are_noted():
    row = {"text": "a", "messages": TALK, "prompt": "p", "completion": "c", "body": "b"}
    shape = one_row(row)
    assert shape.columns == ("text",) and 'text_column="messages"' in shape.notes[0] and "`prompt` + `completion`" in shape.notes[1]
    assert one_row(row, text_column="messages").kind == "messages" and one_row(row, text_column="body").columns == ("body",)

def test_acceptance_05_a_wrong_column_lists_the_columns_there_are():
    with pytest.raises(DataError, match=r"no column `contents`. Columns: id, content.*Did you mean `content`"): one_row({"id": 1, "content": "a"}, text_column="contents")
    with pytest.raises(DataError, match="no column `text`. Columns: n, body. Type text_column=.body"): one_row({"n": 1, "body": "a"})
    with pytest.raises(DataError, match="Columns: input, output. If one holds the whole text, type text_column=.output"): one_row({"input": "a", "output": "b"})
    with pytest.raises(DataError, match=r'map\(lambda row: dict\(prompt=row\["ask"\], completion=row\["reply"\]\)\)'): one_row({"n": 1, "ask": "a", "reply": "b"})

def test_mixed_types_name_the_row(tmp_path):
    rows = [{"text": "a"}] * 6 + [{"text": ["b"]}] + [{"text": "b"}]
    with pytest.raises(DataError, match=r"a.jsonl line 7: column `text` holds a list \(\['b'\]\) where other rows hold text"): detect_shape(read_rows(write_jsonl(tmp_path / "a.jsonl", rows)))
    with pytest.raises(DataError, match="row 2.*`messages` holds text"): detect_shape(read_rows([{"messages": TALK}, {"messages": "hello"}, {"messages": TALK}]))
    with pytest.raises(DataError, match="row 1.*`text` holds an object"): one_row({"text": {"a": 1}})
    with pytest.raises(DataError, match='text_column="messages"'): one_row({"messages": "User: hi"})

@pytest.mark.parametrize("rows", [[{"text": "a"}, {"text": 7}, {"text": 1.5}], [{"prompt": "1+1=", "completion": 2}, {"prompt": 3, "completion": "b"}], [{"question": "q", "answer": 4}, {"question": "r", "answer": "five"}]])
def test_acceptance_05_numbers_among_texts_are_what_a_csv_shows(tmp_path, rows):
    import pandas as pd
    pd.DataFrame(rows, dtype=object).to_csv(tmp_path / "a.csv", index=False)
    sources = [read_rows(s) for s in (write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.csv", pd.DataFrame(rows, dtype=object), rows)]
    encoded = [[e["input_ids"].tolist() for e in encode_rows(r, Encoder(tiny_tokenizer(extra=MARKERS), detect_shape(r))).examples] for r in sources]
    assert len(encoded[0]) == len(rows) and all(e == encoded[0] for e in encoded) and len({rows_hash(r) for r in sources}) == 1

LAID_OUT = [{"messages": TALK}, {"text": "a stray row"}, {"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"}]

@pytest.mark.parametrize("usual", LAID_OUT, ids=lambda row: next(iter(row)))
@pytest.mark.parametrize("stray", LAID_OUT, ids=lambda row: next(iter(row)))
def test_a_row_of_another_layout_is_named(tmp_path, usual, stray):
    if usual is stray: return
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl", [usual] * 9 + [stray] + [usual] * 3))
    held = lambda row: " \\+ ".join(f"`{c}`" for c in row)
    with pytest.raises(DataError, match=f"^a.jsonl line 10 holds {held(stray)}, where 12 of 13 rows hold {held(usual)}. All rows need the same columns"): detect_shape(rows)
    with pytest.raises(DataError, match=f"^a.jsonl line 10 holds .* \\(2 rows do\\), where 12 of 14"): detect_shape([*rows, rows[9]])

def test_columns_that_some_rows_lack_are_no_mixture():
    rows = read_rows([{"text": "a", "messages": TALK}] * 2 + [{"messages": TALK}, {"text": "", "messages": TALK}])
    with pytest.raises(DataError, match='2 of 5 rows hold `text`, and 5 hold `messages`. To train on `messages`, type text_column="messages"'): detect_shape([*rows, rows[2]])
    assert detect_shape(rows).columns == ("text",) and "`messages`" in detect_shape(rows).notes[0] and detect_shape(rows, "messages").chat
    assert detect_shape(read_rows([{"text": "a"}, {"messages": TALK}, {"text": "b"}]), "messages").chat                       # named: whoever lacks it is named later


# ---- labels ---------------------------------------------------------------------------------------------------------

def expected(rendered): return "".join(rendered.text[s.start:s.end] for s in rendered.spans if s.trained)

@pytest.mark.parametrize("name", templates())
def test_acceptance_11_the_prompt_is_a_prefix_of_the_training_tokens(tokenizer, name):
    template = templates()[name]
    encoder = Encoder(tokenizer, Shape("messages", ("messages",)), template)
    whole = encoder({"messages": TALK})["input_ids"]
    for end in (2, 4):
        prompt = encoder.prompt(TALK[:end])
        assert whole[:len(prompt)] == prompt
        alone = tokenizer(render_prompt(TALK[:end], template, tokenizer), add_special_tokens=False).input_ids
        if end == 2: assert prompt == alone
        assert tokenizer.decode(prompt) == tokenizer.decode(alone)
    assert encoder.prompt({"messages": TALK}) == encoder.prompt(TALK) == encoder.prompt(TALK[:4]) and encoder.reference({"messages": TALK}) == TALK[4]["content"]

@pytest.mark.parametrize("name", templates())
def test_acceptance_12_trained_tokens_are_the_replies_and_their_ends(tokenizer, name):
    template = templates()[name]
    out = Encoder(tokenizer, Shape("messages", ("messages",)), template)({"messages": TALK})
    done = render(TALK, template, tokenizer)
    assert out["text"] == done.text and len(out["input_ids"]) == len(out["labels"]) == len(out["roles"]) == len(out["offsets"])
    assert tokenizer.decode(out["input_ids"], clean_up_tokenization_spaces=False) == tokenizer.decode(tokenizer(done.text, add_special_tokens=False).input_ids, clean_up_tokenization_spaces=False)
    runs, spans = [], [done.text[s.start:s.end] for s in done.spans if s.trained]
    for i, label in enumerate(out["labels"]):
        assert label in (-100, out["input_ids"][i])
        if label >= 0 and (i == 0 or out["labels"][i - 1] < 0): runs.append([])
        if label >= 0: runs[-1].append(label)
    decoded = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
    unknown = tokenizer.decode(tokenizer("👍🏽", add_special_tokens=False).input_ids).strip()
    squeeze = lambda text: text.replace("👍🏽", unknown).replace(" ", "") if "▁" in "".join(tokenizer.get_vocab()) else text # SentencePiece decodes without the space in front of a piece
    assert [squeeze(d) for d in decoded] == [squeeze(s) for s in spans]

def test_acceptance_12_survives_truncation():
    tok = tiny_tokenizer(extra=MARKERS)
    full = encoder_for(tok, {"messages": TALK}, "chatml")({"messages": TALK})
    for n in (1, 7, 30, len(full["input_ids"])):
        cut = encoder_for(tok, {"messages": TALK}, "chatml", max_seq_length=n)({"messages": TALK})
        assert cut["input_ids"] + cut["cut_ids"] == full["input_ids"] and cut["labels"] + cut["cut_labels"] == full["labels"]
        assert len(cut["input_ids"]) == n == len(cut["roles"]) and cut["offsets"] == full["offsets"] and cut["text"] == full["text"]

def test_offsets_cover_the_text_without_gaps():
    tok = tiny_tokenizer(extra=MARKERS)
    out = encoder_for(tok, {"messages": TALK}, "chatml")({"messages": TALK})
    covered = set()
    for a, b in out["offsets"]: covered |= set(range(a, b))
    assert covered == set(range(len(out["text"])))
    emoji = out["text"].index("👍")
    assert sum(a <= emoji < b for a, b in out["offsets"]) > 1 and all(l >= 0 for (a, b), l in zip(out["offsets"], out["labels"]) if a <= emoji < b)

def test_roles_name_every_token():
    tok = tiny_tokenizer(extra=MARKERS)
    out = encoder_for(tok, {"messages": TALK}, "chatml")({"messages": TALK})
    words = {role: tok.decode([i for i, r in zip(out["input_ids"], out["roles"]) if r == role]) for role in set(out["roles"])}
    assert words["system"] == TALK[0]["content"] and words["user"] == TALK[1]["content"] + TALK[3]["content"]
    assert words["assistant"] == trained_text(tok, out) == TALK[2]["content"] + "<|im_end|>" + TALK[4]["content"] + "<|im_end|>"

def test_a_token_of_the_template_s_space_and_a_word_has_the_role_of_the_word():
    tok = tiny_tokenizer(extra=MARKERS)
    talk = [{"role": "user", "content": "the light is on"}, {"role": "assistant", "content": "the light is off"}]
    out = encoder_for(tok, {"messages": talk}, "llama")({"messages": talk})
    said = [(tok.convert_ids_to_tokens(int(i)), role) for i, role in zip(out["input_ids"], out["roles"])]
    assert [role for token, role in said if token == "Ġlight"] == ["user", "assistant"] and [role for token, role in said if token.endswith("the")] == ["user", "assistant"]
    assert {role for token, role in said if token in "[INST]/"} == {"template"}

def test_a_token_that_straddles_the_boundary_is_cut():
    "Byte-level BPE merges line breaks; tokenised whole, the first token of the answer would begin in the prompt."
    tok = tiny_tokenizer(extra=MARKERS)
    tok.backend_tokenizer.add_tokens(["\n\n\n"])
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nyes"}]}
    encoder = encoder_for(tok, row, "chatml")
    out = encoder(row)
    assert out["input_ids"] != tok(out["text"], add_special_tokens=False).input_ids and tok.decode(out["input_ids"]) == out["text"]
    assert out["input_ids"][:len(encoder.prompt(row))] == encoder.prompt(row) == tok(out["text"][:out["text"].index("\n\nyes")], add_special_tokens=False).input_ids
    assert trained_text(tok, out) == "\n\nyes<|im_end|>"
    lists = {"prompt": row["messages"] + row["messages"][:1], "completion": row["messages"][1:]}
    last = encoder_for(tok, lists, "chatml", train_on="completion")
    both = encoder_for(tok, lists, "chatml")
    assert last(lists)["input_ids"] == both(lists)["input_ids"] and trained_text(tok, last(lists)) == "\n\nyes<|im_end|>"
    assert last(lists)["input_ids"][:len(last.prompt(lists))] == last.prompt(lists) == both.prompt(lists)

def test_gpt2_whitespace_rule_at_the_boundary():
    "GPT-2's pattern takes a run of spaces apart only when a word follows, so a header's tokens depend on what comes after it."
    tok = tiny_tokenizer(extra=MARKERS)
    double = "question" + "\n\n"
    ids, places, cuts = aligned_tokens(tok, _anchor_ids(tok), [double + "  answer"], [[len(double)]])[0]
    assert ids[:cuts[0]] == tok(double).input_ids and tok.decode(ids) == double + "  answer"

@pytest.mark.parametrize("scheme, legacy", [("first", False), ("always", False), ("always", True)])
def test_sentencepiece_continuation_has_no_invented_space(scheme, legacy):
    tok = metaspace_tokenizer(scheme, "bpe", legacy=legacy)
    text = "the  on"
    ids, places, (cut,) = aligned_tokens(tok, _anchor_ids(tok), [text], [[4]])[0] # the boundary runs through the token ▁▁
    assert cut is None or (ids[:cut] == tok(text[:4], add_special_tokens=False).input_ids and tok.decode(ids) == text)

def test_prefix_property_on_random_conversations(tokenizer):
    words = ["\n", "\n\n", " ", "  ", "the", " light", "é", "👍🏽", "?", "</s>", "<|im_end|>", "\t", "a", "ASSISTANT:", "###", "「"]
    rng = random.Random(0)
    for name in templates():
        encoder = Encoder(tokenizer, Shape("messages", ("messages",)), templates()[name])
        for _ in range(12):
            say = lambda: "x" + "".join(rng.choices(words, k=rng.randint(0, 6)))
            messages = [{"role": r, "content": ("" if r == "user" else rng.choice(["", "\n", " "])) + say()} for r in ("user", "assistant") * rng.randint(1, 3)]
            out = encoder({"messages": messages})
            assert len(out["offsets"]) == len(out["input_ids"]) == len(out["labels"]) == len(out["roles"])
            for end in range(1, len(messages), 2):
                prompt = encoder.prompt(messages[:end])
                assert out["input_ids"][:len(prompt)] == prompt, (name, messages)

def test_acceptance_12_rstrip_markers_keep_the_end_of_turn():
    "Phi-3's markers swallow the line break after them; the end of turn must be trained all the same."
    from tokenizers import AddedToken
    tok = tiny_tokenizer()
    tok.add_special_tokens({"additional_special_tokens": [AddedToken(t, rstrip=True, normalized=False, special=True) for t in ("<|user|>", "<|assistant|>", "<|end|>")]})
    jinja = "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    encoder = Encoder(tok, Shape("messages", ("messages",)), ChatTemplate("phi", jinja, ()))
    out = encoder({"messages": TALK[1:3]})
    assert trained_text(tok, out) == "the light is on<|end|>" and out["input_ids"][:len(encoder.prompt(TALK[1:2]))] == encoder.prompt(TALK[1:2])

@pytest.mark.parametrize("own_bos, own_eos", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("text", ["the light", "the light</s>", "<s>the light"])
def test_acceptance_13_one_bos_and_one_trained_eos(own_bos, own_eos, text):
    tok = metaspace_tokenizer("first", "bpe", add_bos=own_bos, add_eos=own_eos)
    bos, eos = tok.bos_token_id, tok.eos_token_id
    out = Encoder(tok, Shape("text", ("text",)))({"text": text})
    ids = out["input_ids"]
    assert ids.count(bos) == int(own_bos or "<s>" in text) and ids.count(eos) == 1 and ids[-1] == eos == out["labels"][-1]
    assert out["labels"][0] == -100 and out["labels"][1:] == ids[1:]
    none = Encoder(tok, Shape("text", ("text",)), add_eos_token=False)({"text": text})["input_ids"]
    assert none.count(eos) == int("</s>" in text)

def test_acceptance_13_pad_equal_to_eos_changes_nothing():
    a, b = tiny_tokenizer(extra=MARKERS), tiny_tokenizer(extra=MARKERS)
    b.pad_token = b.eos_token
    for row, template in (({"messages": TALK}, "zephyr"), ({"text": "hello world"}, None), ({"prompt": "a", "completion": "b"}, None)):
        assert encoder_for(a, row, template)(row) == encoder_for(b, row, template)(row)
    out = encoder_for(b, {"messages": TALK}, "zephyr")({"messages": TALK})
    assert sum(l == b.eos_token_id for l in out["labels"]) == 2 # one for each reply, none for the other turns
    one, two = encode_rows(read_rows([{"text": "hello world"}, {"text": "hello"}]), encoder_for(b, {"text": "a"})).examples
    batch = collate([one, two], b.pad_token_id)
    assert batch["labels"][1, two["length"] - 1] == b.eos_token_id and batch["labels"][1, -1] == -100 and batch["attention_mask"][1].sum() == two["length"]

def test_tokenizer_without_eos():
    tok = tiny_tokenizer(eos=None, pad=None)
    assert encoder_for(tok, {"text": "a"})({"text": "hello"})["input_ids"] == tok("hello").input_ids

def test_pair():
    tok = tiny_tokenizer()
    row = {"prompt": "hello ", "completion": " world"}
    encoder = encoder_for(tok, row)
    out = encoder(row)
    assert out["text"] == "hello  world" and trained_text(tok, out) == " world</s>" and encoder.reference(row) == " world"
    assert out["input_ids"][:len(encoder.prompt(row))] == encoder.prompt(row) == tok("hello ").input_ids == encoder.prompt("hello ")
    assert set(out["roles"]) == {"prompt", "completion", "eos"} and out["roles"][-1] == "eos" and out["offsets"][-1] == (12, 12)
    everything = encoder_for(tok, row, train_on="all")(row)
    assert everything["labels"][1:] == everything["input_ids"][1:] and everything["labels"][0] == -100
    assert trained_text(tok, encoder_for(tok, row, add_eos_token=False)(row)) == " world"
    as_chat = Encoder(tiny_tokenizer(extra=MARKERS), one_row(row), templates()["chatml"])(row)
    assert as_chat["text"] == "<|im_start|>user\nhello <|im_end|>\n<|im_start|>assistant\n world<|im_end|>\n"

def test_pair_with_own_bos():
    tok = metaspace_tokenizer("first", "bpe")
    row = {"prompt": "the light", "completion": " is on"}
    out = encoder_for(tok, row)(row)
    assert out["input_ids"] == tok("the light is on").input_ids + [tok.eos_token_id] and out["roles"][0] == "template" and out["offsets"][0] == (0, 0)
    assert encoder_for(tok, row).prompt(row) == tok("the light").input_ids

def test_layouts_become_conversations():
    tok = tiny_tokenizer(extra=MARKERS)
    qa = {"question": "what?", "answer": 4, "system": "be a machine"}
    assert encoder_for(tok, qa, "chatml")(qa)["text"] == "<|im_start|>system\nbe a machine<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    alpaca = {"instruction": "Add", "input": "1 2", "output": "3"}
    text = encoder_for(tok, alpaca, "alpaca")(alpaca)["text"]
    assert "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3</s>" in text and "paired with an input" in text
    assert "<|im_start|>user\nAdd\n\n1 2<|im_end|>" in encoder_for(tok, alpaca, "chatml")(alpaca)["text"]
    share = {"conversations": SHARE}
    assert encoder_for(tok, share, "chatml")(share)["text"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    lists = {"prompt": TALK[:4], "completion": TALK[4:]}
    assert encoder_for(tok, lists, "chatml")(lists)["input_ids"] == encoder_for(tok, {"messages": TALK}, "chatml")({"messages": TALK})["input_ids"]
    last = encoder_for(tok, lists, "chatml", train_on="completion")(lists)
    assert trained_text(tok, last) == TALK[4]["content"] + "<|im_end|>"

def test_tools_reach_the_template():
    jinja = "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    tool = {"type": "function", "function": {"name": "light", "parameters": {"type": "object", "properties": {}}}}
    tok = tiny_tokenizer(extra=MARKERS)
    texts = []
    for tools in ([tool], json.dumps([tool])):
        row = {"messages": TALK[1:3], "tools": tools}
        encoder = Encoder(tok, one_row(read_rows([row])[0].value), ChatTemplate("own", jinja, ()))
        out = encoder(row); texts.append(out["text"])
        assert out["input_ids"][:len(encoder.prompt(row))] == encoder.prompt(row) and '"name": "light"' in out["text"]
    assert texts[0] == texts[1]

@pytest.mark.parametrize("row, train_on", [({"text": "a"}, "assistant"), ({"text": "a"}, "completion"), ({"prompt": "a", "completion": "b"}, "assistant"), ({"messages": TALK}, "completion"),
                                           ({"messages": TALK}, "al")])
def test_train_on_that_does_not_fit(row, train_on):
    with pytest.raises(DataError, match="Accepted: auto"): encoder_for(tiny_tokenizer(extra=MARKERS), row, "chatml" if "messages" in row else None, train_on=train_on)

def test_train_on_all_keeps_the_same_tokens():
    tok = tiny_tokenizer(extra=MARKERS)
    row = {"messages": TALK}
    some, every = encoder_for(tok, row, "chatml")(row), encoder_for(tok, row, "chatml", train_on="all")(row)
    assert some["input_ids"] == every["input_ids"] and every["labels"][1:] == every["input_ids"][1:]

def test_slow_tokenizer_is_refused():
    class Slow: is_fast = False
    with pytest.raises(SftkitError, match="slow tokenizer"): Encoder(Slow(), Shape("text", ("text",)))

def test_rows_in_error_are_named():
    tok = tiny_tokenizer(extra=MARKERS)
    rows = [Row({"messages": TALK}, "a.jsonl line 1"), Row({"messages": [{"role": "king", "content": "x"}]}, "a.jsonl line 2")]
    with pytest.raises(DataError, match="a.jsonl line 2"): encode_rows(rows, Encoder(tok, Shape("messages", ("messages",)), templates()["chatml"]))
    with pytest.raises(DataError, match="row: column `messages` holds nothing"): encoder_for(tok, {"messages": TALK}, "chatml")({"other": 1})

@pytest.mark.parametrize("template, row, says", [
    ("llama", {"messages": [TALK[0], TALK[2], TALK[1], TALK[2]]}, "does not render.*alternate"), ("chatml", {"messages": [*TALK[1:3], {"role": "tool", "content": "42"}, TALK[2]]}, "format for a message of role tool"),
    ("chatml", {"messages": TALK, "tools": [{"name": "search"}]}, "format for tools"), ("chatml", {"messages": TALK, "tools": 5}, "`tools` should be a list.*not 5"),
    ("forgetful", {"messages": TALK}, "leaves out its content"),
])
def test_what_a_template_refuses_is_named_by_its_row(tmp_path, template, row, says):
    rows = read_rows(write_jsonl(tmp_path / "chat.jsonl", [{"messages": TALK[1:3]}] * 40 + [row] + [{"messages": TALK[1:3]}] * 7))
    forgetful = ChatTemplate("forgetful", "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    encoder = Encoder(tiny_tokenizer(extra=MARKERS), detect_shape(rows), {**templates(), "forgetful": forgetful}[template])
    with pytest.raises(SftkitError, match=f"^chat.jsonl line 41: .*{says}"): encode_rows(rows, encoder)


# ---- all rows -------------------------------------------------------------------------------------------------------

def test_acceptance_14_lengths_cuts_and_lost_answers():
    tok = tiny_tokenizer(extra=MARKERS)
    rows = read_rows([{"messages": TALK[1:3]}, {"messages": [{"role": "user", "content": "question " * 50}, TALK[2]]}, {"messages": TALK[1:2] + [{"role": "assistant", "content": "hello " * 50}]}])
    encoded = encode_rows(rows, Encoder(tok, detect_shape(rows), templates()["chatml"], max_seq_length=40))
    stats = encoded.stats
    assert max(stats["lengths"]) == 40 and stats["rows"] == 3 and stats["cut_rows"] == 2 and stats["lost_rows"] == ["row 2"] and stats["empty_rows"] == []
    assert [e["where"] for e in encoded.examples] == ["row 1", "row 3"]
    assert stats["trained_tokens"] == sum(int((e["labels"] >= 0).sum()) for e in encoded.examples) and stats["total_tokens"] == sum(e["length"] for e in encoded.examples)

def test_acceptance_14_nothing_left_to_train_on_is_an_error():
    tok = tiny_tokenizer(extra=MARKERS)
    rows = read_rows([{"messages": TALK[1:3]}])
    encoder = Encoder(tok, detect_shape(rows), templates()["chatml"], max_seq_length=5)
    first = next(i for i, l in enumerate(Encoder(tok, detect_shape(rows), templates()["chatml"])(rows[0].value)["labels"]) if l >= 0) + 1
    with pytest.raises(DataError, match=f"max_seq_length=5.*the earliest at token {first}.*Type max_seq_length="): encode_rows(rows, encoder)
    with pytest.raises(DataError, match="empty.*row 1"): encode_rows(read_rows([{"text": ""}]), Encoder(tok, Shape("text", ("text",))))
    with pytest.raises(DataError, match="empty"): encode_rows(read_rows([{"prompt": "a", "completion": ""}]), Encoder(tok, Shape("pair", ("prompt", "completion"))))

def test_a_row_of_one_token_is_not_called_empty():
    tok = tiny_tokenizer()
    def says(rows, kind="text", tok=tok, **kw):
        with pytest.raises(DataError) as caught: encode_rows(read_rows(rows), Encoder(tok, Shape(kind, tuple(rows[0])), **kw))
        return str(caught.value)
    for rows, kind in (([{"text": "a"}], "text"), ([{"prompt": "", "completion": "a"}], "pair")):
        assert re.search("1 of them is one token long.*or leave add_eos_token at True", text := says(rows, kind, add_eos_token=False)) and "empty" not in text
    assert "empty" in says([{"prompt": "a", "completion": ""}], "pair", add_eos_token=False) and "empty" in says([{"text": ""}], add_eos_token=False)
    assert says([{"text": "a"}], tok=tiny_tokenizer(eos=None)).endswith("Give longer texts.")
    assert "2 of them are one token long, e.g. row 2" in says([{"text": ""}, {"text": "a"}, {"text": "the"}], add_eos_token=False)

def test_blank_answers_are_listed_not_trained():
    tok = tiny_tokenizer(extra=MARKERS)
    rows = read_rows([{"question": "what?", "answer": 0}, {"question": "how?", "answer": None}, {"question": " ", "answer": 1}, {"question": "why?", "answer": 42}])
    encoded = encode_rows(rows, Encoder(tok, detect_shape(rows), templates()["chatml"]))
    assert encoded.stats["lost_rows"] == encoded.stats["empty_rows"] == ["row 2", "row 3"] and [e["where"] for e in encoded.examples] == ["row 1", "row 4"]

def test_template_notes_reach_the_stats():
    tok = tiny_tokenizer()
    endless = ChatTemplate("endless", "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}", ())
    notes = encode_rows(read_rows([{"messages": TALK[1:3]}] * 3), Encoder(tok, Shape("messages", ("messages",)), endless)).stats["notes"]
    assert len(notes) == 1 and "stop" in notes[0]

def test_encode_rows_is_the_encoder(tokenizer):
    rows = read_rows(ROWS)
    encoder = Encoder(tokenizer, detect_shape(rows), templates()["vicuna"], max_seq_length=300)
    for row, example in zip(rows, encode_rows(rows, encoder, batch_rows=2).examples, strict=True):
        one = encoder(row.value)
        assert example["input_ids"].tolist() == one["input_ids"] and example["labels"].tolist() == one["labels"] and example["length"] == len(one["input_ids"])

def test_a_map_reaches_the_tokens():
    tok = tiny_tokenizer()
    rows = read_rows([{"q": "a", "a": "b"}, {"q": "", "a": ""}])
    mapped = map_rows(rows, lambda r: {"text": f"### Instruction: {r['q']}\n### Response: {r['a']}"} if r["q"] else None)
    encoded = encode_rows(mapped, Encoder(tok, Shape("text", ("text",))))
    assert tok.decode(encoded.examples[0]["input_ids"]) == "### Instruction: a\n### Response: b</s>" and len(encoded) == 1
    with pytest.raises(DataError, match="no rows to train on"): encode_rows(map_rows(rows, lambda r: None), Encoder(tok, Shape("text", ("text",))))

def test_acceptance_19_a_split_shares_no_row_and_no_duplicate():
    rows = read_rows([{"text": f" row {i % 40}" + " " * (i // 40), "id": i} for i in range(100)])
    train, valid = split_rows(rows, 0.2, seed=3)
    assert len(train) + len(valid) == 100 and 17 <= len(valid) <= 20
    assert not {r.value["text"].strip() for r in train} & {r.value["text"].strip() for r in valid}
    assert split_rows(rows, 0.2, seed=3) == (train, valid) and split_rows(rows, 0.2, seed=4) != (train, valid)
    distinct = read_rows([{"text": str(i)} for i in range(50)])
    assert len(split_rows(distinct, 7, seed=0)[1]) == 7 and len(split_rows(distinct, 0.1, seed=0)[1]) == 5

def test_acceptance_19_duplicates_by_the_columns_that_are_trained_on():
    rows = read_rows([{"messages": TALK[1:3], "id": i} for i in range(4)] + [{"messages": TALK, "id": 9}])
    train, valid = split_rows(rows, 1, seed=0)
    assert [r.value["id"] for r in valid] == [9]
    body = read_rows([{"body": "same", "id": i} for i in range(3)] + [{"body": "other", "id": 9}])
    assert [r.value["id"] for r in split_rows(body, 1, 0, detect_shape(body, "body"))[1]] == [9]

ASKED = [(f"what is {i}?", f"the answer is {i}") for i in range(48)]
def talk_of(q, a): return [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
THOUGHT = {"reasoning_content": "let me see"}
SPELLINGS = {                                                                                          # two spellings of what is trained alike
    "an id": (lambda q, a: {"messages": talk_of(q, a)}, lambda q, a: {"messages": [{**m, "id": f"{q} {n}"} for n, m in enumerate(talk_of(q, a))]}),
    "ShareGPT": (lambda q, a: {"messages": talk_of(q, a)}, lambda q, a: {"messages": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}),
    "parts": (lambda q, a: {"messages": talk_of(q, a)}, lambda q, a: {"messages": [{**m, "content": [{"type": "text", "text": m["content"][:5]}, {"type": "text", "text": m["content"][5:]}]} for m in talk_of(q, a)]}),
    "thinking that the template drops": (lambda q, a: {"messages": talk_of(q, a)}, lambda q, a: {"messages": [talk_of(q, a)[0], {**talk_of(q, a)[1], **THOUGHT}]}),
    "system column": (lambda q, a: {"messages": [{"role": "system", "content": "s"}, *talk_of(q, a)]}, lambda q, a: {"messages": talk_of(q, a), "system": "s"}),
    "no tools": (lambda q, a: {"messages": talk_of(q, a), "tools": []}, lambda q, a: {"messages": talk_of(q, a)}),
    "empty input": (lambda q, a: {"instruction": q, "output": a}, lambda q, a: {"instruction": q, "input": "", "output": a}),
    "input": (lambda q, a: {"instruction": "say\n\n" + q, "output": a}, lambda q, a: {"instruction": "say", "input": q, "output": a}),
    "a number": (lambda q, a: {"question": q, "answer": int(a[14:])}, lambda q, a: {"question": q, "answer": a[14:]}),
    "blanks": (lambda q, a: {"prompt": q, "completion": a}, lambda q, a: {"prompt": q + "\n", "completion": " " + a}),
}

@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_acceptance_19_a_duplicate_is_one_however_it_is_spelled(spelled):
    rows = read_rows([spell(q, a) for spell in spelled for q, a in ASKED])
    shape = detect_shape(rows)
    train, valid = split_rows(rows, 0.25, 7, shape)
    assert len(valid) == 24 and not rows_on_both_sides(train, valid, shape) and {r.where for r in split_rows(rows, 0.25, 7)[1]} == {r.where for r in valid}
    ids = [{tuple(e["input_ids"]) for e in encode_rows(part, Encoder(tiny_tokenizer(extra=MARKERS), shape, templates()["chatml"] if shape.chat else None)).examples} for part in (train, valid)]
    assert not ids[0] & ids[1]
    assert [(mine.where, theirs.where) for mine, theirs in rows_on_both_sides(rows[:48], rows[50:52], shape)] == [("row 51", "row 3"), ("row 52", "row 4")]

def test_rows_that_differ_in_what_is_trained_are_no_duplicates():
    q, a = ASKED[0]
    call = lambda city: [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]
    rows = read_rows([{"messages": talk_of(q, a)}, {"messages": talk_of(q, a), "system": "s"}, {"messages": talk_of(q, a), "tools": call("Rome")}, {"messages": talk_of(q, a) * 2},
                      *[{"messages": [talk_of(q, a)[0], {"role": "assistant", "content": "", "tool_calls": call(city)}]} for city in ("Rome", "Oslo")],
                      *[{"messages": [talk_of(q, a)[0], {"role": "assistant", "content": "", "thinking": t}]} for t in ("one", "two")]])
    assert all(not rows_on_both_sides(rows[:i] + rows[i + 1:], [row], detect_shape(rows)) for i, row in enumerate(rows))

def test_a_split_names_the_row_that_is_no_conversation():
    rows = read_rows([{"messages": talk_of(*qa)} for qa in ASKED] + [{"messages": [{"role": "king", "content": "x"}]}])
    with pytest.raises(DataError, match="row 49, message 1: 'king' is no role"): split_rows(rows, 0.25, 0)
    pairs = read_rows([{"question": q, "answer": a} for q, a in ASKED] + [{"question": "", "answer": ""}])                # a blank one is left out later
    assert len(split_rows(pairs, 0.25, 0)[1]) == 12

def test_acceptance_19_rows_that_a_map_made_of_one_are_not_parted(tmp_path):
    "Nor those that are alike to one of them, and in the file they are stored in no less."
    rows = read_rows([{"text": q} for q, _ in ASKED])
    mapped = map_rows(rows, lambda r: [r, {"text": "in other words, " + r["text"]}] if r["text"] != ASKED[5][0] else r, lambda r: [r, {"text": r["text"].upper()}] if "is 6?" in r["text"] else r)
    mapped.append(Row({"text": "IN OTHER WORDS,  WHAT IS 6?"}, "row 49"))
    assert [r.source for r in mapped if r.where in ("row 6", "row 7", "row 49")] == [None, *["row 7"] * 4, None]
    stored = read_rows(write_rows(mapped, tmp_path / "x.jsonl"))
    assert [r.value for r in stored] == [r.value for r in mapped] and rows_hash(stored) == rows_hash(mapped) != rows_hash([Row(r.value, r.where) for r in mapped])
    for seed in range(5):
        train, valid = split_rows(mapped, 0.25, seed)
        assert 20 <= len(valid) <= 24 and not {r.where for r in train} & {r.where for r in valid} and len({"row 7", "row 49"} & {r.where for r in valid}) != 1
        assert [r.value for r in split_rows(stored, 0.25, seed)[1]] == [r.value for r in valid]
    assert Path(write_rows(rows, tmp_path / "y.jsonl")).read_text() == "".join(json.dumps(r.value) + "\n" for r in rows)            # nothing is added where rows stand alone
    with pytest.raises(DataError, match="made of one row"): split_rows(map_rows(rows[:1], lambda r: [r, {"text": "b"}, {"text": "c"}]), 1, 0)

@pytest.mark.parametrize("valid", [0, 1.5, -0.1, True, "a", float("nan"), 3, 5])
def test_split_sizes_that_cannot_be(valid):
    with pytest.raises(DataError): split_rows(read_rows([{"text": str(i)} for i in range(3)]), valid, 0)

def test_rows_all_alike_cannot_be_split():
    with pytest.raises(DataError, match="same content"): split_rows(read_rows([{"text": "a"}] * 5), 0.4, 0)
    with pytest.raises(DataError): split_rows(read_rows([{"text": "a"}]), 0.5, 0)

def test_blocks():
    tok = metaspace_tokenizer("first", "bpe")
    encoded = encode_rows(read_rows([{"text": "the light " * n} for n in (9, 1, 4)]), Encoder(tok, Shape("text", ("text",)), max_seq_length=None))
    joined = [i for e in encoded.examples for i in e["input_ids"].tolist()]
    blocks = text_blocks(encoded, 16)
    assert [i for b in blocks for i in b["input_ids"].tolist()] == joined and [b["length"] for b in blocks] == [16] * (len(joined) // 16) + [len(joined) % 16]
    assert all(b["labels"][0] == -100 and b["labels"][1:].tolist() == b["input_ids"][1:].tolist() for b in blocks) and joined.count(tok.eos_token_id) == 3
    assert [b["input_ids"].tolist() for b in text_blocks(encoded.examples, 16)] == [b["input_ids"].tolist() for b in blocks]
    with pytest.raises(DataError): text_blocks(encoded, 1)

@pytest.mark.parametrize("side", ["right", "left"])
def test_acceptance_15_padding_side_is_honoured(side):
    import torch
    examples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": np.array([8]), "labels": np.array([-100])}]
    batch = collate(examples, pad_token_id=7, padding_side=side)
    right = side == "right"
    assert {k: (v.dtype, tuple(v.shape)) for k, v in batch.items()} == {k: (torch.int64, (2, 3)) for k in ("input_ids", "attention_mask", "labels", "position_ids")}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 7, 7] if right else [7, 7, 8]] and batch["labels"].tolist() == [[-100, 6, 7], [-100] * 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0] if right else [0, 0, 1]] and batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    with pytest.raises(DataError): collate(examples, 0, "middle")

def test_acceptance_15_logits_do_not_depend_on_the_padding_side():
    import torch
    from tiny import tiny_model
    tok = tiny_tokenizer()
    model = tiny_model(tok).eval()
    examples = encode_rows(read_rows([{"text": "hello world"}, {"text": "the light is on and what is python"}]), Encoder(tok, Shape("text", ("text",)))).examples
    real = {}
    for side in ("right", "left"):
        batch = collate(examples, tok.pad_token_id, side)
        batch.pop("labels")
        with torch.no_grad(): logits = model(**batch).logits
        real[side] = logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(real["right"], real["left"], atol=1e-5, rtol=1e-4)

def test_sample_data_is_in_the_package():
    import sftkit
    assert sample_data() == Path(sftkit.__file__).parent / "sample"

def test_reading_lines_needs_neither_torch_nor_pandas(tmp_path):
    import subprocess
    from running import PYTHON
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    code = f"import sys; from sftkit.data import detect_shape; from sftkit.rows import read_rows; detect_shape(read_rows({path!r})); assert not {{'torch', 'transformers', 'pandas', 'datasets'}} & set(sys.modules)"
    subprocess.run([PYTHON, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("content, columns, first", [
    ("prompt;completion, short\nHi;Hello\nTwo;One, two, three\n", ["prompt", "completion, short"], "Hi"),
    ("prompt;completion, short\nHi;Hello, you\n", ["prompt", "completion, short"], "Hi"),            # each line has one comma too
    ('"a, b";c;d\n1;2;3\n', ["a, b", "c", "d"], "1"),
    ('text,"note; in two parts"\nHi,x\n', ["text", "note; in two parts"], "Hi"),
    ("text\tlabel, number\nHi, you\t1\n", ["text", "label, number"], "Hi, you"),
    ("a, b\n1, 2\n", ["a", "b"], "1"), ("text\nHi\n", ["text"], "Hi"), ("prompt,completion\nHi;you,Hello\nHi\n", ["prompt", "completion"], "Hi;you"),
])
def test_the_delimiter_of_a_csv_is_the_one_its_lines_agree_on(tmp_path, content, columns, first):
    (tmp_path / "a.csv").write_text(content)
    row = read_rows(tmp_path / "a.csv")[0].value
    assert list(row) == columns and row[columns[0]] == first


def test_rows_of_a_folder_are_named_by_their_path_in_it(tmp_path):
    import pandas as pd
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "chat.jsonl", [{"text": folder}])
        (tmp_path / folder / "chat.csv").write_text("text\nx\n")
        (tmp_path / folder / "list.json").write_text('[{"text": "x"}]')
        pd.DataFrame({"text": ["x"]}).to_parquet(tmp_path / folder / "t.parquet")
    assert [r.where for r in read_rows(tmp_path)] == [f"{f}/{name}" for f in "ab" for name in ("chat.csv row 1", "chat.jsonl line 1", "list.json row 1", "t.parquet row 1")]
    assert read_rows(tmp_path / "a" / "chat.jsonl")[0].where == "chat.jsonl line 1"
    (tmp_path / "b" / "chat.jsonl").write_text('{"text": \n')
    with pytest.raises(DataError, match="^b/chat.jsonl line 1 is not valid JSON"): read_rows(tmp_path)
    (tmp_path / "b" / "chat.jsonl").write_bytes(b"\xff\x00\n")
    with pytest.raises(DataError, match="^b/chat.jsonl"): read_rows(tmp_path)


def test_examples_know_the_number_of_their_row():
    "Places don't tell: a map may make several rows of one."
    rows = map_rows(read_rows([{"text": "hello"}]), lambda row: [row, {"text": ""}, {"text": "world"}])
    encoded = encode_rows(rows, Encoder(tiny_tokenizer(), Shape("text", ("text",))))
    assert [(e["row"], e["where"]) for e in encoded.examples] == [(0, "row 1"), (2, "row 1")]


def test_map_rows_takes_several_functions():
    rows = read_rows([{"text": "a"}])
    assert map_rows(rows) == rows
    assert [r.value["text"] for r in map_rows(rows, lambda r: [r, r], lambda r: {"text": r["text"] + "!"})] == ["a!", "a!"]


def test_the_question_of_a_row_is_what_its_columns_say():
    tok, asked = tiny_tokenizer(), "turn on light 3"
    talk = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "turn on "}, {"type": "text", "text": "light 3"}]}, {"role": "assistant", "content": "done"}]
    def question(row, column="text"): return Encoder(tok, detect_shape([Row(row, "row 1")], column), templates()["chatml"] if "prompt" not in row else None).question(row)
    assert question({"talk": talk}, "talk") == question({"messages": talk}) == question({"question": asked, "answer": "done"}) == question({"prompt": asked, "completion": "done"}) == asked
    assert question({"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "done"}]}) == question({"body": asked}, "body") == asked
    assert question({"instruction": "Add", "input": "1 2", "output": "3"}) == "Add\n\n1 2"
    chat = Encoder(tok, Shape("messages", ("talk",)), templates()["chatml"])
    assert chat.question(asked) == chat.question(talk) == chat.question(talk[:-1]) == asked
    assert chat.question([{"role": "system", "content": "begin"}]) == "begin"
    with pytest.raises(DataError, match="no conversations"): Encoder(tok, Shape("text", ("text",))).question(talk)


def read(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return [r.value for r in read_rows(path)]


def test_a_csv_whose_quotes_are_escaped_by_backslashes(tmp_path):
    assert read(tmp_path/"a.csv", 'prompt,completion\n"he said \\"hi, you\\"","C:\\new"\n') == [dict(prompt='he said "hi, you"', completion="C:\\new")]
    assert read(tmp_path/"b.csv", 'text\n"ends in \\"\n"a ""b"" c"\n') == [dict(text="ends in \\"), dict(text='a "b" c')]          # as RFC 4180 has it, where that reads
    assert read(tmp_path/"c.csv", 'text\n5" pipe\nthe 6" pipe\n') == [dict(text='5" pipe'), dict(text='the 6" pipe')]


def test_blank_lines_before_the_header_of_a_csv(tmp_path):
    assert read(tmp_path/"a.csv", "\n\n  \ntext,id\na,1\n\nb,2\n") == [dict(text="a", id="1"), dict(text="b", id="2")]


def test_an_address_is_told_from_a_path():
    for address in ("https://example.org/a.jsonl", "s3://bucket/a.jsonl"):
        with pytest.raises(DataError, match=f"{address}.*is an address.*[Dd]ownload"): read_rows(address)


def test_what_datasets_writes_beside_the_rows_is_no_data(tmp_path):
    (tmp_path/"dataset_infos.json").write_text('{"default": {"description": "x", "features": {}}}')
    assert read(tmp_path/"rows.jsonl", '{"text": "a"}\n') == [r.value for r in read_rows(tmp_path)] == [dict(text="a")]


def test_acceptance_19_a_map_that_makes_several_rows_of_one_parts_none(tiny, chat_file):
    "In this process, in another that reads the stored rows, and where the trainer itself does the mapping."
    from sftkit.training import Trainer
    again = lambda row: [row, {"messages": [*row["messages"], {"role": "user", "content": "and"}, {"role": "assistant", "content": f"that {row['messages'][0]['content']}"}]}]
    class Twice(Trainer):
        def preprocess(self, row): return again(row)
    plan = Session(tiny, project="run", chat_template="chatml").data(chat_file, eval=0.25)
    prepared = [p._work.data for p in (plan.map(again), Session.from_recipe(plan.map(again).recipe), plan.trainer(Twice))]
    held = [[[r.value for r in part] for part in (d.train_rows, d.valid_rows)] for d in prepared]
    asked = [{row["messages"][0]["content"] for row in part} for part in held[0]]
    assert held[0] == held[1] == held[2] and len(held[0][1]) == 24 and len(asked[1]) == 12 and not asked[0] & asked[1]


# -- evaluation rows in another layout than the training rows -------------------------------------------------------------------------

def shared(row): return {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in row["messages"]]}
def asked(row, *columns): return dict(zip(columns, (m["content"] for m in row["messages"])))
LAYOUTS_OF_A_TALK = {"sharegpt": shared, "question": lambda row: asked(row, "question", "answer"), "instruction": lambda row: asked(row, "instruction", "output"),
                     "system": lambda row: {**shared(row), "system": "Be brief."}, "text beside": lambda row: {**shared(row), "text": "x"}}


@pytest.mark.parametrize("layout", LAYOUTS_OF_A_TALK.values(), ids=LAYOUTS_OF_A_TALK)
def test_evaluation_rows_in_another_layout_of_conversations_are_read(tiny, chat_file, tmp_path, layout):
    talks = [{"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in CHAT[:3]] if "system" in layout(CHAT[0]) else CHAT[:3]
    held = tmp_path / "valid.jsonl"
    held.write_text("".join(json.dumps(layout(row)) + "\n" for row in CHAT[:3]))
    plan = lambda **where: Session(tiny, project="run", chat_template="chatml", max_steps=1, batch_size=2, gradient_accumulation=1).data(chat_file, **where)
    data, same = plan(eval=held)._work.data, plan(eval=talks)._work.data
    assert [e["input_ids"].tolist() for e in data.valid.examples] == [e["input_ids"].tolist() for e in same.valid.examples]
    assert [row.where for row in data.scored_rows] == [f"valid.jsonl line {n}" for n in (1, 2, 3)]
    assert ("also stand in the training data" in " ".join(data.notes)) == (talks == CHAT[:3])
    run = plan(eval=held).fit()
    assert [e for e in run.events if e["kind"] == "eval"]
    score = lambda rows: run.evaluate(rows, metrics="perplexity")["loss"]
    assert score([layout(row) for row in CHAT[:3]]) == score(talks) == pytest.approx(run.evaluate(metrics="perplexity")["loss"])
    assert score(layout(CHAT[0])) == score(talks[:1]) and run.generate(layout(CHAT[0]), max_new_tokens=2) == run.generate(talks[0], max_new_tokens=2)


SAID, PAIR = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"prompt": "a", "completion": "b"}
OTHERWISE = {"text for talks": (SAID, {"text": "a"}, "no column `messages`.*training is on `messages`. Columns here: text. Accepted: `messages`, or conversations as"),
             "pair for talks": (SAID, PAIR, "no column `messages`.*Columns here: prompt, completion"),
             "talks for text": ({"text": "a"}, SAID, "no column `text`.*Columns here: messages. Accepted: `text`. Rename"),
             "talks for pair": (PAIR, SAID, "no column `prompt`.*training is on `prompt` . `completion`. Columns here: messages"),
             "no answers": (PAIR, {"prompt": "a"}, "no column `completion`.*Columns here: prompt"),
             "other columns": ({"instruction": "a", "output": "b"}, {"instruct": "a", "output": "b"}, "no column `instruction`.*Did you mean `instruct`"),
             "no talk": (SAID, {"conversations": "a: b"}, "no column `messages`.*Columns here: conversations")}


@pytest.mark.parametrize("trained, held, says", OTHERWISE.values(), ids=OTHERWISE)
def test_evaluation_rows_of_another_kind_are_told_as_such(tiny, tmp_path, trained, held, says):
    for name, row in ("train", trained), ("valid", held): (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    plan = Session(tiny, project="run", chat_template="chatml").data("train.jsonl", eval="valid.jsonl")
    with pytest.raises(DataError, match=says) as told: plan.batches()
    assert "The evaluation rows (valid.jsonl line 1) have" in str(told.value) and ".map(fn)" in str(told.value)

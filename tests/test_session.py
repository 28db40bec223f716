"""Plans, their four spellings, and runs."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHAT, TEXT
from sftkit import Recipe, Run, Session, compare, train
from sftkit.recipe import DataError, RecipeError, RunError, SftkitError
from running import PYTHON, environment, losses
from tiny import write_jsonl

FAST = dict(epochs=2, batch_size=8, gradient_accumulation=1, lr=1e-2, chat_template="chatml")


def sftkit(*args, code=0, **env):
    done = subprocess.run([sys.executable, "-m", "sftkit", *args], capture_output=True, text=True, env=environment(**env))
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_acceptance_02_defaults():
    r = Recipe(model="m", data_path="d", project_name="p")
    expected = dict(text_column="text", trainer="sft", valid_path=None, valid_split=None, train_split="train", seed=42, epochs=3, max_steps=-1, batch_size=8, lr=5e-5, warmup_ratio=0.1,
                    gradient_accumulation=4, optimizer="adamw_torch", scheduler="linear", weight_decay=0.0, max_grad_norm=1.0, early_stopping_patience=None, early_stopping_threshold=0.0,
                    max_seq_length=2048, padding="right", chat_template=None, add_eos_token=True, block_size=-1, train_on="auto", peft=False, lora_r=16, lora_alpha=32, lora_dropout=0.05,
                    target_modules="all-linear", merge_adapter=False, quantization=None, mixed_precision=None, use_flash_attention_2=False, gradient_checkpointing=True, unsloth=False,
                    packing=False, compile="auto", use_distillation=False, teacher_model=None, distill_temperature=3.0, distill_alpha=0.7, use_enhanced_eval=False,
                    eval_metrics="perplexity,bleu,rouge", eval_save_predictions=False, log="none", distributed_backend=None, push_to_hub=False, token=None)
    assert {k: getattr(r, k) for k in expected} == expected
    assert Session("m", project="p").data("d").recipe == r


def test_acceptance_03_four_spellings_one_run(tiny, chat_file, tmp_path):
    plan = Session(tiny, project="fluent", **FAST).data(chat_file, eval=0.1).lora(r=4)
    assert Session.from_recipe(plan.recipe).recipe == plan.recipe
    fluent = plan.fit()
    plan.to_yaml("r.yaml")
    from_yaml = Session.from_yaml("r.yaml").fit(project_name="yaml")
    plan.options(project_name="script").to_script("s.py")
    subprocess.run([sys.executable, "s.py"], check=True, env=environment(), capture_output=True)
    sftkit("llm", *plan.options(project_name="cli").recipe.to_args())
    flat = train(plan.recipe.replace(project_name="flat"))
    assert len(losses(fluent)) == 12
    assert losses(fluent) == losses(from_yaml) == losses(Run.open("script")) == losses(Run.open("cli")) == losses(flat)


def test_in_memory_and_mapped_rows_travel(tiny):
    shout = lambda row: {"messages": [{**m, "content": m["content"].upper()} for m in row["messages"]]}
    plan = Session(tiny, project="p", **FAST).data(CHAT, eval=CHAT[:4]).map(shout).options(max_steps=2)
    first = plan.fit()
    plan.to_yaml("r.yaml")
    again = Session.from_yaml("r.yaml").fit(project_name="q")
    assert losses(first) == losses(again)
    assert "TURN OFF" in Path(plan.recipe.data_path).read_text() and "TURN OFF" in Path(plan.recipe.valid_path).read_text()


def shout(row): return {"messages": [{**m, "content": m["content"].upper()} for m in row["messages"]]}


@pytest.mark.parametrize("mapped", [False, True], ids=["in-memory", "mapped"])
def test_acceptance_03_the_recipe_of_rows_that_no_file_holds_is_the_same_run(tiny, mapped):
    plan = Session(tiny, project="p", max_steps=2, **FAST).data(CHAT, eval=CHAT[:4])
    if mapped: plan = plan.map(shout)
    plan = plan.lora(r=2)
    repr(plan), plan._repr_html_(), plan == plan.lora(r=4), hash(plan)
    plan.preview(n=1), plan.encode(CHAT[0]), next(plan.batches()), plan.memory()
    assert not Path("p").exists()                                                    # looking writes nothing
    flat = train(plan.recipe.replace(project_name="flat"))
    sftkit("llm", *[*plan.recipe.to_args(), "--project-name", "cli"])
    again = Session.from_recipe(plan.recipe)
    assert again.recipe == plan.recipe and (again == plan) == (not mapped)
    assert losses(flat) == losses(Run.open("cli")) == losses(again.fit()) == losses(plan.fit()) and len(losses(flat)) == 2


def test_a_recipe_stores_its_rows_again_where_they_are_gone_and_only_if_it_is_a_recipe(tiny):
    plan = Session(tiny, project="p", **FAST).data(CHAT)
    first = plan.recipe.data_path
    Path(first).unlink()
    assert plan.recipe.data_path == first and len(Path(first).read_text().splitlines()) == len(CHAT)
    with pytest.raises(RecipeError, match="merge_adapter"): plan.options(project_name="q", merge_adapter=True).recipe
    assert not Path("q").exists()
    Path("file").write_text("")
    with pytest.raises(RunError, match="`file` is a file"): plan.options(project_name="file").recipe
    with pytest.raises(RecipeError, match="valid_split.*rows are in memory"): plan.options(valid_split="test").recipe
    with pytest.raises(RecipeError, match="valid_split.*rows are in memory"): plan.options(valid_split="test").map(shout).recipe


def test_a_plan_is_shown_without_reading_or_mapping_its_rows(tiny, chat_file):
    seen = []
    def slow(row): seen.append(row); return row
    plan = Session(tiny, project="p", merge_adapter=True).data(chat_file).map(slow)
    assert "1 map step" in repr(plan) and "merge_adapter" in plan._repr_html_() and not seen
    with pytest.raises(RecipeError, match="merge_adapter"): plan.recipe


@pytest.mark.parametrize("keywords", [
    dict(trainer="sft", text_column="text", epochs=1, batch_size=8, lr=5e-5, warmup_ratio=0.1, gradient_accumulation=4, peft=True, lora_r=16, lora_alpha=32, mixed_precision="no",
         gradient_checkpointing=True, use_flash_attention_2=True),
    dict(text_column="text", epochs=1, batch_size=4, lr=2e-5, max_seq_length=512),
    dict(text_column="text", epochs=1, peft=True, lora_r=64, lora_alpha=128, lora_dropout=0.1, target_modules="c_attn, c_proj", quantization=None, gradient_checkpointing=True, batch_size=1,
         gradient_accumulation=16, lr=1e-4)], ids=["quick-start", "csv-file", "lora"])
def test_acceptance_04_flat_api(tiny_gpt2, keywords):
    import pandas as pd
    pd.DataFrame(TEXT).to_csv("train.csv", index=False)
    run = train(Recipe(model=tiny_gpt2, data_path="./train.csv", project_name="gpt2-qa", **keywords))
    assert isinstance(run, Run) and run.state == "finished"


def test_acceptance_04_chat_with_chatml(tiny_gpt2):
    Path("chat_data.json").write_text(json.dumps(CHAT))
    run = train(Recipe(model=tiny_gpt2, data_path="chat_data.json", text_column="messages", chat_template="chatml", project_name="chatbot", epochs=1, batch_size=4))
    assert run.state == "finished" and "<|im_start|>" in run.tokenizer.chat_template


def test_acceptance_05_every_source_gives_the_same_tokens(tiny):
    import pandas as pd
    from datasets import Dataset, DatasetDict
    frame = pd.DataFrame(CHAT)
    write_jsonl("a.jsonl", CHAT); Path("a.json").write_text(json.dumps(CHAT)); frame.to_parquet("a.parquet")
    frame.assign(messages=[json.dumps(r["messages"]) for r in CHAT]).to_csv("a.csv", index=False)
    Path("folder").mkdir(); write_jsonl("folder/train.jsonl", CHAT)
    sources = ["a.jsonl", "a.json", "a.parquet", "a.csv", "folder", frame, CHAT, Dataset.from_list(CHAT), DatasetDict(train=Dataset.from_list(CHAT))]
    tokens = [[b["input_ids"].tolist() for b in Session(tiny, project="p", **FAST).data(s).batches()] for s in sources]
    assert all(t == tokens[0] for t in tokens)
    with pytest.raises(DataError, match="Columns: messages"): next(Session(tiny, project="p").data("a.jsonl", column="mesages").batches())


def test_acceptance_09_folder_and_file_agree_and_the_template_is_saved(tiny, chat_file):
    Path("folder").mkdir(); write_jsonl("folder/train.jsonl", CHAT)
    plans = [Session(tiny, project=f"p{i}", max_steps=1, **FAST).data(s) for i, s in enumerate([chat_file, "folder"])]
    runs = [p.fit() for p in plans]
    assert losses(runs[0]) == losses(runs[1])
    from transformers import AutoTokenizer
    saved = AutoTokenizer.from_pretrained("p0")
    text = saved.apply_chat_template(CHAT[0]["messages"], tokenize=False)
    assert saved(text, add_special_tokens=False)["input_ids"] == plans[0].encode(CHAT[0])["input_ids"]


def test_acceptance_32_errors_name_the_right_field_all_at_once():
    with pytest.raises(RecipeError, match="Did you mean `lr`"): Session("m", project="p", learning_rte=1e-4)
    with pytest.raises(RecipeError) as e: Recipe(model="m", project_name="p", data_path="d", learning_rte=1, epochs="many", padding="up", quantization="int3", lora_r=0)
    assert str(e.value).startswith("5 things") and all(w in str(e.value) for w in ("`lr`", "epochs", "padding", "int4, int8", "lora_r"))
    with pytest.raises(RecipeError, match="`data_path` is missing"): Session("m", project="p").recipe
    with pytest.raises(RecipeError, match="merge_adapter"): Session("m", project="p", merge_adapter=True).data("d").recipe


@pytest.mark.parametrize("typed, told", [
    (lambda p: p.lora(rank=8), r"`\.lora\(\)` takes no `rank`\. Did you mean `r`\?"), (lambda p: p.lora(lora_alpha=8), "Did you mean `alpha`"),
    (lambda p: p.lora(lr=1e-3), r"It belongs into \.options\(lr=\.\.\.\)"), (lambda p: p.data("d", evl=0.1), "Did you mean `eval`"),
    (lambda p: p.data(path="d"), "Did you mean `source`"), (lambda p: p.distill("t", temp=2), "Did you mean `temperature`"),
    (lambda p: p.quantize(load_in_4bit=True), "Did you mean `bits`"), (lambda p: p.preview(rws=3), "Did you mean `rows`")])
def test_acceptance_32_a_step_names_the_keyword_that_was_meant(typed, told):
    with pytest.raises(RecipeError, match=told): typed(Session("m", project="p"))


def test_a_step_that_is_none_is_answered_with_the_nearest_and_its_own_errors_are_not_hidden():
    plan = Session("m", project="p")
    with pytest.raises(AttributeError, match="has no `dta`. Did you mean `data`"): plan.dta
    with pytest.raises(AttributeError, match=r"It is a parameter: \.options\(lr=\.\.\.\)"): plan.lr
    class Broken(Session):
        @property
        def encoded(self): return "text".no_such_method
    with pytest.raises(AttributeError, match="'str' object has no attribute 'no_such_method'"): Broken("m", project="p").encoded
    import copy, pickle
    assert copy.copy(plan) == pickle.loads(pickle.dumps(plan)) == plan


def test_a_notebook_shows_an_error_below_the_lines_that_were_typed_and_no_others():
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    try:
        shell.run_cell("from sftkit import Session\ndef plan(): return Session('m', project='p').options(learning_rte=1)")
        import contextlib, io
        with contextlib.redirect_stdout(io.StringIO()) as out: shell.run_cell("plan()")
        text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
        assert "Did you mean `lr`?" in text and "plan()" in text and "learning_rte=1" in text and "session.py" not in text and "recipe.py" not in text, text
    finally: InteractiveShell.clear_instance()


def test_acceptance_32_before_anything_is_written(tiny, tmp_path):
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for source, words in ([], "no rows"), ("bad.jsonl", "line 2"), ("missing.jsonl", "missing.jsonl"), ([{"text": ""}], "train"):
        with pytest.raises(DataError, match=words): Session(tiny, project="p").data(source).fit()
    for messages, words in ([{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}], "row 1"), ([{"role": "user", "content": "x"}], "assistant"):
        with pytest.raises(DataError, match=words): Session(tiny, project="p", chat_template="chatml").data([{"messages": messages}]).fit()
    with pytest.raises(Exception, match="chatml"): Session(tiny, project="p", chat_template="chatlm").data(CHAT).fit()
    assert not Path("p").exists()


def test_acceptance_01_basic_cli(tiny_gpt2):
    Path("data").mkdir(); write_jsonl("data/train.jsonl", TEXT)
    said = sftkit("llm", "--model", tiny_gpt2, "--trainer", "sft", "--data-path", "./data", "--text-column", "text", "--project-name", "my-sft", "--epochs", "3", "--batch-size", "8", "--lr", "5e-3")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    AutoModelForCausalLM.from_pretrained("./my-sft"), AutoTokenizer.from_pretrained("./my-sft")
    values = losses(Run.open("my-sft"))
    assert values[-1] < values[0] and "loss" in said and "report.html" in said and Path("my-sft/report.html").exists()


@pytest.mark.parametrize("args", [
    "--trainer sft --data-path ./data --text-column text --project-name my-sft-model --epochs 3 --batch-size 8 --lr 5e-5",
    "--trainer sft --data-path ./data --text-column text --project-name llama-sft-lora --peft --lora-r 16 --lora-alpha 32 --quantization int4 --epochs 3",
    "--trainer sft --data-path ./chat_data --text-column messages --chat-template chatml --project-name chat-model --epochs 3",
    "--trainer sft --data-path ./conversations.json --text-column messages --chat-template chatml --project-name chatbot",
    "--data-path ./data --project-name oom --batch-size 1 --gradient-accumulation 32 --gradient-checkpointing --quantization int4 --peft --lora-r 8",
    "--data-path ./data --project-name slow --disable-gradient-checkpointing --use-flash-attention-2 --warmup-ratio 0.2 --lr 1e-5"])
def test_acceptance_01_commands_of_the_guide(tiny_gpt2, args, capsys):
    from sftkit.cli import main
    for folder, name, rows in ("data", "train.jsonl", TEXT), ("chat_data", "chat.jsonl", CHAT): Path(folder).mkdir(); write_jsonl(f"{folder}/{name}", rows)
    Path("conversations.json").write_text(json.dumps(CHAT))
    assert main(["llm", "--model", tiny_gpt2, *args.split(), "--max-steps", "2"]) == 0


def test_cli_errors_are_one_message(tiny):
    said = sftkit("llm", "--model", tiny, "--data-path", "none.jsonl", "--project-name", "p", "--learning-rte", "1", "--epochs", code=1)
    assert "Did you mean `--lr`" in said and "--epochs" in said and "Traceback" not in said
    assert "`lm` is no command. Did you mean `llm`?" in sftkit("lm", code=1)


def test_plans_are_frozen_values():
    base = Session("m", project="p").data("d")
    a, b = base.lora(r=4), base.lora(r=8).quantize("int8")
    assert (base.recipe.peft, a.recipe.lora_r, b.recipe.lora_r, a.recipe.quantization) == (False, 4, 8, None)
    with pytest.raises(AttributeError, match="frozen"): base.model = "x"
    with pytest.raises(RecipeError, match="lora_r"): base.lora(r=-1)


def test_plans_are_equal_by_what_they_say():
    import pandas as pd
    plan = lambda: Session("m", project="p").data("d", eval=0.1).lora(r=4).options(epochs=3, token="secret")
    assert plan() == plan() and hash(plan()) == hash(plan()) and len({plan(), plan()}) == 1
    assert Session.from_recipe(plan().recipe) == plan() and hash(Session.from_recipe(plan().recipe)) == hash(plan())
    assert Session("m", project="p", lora_r=4, valid_split=0.1, data_path="d", peft=True) == plan() != plan().lora(r=8) and plan() != plan().recipe
    assert Session("m", project="p") == Session("m", project="p") != Session("n", project="p")                         # also without data
    rows = lambda: [dict(text="a", n=1), dict(text="b", n=2)]
    held = lambda source, **kw: Session("m", project="p").data(source, **kw)
    assert held(rows()) == held(pd.DataFrame(rows())) != held(rows()[:1]) and hash(held(rows())) == hash(held(pd.DataFrame(rows())))
    assert held(rows(), eval=rows()[:1]) == held(rows(), eval=rows()[:1]) != held(rows(), eval=rows()[1:]) != held(rows())
    shout, whisper = (lambda row: row), (lambda row: None)
    assert held(rows(), eval=rows()[:1]) == Session.from_recipe(held(rows(), eval=rows()[:1]).recipe) and held(rows()).options(valid_split="test") != held(rows())
    assert held("d").map(shout) == held("d").map(shout) != held("d").map(whisper) and held("d").map(shout) != held("d") and len({held("d").map(shout), held("d").map(shout)}) == 1
    from sftkit.training import Trainer
    class Mine(Trainer): pass
    first = Mine
    class Mine(Trainer): pass
    assert held("d").trainer(Mine) == held("d").trainer(Mine) != held("d").trainer(first)


def test_reprs_work_everywhere(tiny, chat_file):
    plan = Session(tiny, project="p", **FAST).data(chat_file, eval=0.1).lora(r=2).options(max_steps=2)
    assert "LoRA, rank 2" in repr(plan) and "LoRA, rank 2" in plan._repr_html_()
    assert "none yet" in repr(Session("m")) and "missing" in Session("m")._repr_html_()
    preview = plan.preview(n=2)
    assert "trained" in repr(preview) and "trained" in preview._repr_html_()
    run = plan.fit()
    assert "finished" in repr(run) and "<img" in run._repr_html_()
    table = run.versus_base(CHAT[:2], max_new_tokens=4)
    assert "tuned" in repr(table) and "tuned" in table._repr_html_()
    scores = run.evaluate(max_new_tokens=4)
    assert "perplexity" in repr(scores) and len(scores["predictions"]) == 5 and 0 <= scores["exact_match"] <= 1
    assert run.plot().data and list(run.history.step) == [1, 2] and run.history.eval_loss.notna().any()
    other = plan.fit(project_name="q", lr=2e-2)
    both = compare(run, other)
    assert list(both.differences.index) == ["lr"] and "q" in repr(both) and "q" in both._repr_html_() and len(both.plot().data) == 4
    lines, dots = both.plot().data[::2], both.plot().data[1::2]
    assert [l.line.color for l in lines] == [d.marker.color for d in dots] and lines[0].line.color != lines[1].line.color
    mapped = [Session(tiny, project=name, **FAST).data(CHAT[:8]).options(max_steps=1, lr=lr).fit() for name, lr in (("a", 1e-2), ("b", 2e-2))]
    assert list(compare(*mapped).differences.index) == ["lr"]                        # each has its own copy of the same rows


def test_report_is_self_contained_and_escapes_the_data(tiny):
    rows = [{"messages": [{"role": "user", "content": f"<script>alert({i})</script>"}, {"role": "assistant", "content": "</div><b>no</b>"}]} for i in range(12)]
    run = Session(tiny, project="p", **FAST).data(rows, eval=3).options(max_steps=1).fit()
    page = run.report().read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "</div><b>no" not in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    opened = Run.open("p")
    assert opened.report("elsewhere.html").read_text() == page


def test_secrets_stay_out(tiny, chat_file):
    run = Session(tiny, project="p", token="hf_verysecret", **FAST).data(chat_file).options(max_steps=1).fit()
    run.report()
    assert "verysecret" not in repr(run.recipe)
    for path in Path("p").rglob("*"):
        if path.is_file(): assert b"verysecret" not in path.read_bytes(), path


def test_generate_takes_texts_messages_and_rows(tiny, chat_file):
    run = Session(tiny, project="p", **FAST).data(chat_file).options(max_steps=1).fit()
    one = run.generate("turn on light 1", max_new_tokens=4)
    assert run.generate(["turn on light 1", "turn on light 1"], max_new_tokens=4) == [one, one]
    assert run.generate([{"role": "user", "content": "turn on light 1"}], max_new_tokens=4) == one
    with pytest.raises(RunError, match="no run"): Run.open("nowhere")


OWN = """from sftkit.training import Trainer
class Own(Trainer):
    def preprocess(self, row): return {"messages": [{"role": "user", "content": row["said"]}, {"role": "assistant", "content": row["answered"]}]}
"""


def test_a_run_is_evaluated_and_merged_with_its_own_trainer(tiny, tmp_path, monkeypatch):
    (tmp_path / "own_trainer.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_jsonl("d.jsonl", [{"said": f"what is {i}", "answered": f"it is {i}"} for i in range(12)])
    run = Session(tiny, project="run", **FAST, trainer="own_trainer:Own").data("d.jsonl", eval=3).lora(r=2).options(max_steps=1).fit()
    for one in run, Run.open("run"):
        assert len(one.evaluate(max_new_tokens=4)["predictions"]) == 3
    assert Path(Run.open("run").merge("merged").path).exists()
    del sys.modules["own_trainer"]


def test_what_was_just_trained_is_evaluated_with_a_trainer_of_the_notebook(tiny, chat_file):
    from sftkit.training import Trainer
    class Own(Trainer):
        def preprocess(self, row): return {"messages": row["messages"][-2:]}
    run = Session(tiny, project="run", **FAST).data(chat_file, eval=3).trainer(Own).options(max_steps=1).fit()
    assert len(run.evaluate(max_new_tokens=4)["predictions"]) == 3


def test_what_eval_names_does_not_depend_on_the_folder(tiny, tmp_path):
    named = lambda eval: {k: v for k, v in Session("m", project="p").data("d", eval=eval)._fields.items() if k.startswith("valid")}
    split = {name: named(name) for name in ("test", "missing.tsv", "held.NDJSON", "held.csv.gz", "./test", "held-out", "org/name")}
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "test" / "a.jsonl", CHAT[:3]); write_jsonl(tmp_path / "held-out", CHAT)
    assert split == {name: named(name) for name in split} and split["test"] == {"valid_split": "test"} and split["held-out"] == {"valid_split": "held-out"}
    for name in ("missing.tsv", "held.NDJSON", "held.csv.gz", "./test", "org/name"): assert split[name] == {"valid_path": name}
    assert named(Path("test")) == {"valid_path": "test"} and named(0.1) == {"valid_split": 0.1}
    (tmp_path / "d").mkdir()
    for part in ("train", "test"): write_jsonl(tmp_path / "d" / f"{part}.jsonl", CHAT[:8])
    assert len(Session(tiny, project="p", **FAST).data("d", eval="test")._work.data.valid_rows) == 8
    assert len(Session(tiny, project="p", **FAST).data("d", eval="./test")._work.data.valid_rows) == 3
    with pytest.raises(DataError, match="no split `test`.*type `./test`"): Session(tiny, project="p", **FAST).data("d/train.jsonl", eval="test")._work.data


def test_a_comparison_shows_values_as_they_were_given(tiny, chat_file):
    runs = [Session(tiny, project=n, **FAST).options(**more).data(chat_file).fit() for n, more in (("a", dict(max_steps=2)), ("b", dict(max_steps=1, eval_steps=20, valid_split=4)))]
    both = compare(*runs)
    assert both.differences.loc["max_steps"].tolist() == [2, 1] and both._differing()["eval_steps"] == [None, 20]
    line = next(l for l in repr(both).splitlines() if l.startswith("eval_steps"))
    assert line.split() == ["eval_steps", "–", "20"]
    assert "loss, smoothed" in repr(both) and "best eval loss" in repr(both) and "its perplexity" in repr(both)


def test_a_run_without_steps_has_a_history_and_a_place_in_a_comparison(tiny, chat_file):
    from sftkit.events import EventLog, RunDirectory
    run = Session(tiny, project="a", **FAST).data(chat_file).options(max_steps=1).fit()
    Path("b").mkdir()
    Path("b/recipe.yaml").write_text(Path("a/recipe.yaml").read_text())
    EventLog(RunDirectory("b").events_path).append("state", state="starting", step=0)
    empty = Run.open("b").history
    assert len(empty) == 0 and list(empty) == list(run.history)
    both = compare(run, "b")
    assert len(both.plot().data) == 2 and len(both.results) == 2


def test_encode_and_preview_of_a_row_that_becomes_several(tiny, chat_file):
    plan = Session(tiny, project="p", **FAST).data(chat_file).map(lambda row: [row, {"messages": row["messages"][:1] + [{"role": "assistant", "content": "once more"}]}])
    with pytest.raises(DataError, match="becomes 2 rows.*preview"): plan.encode(CHAT[0])
    text = plan.preview(rows=CHAT[:1]).text
    assert "light 0" in text and "once more" in text
    with pytest.raises(DataError, match="leaves this row out"): Session(tiny, project="q", **FAST).data(chat_file).map(lambda row: None if row == CHAT[0] else row).encode(CHAT[0])


def test_eval_names_a_split_of_data_in_memory_too(tiny):
    both = {"train": CHAT[:8], "validation": CHAT[8:11]}
    data = Session(tiny, project="p", **FAST).data(both, eval="valid")._work.data
    assert len(data.train_rows) == 8 and [r.value for r in data.valid_rows] == CHAT[8:11]
    Path("test").mkdir()
    with pytest.raises(DataError, match="no split `test`. Splits: train.*type `./test`"): Session(tiny, project="p").data(CHAT, eval="test")


PAIRS = [{"prompt": f"what is {i}", "completion": f"it is {i}"} for i in range(12)]
DO = [{"instruction": f"turn on {i}", "input": "the light", "output": f"light {i} on"} for i in range(12)]
STEP = dict(epochs=1, max_steps=1, batch_size=4, gradient_accumulation=1)


def test_what_generate_and_versus_base_take(tiny):
    import numpy as np
    import pandas as pd
    from datasets import Dataset
    run = Session(tiny, project="chat", chat_template="chatml", **STEP).data(CHAT).fit()
    asked = CHAT[0]["messages"][0]["content"]
    one = run.generate(asked, max_new_tokens=3)
    talk, shared = [{"role": "user", "content": asked}], [{"from": "human", "value": asked}]
    for single in talk, shared, {"messages": talk}, CHAT[0], [*talk, {"role": "assistant", "content": "x"}]:
        assert run.generate(single, max_new_tokens=3) == one
        compared, = run.versus_base(single, max_new_tokens=3)
        assert (compared["prompt"], compared["tuned"]) == (asked, one) and compared["reference"] == (CHAT[0]["messages"][1]["content"] if single is CHAT[0] else None)
    for several in [asked] * 2, (asked, asked), [talk, shared], [CHAT[0], asked], pd.DataFrame(CHAT[:1] * 2), Dataset.from_list(CHAT[:1] * 2), np.array([asked] * 2), pd.Series([asked] * 2):
        assert run.generate(several, max_new_tokens=3) == [one, one] == [c["tuned"] for c in run.versus_base(several, max_new_tokens=3)]
    assert run.generate([]) == [] == run.versus_base([]) and run.versus_base(asked, max_new_tokens=3)[0]["prompt"] == asked
    for wrong, says in (None, "The prompt is given as NoneType"), (5, "The prompt is given as int"), (["a", 5], "prompt 2 is given as int"), ((c for c in "ab"), "given as generator"), \
                       (PAIRS[0], "no column `messages`.*Columns here: prompt, completion"), ([CHAT[0], {"message": []}], "prompt 2 has no column `messages`.*Did you mean `message`"):
        for verb in run.generate, run.versus_base:
            with pytest.raises(DataError, match=says): verb(wrong)


@pytest.mark.parametrize("rows, template", [(PAIRS, None), (PAIRS, "chatml"), (DO, "alpaca")], ids=["pair", "pair-chat", "instruction"])
def test_a_row_without_an_answer_can_be_asked_and_not_scored(tiny, rows, template):
    run = Session(tiny, project="run", chat_template=template, **STEP).data(rows).fit()
    question = {k: v for k, v in rows[0].items() if k not in ("completion", "output")}
    answer = next(k for k in rows[0] if k not in question)
    assert run.generate(question, max_new_tokens=3) == run.generate(rows[0], max_new_tokens=3) == run.generate({**question, answer: ""}, max_new_tokens=3)
    assert [c["reference"] for c in run.versus_base([rows[0], question], max_new_tokens=2)] == [rows[0][answer], None]
    with pytest.raises(DataError, match="row 2 has no reference answer"): run.evaluate([rows[0], question], metrics="bleu")
    with pytest.raises(DataError, match="without one trained token"): run.evaluate([question], metrics="perplexity")
    assert run.evaluate([rows[0], question], metrics="perplexity")["loss"] == run.evaluate([rows[0]], metrics="perplexity")["loss"] == run.evaluate(rows[0], metrics="perplexity")["loss"]


def test_what_evaluate_refuses(tiny, tmp_path):
    run = Session(tiny, project="run", **STEP).data(PAIRS).fit()
    for rows, says in ([], "no rows"), (CHAT[:2], "no column `prompt`.*trained on `prompt` . `completion`. Columns here: messages"), (5, "given as int"), ("nix.jsonl", "nix.jsonl"), (["a"], "row 1 is a str"):
        with pytest.raises(DataError, match=says): run.evaluate(rows, metrics="perplexity")
    with pytest.raises(DataError, match="held no rows out"): run.evaluate()
    def broken(predictions, references): return 1 / 0
    def words(predictions, references): return "many"
    for metrics, says in ("", "No metric is named"), ([], "No metric"), (None, "Unknown metric `None`"), (5, "Unknown metric `5`"), (broken, "`broken` failed on 2 predictions: ZeroDivisionError"), \
                         (words, "`words` failed.*ValueError"), ("os:getcwd", "`getcwd` failed"):
        with pytest.raises(DataError, match=says): run.evaluate(PAIRS[:2], metrics=metrics, max_new_tokens=2)
    for wrong in dict(batch_size=0), dict(max_new_tokens=0), dict(max_new_tokens="3"):
        with pytest.raises(SftkitError, match="a whole number is needed, at least 1"): run.evaluate(PAIRS[:2], **wrong)
    with pytest.raises(SftkitError, match="temperature=-1"): run.generate("x", temperature=-1)


# -- the command that pip installs, and where things go wrong

def installed(*words, **more):
    "The command as pip installs it, whose folder of scripts stands where `python -m` has the current one."
    return subprocess.run([Path(PYTHON).parent/"sftkit", *words], capture_output=True, text=True, env=environment(), **more)


def test_the_installed_command_finds_a_trainer_and_a_metric_beside_the_data(tiny, chat_file):
    Path("mine.py").write_text("from sftkit.training import Trainer\nclass Mine(Trainer):\n    def preprocess(self, row): return row\ndef half(predictions, references): return 0.5\n")
    words = ["--model", tiny, "--data-path", chat_file, "--project-name", "own", "--trainer", "mine:Mine", "--max-steps", "1", "--valid-split", "4", "--use-enhanced-eval", "--eval-metrics", "mine:half", "--eval-max-new-tokens", "2"]
    done = installed("llm", *words)
    assert done.returncode == 0, done.stderr
    assert next(e for e in Run.open("own").events if e["kind"] == "scores")["half"] == 0.5


def test_an_interrupted_command_says_how_to_go_on_and_did_not_succeed(tiny, chat_file):
    from running import until
    started = subprocess.Popen([sys.executable, "-m", "sftkit", "llm", "--model", tiny, "--data-path", chat_file, "--project-name", "long", "--epochs", "500"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: Path("long/recipe.yaml").exists() and len(Run.open("long").history) > 1, 120)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 130 and "sftkit resume long" in said and Run.open("long").state == "interrupted"


def test_a_paused_run_of_several_processes_is_woken_and_not_started_again(tmp_path, monkeypatch):
    from sftkit.cli import main
    from sftkit.events import EventLog, this_process
    recipe = Recipe(model="m", data_path="d", project_name="paused", gpus=2)
    Path("paused").mkdir(); recipe.to_yaml("paused/recipe.yaml")
    log = EventLog(Path("paused/events.jsonl")); log.append("state", state="paused", step=1, **this_process()); log.close()
    monkeypatch.setattr("sftkit.launch.launch", lambda recipe: pytest.fail("started again"))
    assert main(["resume", "paused"]) == 0
    assert list(Path("paused/control").iterdir())


def test_scripts_and_other_texts_are_written_whole_or_not_at_all(tiny, chat_file, monkeypatch):
    plan = Session(tiny, project="p").data(chat_file)
    plan.to_script("s.py"); before = Path("s.py").read_text()
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"): plan.options(lr=0.5).to_script("s.py")
    assert Path("s.py").read_text() == before and sorted(p.name for p in Path().glob("*s.py*")) == ["s.py"]
    monkeypatch.undo()
    for write in (plan.to_script, plan.to_yaml):
        with pytest.raises(RunError, match="no folder `no/such`"): write("no/such/x")
        with pytest.raises(RunError, match="is a folder"): write(Path(chat_file).parent)


def test_what_is_no_trainer_and_no_number_of_rows_is_said_so(tiny, chat_file):
    plan = Session(tiny, project="p").data(chat_file)
    with pytest.raises(RecipeError, match="it takes a class.*module:Class"): plan.trainer("abc")
    with pytest.raises(RecipeError, match="`int` is no subclass"): plan.trainer(int).fit()
    for n in ("a", 0, True):
        with pytest.raises(RecipeError, match="number of rows"): plan.preview(n=n)
    assert not Path("p").exists()

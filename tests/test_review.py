"""What a critical reader found, and what keeps it from coming back."""
import pytest

from sftkit import Recipe, Session
from sftkit.cli import main
from sftkit.rows import read_rows
from sftkit.recipe import DataError, RecipeError, RunError, recipe_fields
from tiny import save_tiny, write_jsonl

ROWS = [dict(prompt="what is it " * (i % 5 + 1), completion="the light in the kitchen " * (i % 3 + 1)) for i in range(12)]
BASE = dict(model="m", data_path="d.jsonl", project_name="p")
WITH = dict(quantization=dict(peft=True), merge_adapter=dict(peft=True), teacher_model=dict(use_distillation=True), use_distillation=dict(teacher_model="t"), distributed_backend=dict(gpus=2), valid_path=dict(valid_split=None), hub_model_id=dict(push_to_hub=True))
OTHER = dict(bool=True, int=3, float=0.25, str="x")


@pytest.mark.parametrize("name", [n for n in recipe_fields() if n not in BASE and n not in ("token", "trainer", "resume")])
def test_the_script_of_any_field_runs_to_the_same_recipe(name):
    field = recipe_fields()[name]
    kind = getattr(field.type, "__name__", str(field.type)).split("|")[0].strip()
    if kind == "UnionType": kind = str(field.type).split("|")[0].strip()
    value = next((c for c in field.metadata.get("choices", ()) if c != field.default and c != "loftq"), None)
    if value is None: value = {"log": "wandb", "eval_metrics": "rouge"}.get(name, (not field.default) if kind == "bool" else OTHER[kind])
    recipe = Recipe(**BASE, **WITH.get(name, {}), **{name: value})
    space = {}
    exec(Session.from_recipe(recipe).to_script().split("if __name__")[0], space)
    rest = Session.from_recipe(recipe).to_script().partition("plan.fit(")[2].partition(")\n")[0]
    plan = eval(f"plan.options({rest})", space)
    assert plan.recipe == recipe


def test_metrics_alone_mean_the_default_ones():
    assert Session("m", project="p").data("d.jsonl").metrics().recipe.eval_metrics == "perplexity,bleu,rouge"


def test_a_file_is_not_a_test_split_because_its_name_begins_so(tmp_path):
    for name in ("contest", "testimonials", "trainees", "validated"): write_jsonl(tmp_path/f"{name}.jsonl", [dict(text=name)])
    assert len(read_rows(tmp_path)) == 4
    write_jsonl(tmp_path/"test-00000-of-00001.jsonl", [dict(text="t")]); write_jsonl(tmp_path/"training.jsonl", [dict(text="t")])
    assert [r.value["text"] for r in read_rows(tmp_path)] == ["t"] and [r.value["text"] for r in read_rows(tmp_path, "test")] == ["t"]


def test_an_unclosed_quote_in_a_csv_is_named(tmp_path):
    (tmp_path/"d.csv").write_text('text\nfine\n"unclosed\nrow two\nrow three\n')
    with pytest.raises(DataError, match="line 3 opens a double quote"): read_rows(tmp_path/"d.csv")
    (tmp_path/"d.csv").write_text('text\nfine\n"two\nlines"\n')
    assert [r.value["text"] for r in read_rows(tmp_path/"d.csv")] == ["fine", "two\nlines"]


def test_a_run_stays_itself_when_another_takes_its_name(tmp_path):
    plan = Session(save_tiny(tmp_path/"m"), project=str(tmp_path/"s")).data(write_jsonl(tmp_path/"d.jsonl", ROWS)).options(batch_size=4, gradient_accumulation=1, epochs=1)
    first = plan.fit(lr=1e-3)
    losses = first.history.loss.tolist()
    second = plan.fit(lr=1e-2, seed=3)
    assert first.path.name == "s.1" and first.history.loss.tolist() == losses != second.history.loss.tolist() and second.path.name == "s"
    import shutil
    shutil.rmtree(first.path)
    with pytest.raises(RunError, match="another run has taken its name"): first.history


def test_an_unfinished_run_is_gone_on_with_as_what_it_was(tmp_path):
    data = write_jsonl(tmp_path/"d.jsonl", ROWS)
    plan = Session(save_tiny(tmp_path/"m"), project=str(tmp_path/"s")).data(data).options(batch_size=4, gradient_accumulation=1, epochs=3, save_steps=1, lr=1e-3)
    from sftkit.events import EventLog
    run = plan.fit()
    log = EventLog(run.directory.events_path); log.append("state", state="interrupted", step=9); log.close()
    with pytest.raises(RunError, match="lr was 0.001, now 0.01"): plan.fit(resume=True, lr=1e-2)
    write_jsonl(tmp_path/"d.jsonl", ROWS[::-1])
    with pytest.raises(RunError, match="training data differs"): plan.fit(resume=True)
    write_jsonl(tmp_path/"d.jsonl", ROWS)
    assert plan.fit(resume=True, save_steps=2).state == "finished"


def test_yaml_says_no_and_bad_recipe_files_are_named(tmp_path):
    (tmp_path/"r.yaml").write_text("model: m\ndata_path: d\nproject_name: p\nmixed_precision: no\nlog: no\n")
    assert Recipe.from_yaml(tmp_path/"r.yaml").mixed_precision == "no" and Recipe.from_yaml(tmp_path/"r.yaml").log == "none"
    with pytest.raises(RecipeError, match="cannot be read"): Recipe.from_yaml(tmp_path)
    (tmp_path/"b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError): Recipe.from_yaml(tmp_path/"b.yaml")
    (tmp_path/"k.yaml").write_text("1: 2\n")
    with pytest.raises(RecipeError, match="`1`"): Recipe.from_yaml(tmp_path/"k.yaml")
    with pytest.raises(RunError, match="no folder"): Recipe(**BASE).to_yaml(tmp_path/"no"/"r.yaml")


def test_empty_names_are_refused_together():
    with pytest.raises(RecipeError) as e: Recipe(model="", data_path=" ", project_name="", text_column="")
    assert all(f"`{n}`" in str(e.value) for n in ("model", "data_path", "project_name", "text_column"))


def test_numbers_of_numpy_are_numbers():
    import numpy as np
    r = Recipe(**BASE, lr=np.float32(0.5), batch_size=np.int64(3), packing=np.bool_(True))
    assert (r.lr, r.batch_size, r.packing) == (0.5, 3, True)


def test_preview_writes_nothing_and_needs_no_project(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, data = save_tiny(tmp_path/"m"), write_jsonl(tmp_path/"d.jsonl", ROWS)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["preview", "--model", model, "--data-path", data]) == 0 and "kitchen" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    for command in ("watch", "report", "stop", "preview"):
        assert main([command, "--help"]) == 0 and f"sftkit {command}" in capsys.readouterr().out


def test_evaluation_rows_that_are_trained_on_are_named(tmp_path):
    model, rows = save_tiny(tmp_path/"m"), [dict(prompt=f"what {i}", completion=f"the light {i}", id=i) for i in range(12)]
    train = write_jsonl(tmp_path/"chat.jsonl", rows)
    again = [{**rows[2], "id": 99}, {**rows[2], "completion": "  the   light 2"}, rows[7], dict(prompt="new", completion="new")]
    says = "3 of 4 evaluation rows also stand in the training data (chat.jsonl line 3, chat.jsonl line 8), so the evaluation loss says less than it seems."
    plan = Session(model, project=str(tmp_path/"p"), max_steps=1)
    assert says in plan.data(train, eval=write_jsonl(tmp_path/"e.jsonl", again))._work.data.notes
    assert says in plan.data(train, eval=again)._work.data.notes
    assert says.replace("chat.jsonl line", "row") in plan.data(rows, eval=again)._work.data.notes
    (tmp_path/"d").mkdir(); write_jsonl(tmp_path/"d"/"train.jsonl", rows); write_jsonl(tmp_path/"d"/"test.jsonl", again)
    assert says.replace("chat", "train") in plan.data(tmp_path/"d", eval="test")._work.data.notes
    many = plan.data(rows, eval=rows)._work.data.notes[-1]
    assert many.startswith("12 of 12") and "row 5 and 7 more)" in many
    assert not [n for n in plan.data(rows, eval=[again[-1]])._work.data.notes + plan.data(rows * 2, eval=0.2)._work.data.notes if "also stand" in n]
    run = plan.data(rows, eval=again).fit()
    assert says.replace("chat.jsonl line", "row") in [e.get("text") for e in run.events]


def test_held_out_rows_are_no_duplicates_in_a_column_of_ones_own(tmp_path):
    rows = [dict(body=f"the light {i // 4}", id=i) for i in range(24)]
    data = Session(save_tiny(tmp_path/"m"), project="p").data(rows, column="body", eval=0.25)._work.data
    assert len(data.valid_rows) and not {r.value["body"] for r in data.train_rows} & {r.value["body"] for r in data.valid_rows}

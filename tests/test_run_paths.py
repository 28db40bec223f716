"A run stays where it is: in whatever folder the reader stands, and whatever became of its data."
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CHAT
from sftkit import Run, Session
from running import PYTHON, chat_plan, environment
from sftkit.recipe import DataError, RecipeError, RunError
from sftkit.training import RunFinished, claim
from tiny import save_tiny, write_jsonl

FIELDS = dict(max_steps=6, batch_size=4, gradient_accumulation=1, save_steps=2, lr=1e-3, mixed_precision="no")
DIE = """
import os, signal
from sftkit import Session
from sftkit.events import EventLog
append = EventLog.append
def dying(self, kind, **fields):
    event = append(self, kind, **fields)
    if kind == "checkpoint" and fields["step"] == 4: os.kill(os.getpid(), signal.SIGKILL)
    return event
EventLog.append = dying
"""


def plan(project="proj", **fields):
    return Session("m", project=project).data("chat.jsonl", eval=8).options(**FIELDS | fields)


@pytest.fixture
def work(tmp_path):
    "A folder with a model and data, named by relative paths, and a folder to stand in elsewhere."
    save_tiny(tmp_path/"m", extra=("<|im_start|>", "<|im_end|>"))
    write_jsonl("chat.jsonl", CHAT)
    (tmp_path/"other").mkdir()
    return tmp_path


def died(code="", **fields):
    "A run in `proj` whose process was killed at step 4."
    fields = FIELDS | fields
    code = DIE + (code or f'Session("m", project="proj").data("chat.jsonl", eval=8).options(**{fields!r}).fit()')
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL


def trained(run): return [e["step"] for e in run.events if e["kind"] == "step"]


def test_a_run_goes_on_in_the_directory_that_was_opened(work, monkeypatch):
    died(peft=True, lora_r=4)
    monkeypatch.chdir("other")
    run = Run.open(work/"proj")
    before = run.recipe
    resumed = run.resume()
    assert resumed.path == work/"proj" and resumed.state == "finished" and trained(resumed) == [1, 2, 3, 4, 5, 6] and os.listdir(".") == []
    again = Run.open("../proj")
    assert run.recipe == before and again.generate("turn on", max_new_tokens=2) is not None
    assert again.evaluate(metrics="perplexity")["perplexity"] == pytest.approx(run.evaluate(metrics="perplexity")["perplexity"])
    assert again.versus_base("turn on", max_new_tokens=2)[0]["base"] is not None and again.merge("merged").max_difference < 1e-3
    page = again.report("page.html").read_text()
    assert "chat.jsonl" in page and "Data, as it was trained" in page


def test_a_run_moved_aside_goes_on_there(work):
    died('Session("m", project="proj").data([dict(text=f"turn on {i}") for i in range(40)]).options(**' + repr(FIELDS) + ').fit()')
    live = plan(max_steps=2, resume=False).fit()
    kept = live.directory.events_path.read_bytes()
    resumed = Run.open("proj.1").resume()
    assert resumed.path == work/"proj.1" and trained(resumed) == [1, 2, 3, 4, 5, 6] and resumed.recipe.data_path.startswith("proj.1/data-")
    assert Run.open("proj").directory.events_path.read_bytes() == kept and not Path("proj.2").exists() and not Path("proj.1.1").exists()


def test_resume_on_the_command_line_goes_on_with_a_path_and_ends_well_on_a_finished_run(work, monkeypatch):
    died()
    monkeypatch.chdir("other")
    command = [sys.executable, "-m", "sftkit", "resume", str(work/"proj")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run(command, env=env).returncode == 0 and trained(Run.open(work/"proj")) == [1, 2, 3, 4, 5, 6]
    events = (work/"proj/events.jsonl").read_bytes()
    told = subprocess.run(command, env=env, capture_output=True, text=True)
    assert told.returncode == 0 and "is finished, so there is nothing to go on with" in told.stdout and os.listdir(".") == []
    assert (work/"proj/events.jsonl").read_bytes() == events


def test_a_run_opened_elsewhere_finds_its_files_or_says_where_they_were(work, monkeypatch):
    write_jsonl("valid.jsonl", CHAT[:6])
    made = Session("m", project="proj").data("chat.jsonl", eval="valid.jsonl").options(**FIELDS | dict(max_steps=2)).fit()
    whole = made.evaluate(metrics="perplexity")["perplexity"]
    monkeypatch.chdir("other")
    assert made.state == "finished" and made.path == work/"proj" and made.evaluate(metrics="perplexity")["perplexity"] == whole
    write_jsonl("valid.jsonl", CHAT[20:30])                                       # another of that name, where the reader stands
    run = Run.open(work/"proj")
    assert run.evaluate(metrics="perplexity")["perplexity"] == pytest.approx(whole)
    (work/"valid.jsonl").unlink(), (work/"chat.jsonl").unlink()
    with pytest.raises(DataError, match=f"There is no data at {work}/chat.jsonl"): Run.open(work/"proj").report()


def test_a_whole_project_that_was_moved_is_read_where_it_is(work, monkeypatch):
    (work/"old").mkdir(); monkeypatch.chdir("old")
    save_tiny("m", extra=("<|im_start|>", "<|im_end|>")); write_jsonl("chat.jsonl", CHAT)
    plan(max_steps=2).fit()
    monkeypatch.chdir(work); os.rename("old", "new"); monkeypatch.chdir("new")
    assert Run.open("proj").evaluate(metrics="perplexity")["perplexity"] > 0 and Run.open("proj").directory.shown == "proj"


def test_the_folder_of_a_run_stays_in_the_run_directory(work):
    run = plan(max_steps=2).fit()
    assert run.about["folder"] == str(work) and str(work) not in run.report().read_text()
    run.save("out")
    published = yaml.safe_load(Path("out/recipe.yaml").read_text())["about"]
    assert "folder" not in published and published["data_hash"] == run.about["data_hash"]
    assert all(str(work) not in Path("out", n).read_text() for n in ("recipe.yaml", "README.md"))


def test_a_path_with_a_tilde_is_the_users_folder(work, monkeypatch):
    monkeypatch.setenv("HOME", str(work/"other"))
    rows = [dict(text=f"turn on {i}") for i in range(12)]
    made = Session("m", project="~/runs/x").data(rows).options(**FIELDS | dict(max_steps=2)).fit()
    assert made.path == work/"other/runs/x" == Run.open("~/runs/x").path and not Path("~").exists() and list(made.path.glob("data-*.jsonl"))


def test_resume_of_a_finished_run_trains_nothing(work):
    run = plan(max_steps=2).fit()
    events = run.directory.events_path.read_bytes()
    for verb in ("fit", "start"):
        again = getattr(plan(max_steps=2, resume=True), verb)()
        assert again.path == run.path and again.state == "finished" and again.generate("turn on", max_new_tokens=2) is not None
    with pytest.raises(RunFinished, match="nothing to go on with.*`resume=False`"): claim(plan(max_steps=2, resume=True).recipe)
    with pytest.raises(RunError, match="finished run in `proj` cannot.*max_steps was 2, now 3"): plan(max_steps=3, resume=True).fit()
    with pytest.raises(RunError, match="training data differs"): plan(max_steps=2, resume=True).data(CHAT[:30], eval=8).fit()
    assert run.directory.events_path.read_bytes() == events and not Path("proj.1").exists()
    assert plan(max_steps=2).fit().state == "finished" and Path("proj.1").exists()                # without `resume`, as ever


def test_a_finished_run_ends_a_requeued_command_well(work, capsys):
    from sftkit.cli import main
    words = ["llm", "--model", "m", "--data-path", "chat.jsonl", "--project-name", "proj", "--resume", "--max-steps", "2"]
    assert main(words) == 0
    capsys.readouterr()
    events = Path("proj/events.jsonl").read_bytes()
    assert main(words) == 0 and "`proj` is finished" in capsys.readouterr().err and Path("proj/events.jsonl").read_bytes() == events


def test_data_that_was_replaced_is_not_taken_for_what_was_trained(work):
    run = plan(max_steps=2).fit()
    write_jsonl("chat.jsonl", CHAT[::-1])
    opened = Run.open("proj")
    with pytest.raises(DataError, match="held out.*`chat.jsonl` was changed.*run.evaluate"): opened.evaluate()
    assert opened.evaluate(CHAT[:4], metrics="perplexity")["perplexity"] > 0
    page = opened.report().read_text()
    assert "Not shown: changed since the run was started (training data)" in page and "What is trained" not in page
    assert run.report().read_text() == page and run.evaluate(metrics="perplexity")["perplexity"] > 0      # it has kept the rows that it held out
    write_jsonl("chat.jsonl", CHAT)
    assert Run.open("proj").evaluate(metrics="perplexity")["perplexity"] > 0 and "What is trained" in Run.open("proj").report().read_text()


def test_an_earlier_run_of_the_name_is_said_to_be_kept(tiny, chat_file, capsys):
    plan = chat_plan(tiny, "again", chat_file, max_steps=1)
    plan.fit(); capsys.readouterr(); plan.fit()
    assert "note: The run that was here before is kept as `again.1`." in capsys.readouterr().out


def test_a_model_that_is_no_text_is_refused_at_once():
    from sftkit import Session, sample_model
    with pytest.raises(RecipeError, match="`model` is <function sample_model"): Session(sample_model)


def test_output_that_nobody_reads_on_is_no_error():
    done = subprocess.run(f"{PYTHON} -m sftkit llm --help | head -1", shell=True, capture_output=True, text=True, env=environment(PYTHONUNBUFFERED="1"))
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_a_step_that_takes_long_says_how_far_it_is(tiny, chat_file, monkeypatch):
    from sftkit import engine
    now = [0.0]
    def clock(): now[0] += 4; return now[0]
    monkeypatch.setattr(engine.time, "monotonic", clock)
    run = chat_plan(tiny, "slow", chat_file, max_steps=1, batch_size=2, gradient_accumulation=8).fit()
    said = [e["text"] for e in run.events if e["kind"] == "doing" and e["text"].startswith("micro-batch")]
    assert said and all(text.endswith(" of 8") for text in said) and len(said) < 8

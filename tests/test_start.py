"""`plan.start()`: training in a worker process."""
import os, signal, time
from pathlib import Path

import psutil, pytest, torch
from safetensors.torch import load_file
from conftest import CHAT
from running import losses, until
from sftkit import Run, Session
from sftkit.recipe import RecipeError, RunError, SftkitError

FAST = dict(epochs=1, batch_size=4, gradient_accumulation=1, lr=1e-3)
LONG = {**FAST, "epochs": 400, "save_steps": 5}


def reach(run, step):
    def there():
        assert run.state in ("starting", "training", "paused"), (run.state, run.directory.status())
        return any(e["kind"] == "step" and e["step"] >= step for e in run.events)
    until(there, 120)


def test_started_run_is_the_run_of_fit(tiny, chat_file, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    plan = Session(tiny, "worker").data(chat_file, eval=8).lora(r=4).options(**FAST)
    run = plan.start()
    assert run.state in ("starting", "training") and run.directory.status()["pid"] != os.getpid()
    assert run.wait(120) is run and run.state == "finished"
    here = plan.options(project_name="here").fit()
    assert losses(run) == losses(here) and len(losses(run)) > 5
    a, b = load_file("worker/adapter_model.safetensors"), load_file("here/adapter_model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert Path("worker/report.html").exists() and "Report:" in Path("worker/worker.log").read_text()
    assert isinstance(run.generate("turn on light 1", max_new_tokens=4), str)
    assert not any(b"hf_secret" in p.read_bytes() for p in Path("worker").rglob("*") if p.is_file())


def test_started_again_under_the_same_name_keeps_the_first_aside(tiny, chat_file):
    plan = Session(tiny, "again").data(chat_file).options(**FAST)
    first = plan.start().wait(120)
    second = plan.start(lr=2e-3).wait(120)
    assert second.path.name == "again" and first.path.name == "again.1" and losses(first)[1:] != losses(second)[1:]
    kept = "The run that was here before is kept as `again.1`."
    assert [e["text"] for e in second.events if e["kind"] == "note"].count(kept) == 1 and kept not in [e.get("text") for e in first.events]


def test_rows_in_memory_and_own_preprocessing_reach_the_worker(tiny):
    plan = Session(tiny, "mapped").data(CHAT).map(lambda row: row if "off" in row["messages"][0]["content"] else None).options(**FAST)
    run = plan.start().wait(120)
    assert losses(run) == losses(plan.options(project_name="mapped-here").fit()) and len(losses(run)) == len([r for r in CHAT if "off" in r["messages"][0]["content"]]) // 4


def test_mistakes_are_raised_here_and_start_nothing(tiny, chat_file):
    from sftkit.training import Trainer
    class Mine(Trainer): pass
    Mine.__module__ = "__main__"
    plan = Session(tiny, "wrong").data(chat_file).options(**FAST)
    with pytest.raises(RecipeError, match="Mine"): plan.trainer(Mine).start()
    with pytest.raises(Exception, match="nowhere.jsonl"): plan.data("nowhere.jsonl").start()
    with pytest.raises(RecipeError, match="lr"): plan.start(learning_rte=1)
    assert not Path("wrong").exists()
    Path("full").mkdir(); Path("full/thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="holds other files"): Session(tiny, "full").data(chat_file).start()
    assert os.listdir("full") == ["thesis.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
@pytest.mark.parametrize("fields,message", [(dict(mixed_precision="fp16"), "needs an NVIDIA GPU"), (dict(log="trackio"), "pip install trackio"), (dict(log="wandb"), "wandb"),
                                            (dict(gpus=2, distributed_backend="deepspeed"), "pip install deepspeed"), (dict(gpus=2, distributed_backend="fsdp"), "needs GPUs")], ids=str)
def test_what_this_machine_lacks_is_said_before_an_earlier_run_is_set_aside(tiny, chat_file, monkeypatch, fields, message):
    import importlib.util
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in ("trackio", "wandb", "deepspeed") else found(name, *a))
    plan = Session(tiny, "kept").data(chat_file).options(**FAST)
    Path("kept").mkdir()
    Path("kept/recipe.yaml").write_text(plan.to_yaml()); Path("kept/result").write_text("of an earlier run")
    with pytest.raises(SftkitError, match=message): plan.start(**fields)
    assert sorted(os.listdir("kept")) == ["recipe.yaml", "result"] and not Path("kept.1").exists()


def test_killed_worker_shows_as_died_and_is_gone_on_with(tiny, chat_file):
    plan = Session(tiny, "killed").data(chat_file).options(**{**FAST, "epochs": 3, "save_steps": 4})
    whole = plan.options(project_name="whole").start().wait(120)
    run = plan.start()
    with pytest.raises(RunError, match="training right now|about to end"): plan.start()
    reach(run, 6)
    assert "run.watch() follows it" in run._repr_html_() and "<img" not in run._repr_html_()          # something else shows it live
    os.kill(run.directory.status()["pid"], signal.SIGKILL)
    with pytest.raises(RunError, match="died") as told: run.wait(30)
    assert run.state == "died"
    until(lambda: "exit_code" in run.directory.status(), 10)
    error = run.directory.status()["error"]
    assert "SIGKILL" in error and "sftkit resume" in error and "goes on from step 4" in error
    resumed = plan.start(resume=True).wait(120)
    assert resumed.state == "finished" and losses(resumed) == losses(whole)
    a, b = load_file("killed/model.safetensors"), load_file("whole/model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_worker_that_dies_before_its_first_line_is_noticed(tiny, chat_file):
    run = Session(tiny, "early").data(chat_file).options(**FAST).start()
    os.kill(run.directory.status()["pid"], signal.SIGKILL)
    with pytest.raises(RunError, match="before the first step"): run.wait(30)
    assert Run.open("early").state == "died"


def test_failing_worker_says_why(tiny, chat_file, tmp_path, monkeypatch):
    Path("broken_trainer.py").write_text("from sftkit.training import Trainer\n\nclass Broken(Trainer):\n    def preprocess(self, row):\n        import os\n"
                                         "        if 'SFTKIT_CLAIMED' in os.environ: raise ValueError('no such luck')\n        return super().preprocess(row)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = Session(tiny, "broken").data(chat_file).options(**FAST, trainer="broken_trainer:Broken").start()
    with pytest.raises(RunError, match="no such luck"): run.wait(120)
    assert run.state in ("failed", "died")


def test_stop_pause_and_resume_reach_the_worker(tiny, chat_file):
    run = Session(tiny, "asked").data(chat_file).options(**LONG).start()
    reach(run, 3)
    other = Run.open("asked")                                    # as from another notebook
    other.pause()
    until(lambda: other.state == "paused")
    at = len(losses(run)); time.sleep(0.5)
    assert len(losses(run)) == at
    other.resume(); reach(run, at + 2)
    with pytest.raises(TimeoutError): run.wait(0.2)
    other.stop()
    assert run.wait(60).state == "stopped" and run.directory.checkpoints()
    assert not psutil.pid_exists(run.directory.status()["pid"]) or psutil.Process(run.directory.status()["pid"]).status() == "zombie"


def test_acceptance_30_started_on_two_processes(tiny, chat_file):
    plan = Session(tiny, "two").data(chat_file).options(**{**FAST, "gradient_accumulation": 2})
    one = plan.options(project_name="one").start().wait(120)
    two = plan.start(gpus=2, gradient_accumulation=1).wait(240)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4) and len(losses(one)) == 6
    assert "sftkit: 2 processes" in Path("two/worker.log").read_text()

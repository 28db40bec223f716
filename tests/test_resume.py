"""A run that is killed, at whatever moment, and resumed is the run that was not: the same losses, evaluations, best step and weights."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHAT
import warm
from running import chat_plan, environment, losses, until
from safetensors.torch import load_file
from sftkit import Run
from sftkit.engine import Recorder
from sftkit.events import RunDirectory
from sftkit.recipe import RunError
from tiny import write_jsonl

pytestmark = pytest.mark.xdist_group("killed")          # the runs that nobody kills are made once

# six steps an epoch, a checkpoint at the last of each, which is evaluated then; no later evaluation is better than the first (`WORSENS`), so the third epoch is the last
WORSE = dict(epochs=5, lr=0.1, save_steps=6, save_total_limit=1, early_stopping_patience=2, eval_metrics="perplexity,exact_match", use_enhanced_eval=True,
             eval_save_predictions=True, eval_samples=2, eval_max_new_tokens=4)
MIDDLE = dict(max_steps=9, lr=1e-2, valid_split=6, eval_steps=2, save_steps=3, save_total_limit=2)       # ends in the middle of an epoch

PLAN = """
from sftkit import Run, Session
plan = Session({model!r}, project={project!r}, chat_template="chatml", batch_size=2, gradient_accumulation=2, **{fields!r}).data("chat.jsonl", eval={eval}).lora(r=4, dropout=0.1)
"""
WORSENS = """
import sftkit.engine as engine
measured = engine.Engine.held_out_loss
engine.Engine.held_out_loss = lambda self: measured(self) + self.state.global_step
"""
# `at(name, when, before=...)` ends the process where function `name` is called (or has been) with arguments of which `when` is true
KILLER = """
import os, signal, shutil, pathlib
import sftkit.engine as engine, sftkit.training as training, sftkit.events as events
def at(owner, name, when, before=True):
    real = getattr(owner, name)
    def call(*args, **kwargs):
        if before and when(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if not before and when(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)
def writing(kind, step=None, before=True): at(events.EventLog, "append", lambda self, k, **f: k == kind and (step is None or f.get("step", f.get("when")) == step), before)
"""
MOMENTS = {                                                         # ten while it trains, ten near its end
    "in the evaluation after a checkpoint of the same step": "at(engine.Engine, 'held_out_loss', lambda self: self.state.global_step == 12)",
    "before that evaluation is written": "writing('eval', 12)",
    "after that evaluation is written": "writing('eval', 12, before=False)",
    "in the evaluation that stops early": "at(engine.Engine, 'held_out_loss', lambda self: self.state.global_step == 18)",
    "after the evaluation that stops early": "writing('note', before=True)",
    "while a checkpoint is written": "at(engine.HFTrainer, '_save_optimizer_and_scheduler', lambda self, folder: self.state.global_step == 12, before=False)",
    "before a checkpoint gets its name": "at(engine, 'flush_folder', lambda folder: folder.name == 'checkpoint-12', before=False)",
    "before a checkpoint is on record": "writing('checkpoint', 12)",
    "while checkpoints rotate": "at(os, 'unlink', lambda path, **k: str(path) == 'optimizer.pt' or str(path).endswith('/optimizer.pt'), before=False)",
    "at the first step after": "writing('step', 13)",
    "in the final scores": "at(engine.Engine, 'scores', lambda self, rows=None: rows is None)",
    "before the scores are written": "writing('scores')",
    "after the scores are written": "writing('scores', before=False)",
    "before the predictions are written": "at(training, 'write_atomic', lambda path, text: path.name == 'predictions.jsonl')",
    "before the last samples": "writing('sample', 'after')",
    "after a last sample": "writing('sample', 'after', before=False)",
    "while the result is written": "at(training, 'flush_folder', lambda folder: True)",
    "while the result is renamed": "at(os, 'replace', lambda a, b: pathlib.Path(a).parent.name == '.saving' and not pathlib.Path(a).name.startswith('checkpoint'), before=False)",
    "after the result is written": "writing('result')",
    "after the result is on record": "writing('result', before=False)",
}
EARLY, LATE = list(MOMENTS)[:10], list(MOMENTS)[10:]


@pytest.fixture(scope="module")
def forked():
    "Runs a piece of code in a process that has imported sftkit already, and may be killed; gives its exit code."
    with warm.start("sftkit.session", "sftkit.training", "sftkit.export", "trl", "peft") as program:
        yield lambda code: subprocess.run([program, "-c", code], stdout=subprocess.DEVNULL).returncode


def plan_code(model, project, fields):
    code = PLAN.format(model=model, project=project, fields=fields, eval="None" if "valid_split" in fields else "'valid.jsonl'")
    return (WORSENS if fields is WORSE else "") + code
def made(run, kind, *names): return [tuple(e[n] for n in names) for e in run.events if e["kind"] == kind]


def same_run(whole, other):
    "All that was made: steps, evaluations, answers, scores and weights; each of them once."
    assert other.state == "finished" and losses(other) == losses(whole)
    for kind, *names in (("eval", "step", "loss"), ("sample", "when", "prompt", "text"), ("scores", "loss"), ("result", "step", "files"), ("checkpoint", "step")): assert made(other, kind, *names) == made(whole, kind, *names), kind
    notes = lambda run: [e["text"] for e in run.events if e["kind"] == "note" and ("topped early" in e["text"] or "weights of" in e["text"])]
    assert notes(other) == notes(whole)
    assert [step for step, _ in other.directory.checkpoints()] == [step for step, _ in whole.directory.checkpoints()]
    a, b = load_file(whole.path/"adapter_model.safetensors"), load_file(other.path/"adapter_model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(p.name for p in other.path.iterdir()) == sorted(p.name for p in whole.path.iterdir())


@pytest.fixture(scope="module")
def wholes(tiny, tmp_path_factory, forked):
    "Folders of runs that nobody killed, by the name of what they train."
    def train(folder, fields):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            write_jsonl("chat.jsonl", CHAT[:24]); write_jsonl("valid.jsonl", CHAT[24:30])
            assert forked(plan_code(tiny, "run", fields) + "plan.fit()") == 0
        return Run.open(folder/"run")
    return {name: train(tmp_path_factory.mktemp("whole"), fields) for name, fields in (("worse", WORSE), ("middle", MIDDLE))}


def kill_and_resume(forked, tiny, fields, *moments):
    write_jsonl("chat.jsonl", CHAT[:24]); write_jsonl("valid.jsonl", CHAT[24:30])
    for i, moment in enumerate(moments):
        assert forked(plan_code(tiny, "run", fields) + KILLER + moment + "\n" + ("plan.options(resume=True).fit()" if i else "plan.fit()")) == -signal.SIGKILL
        for _, path in RunDirectory("run").checkpoints(): assert (path/"optimizer.pt").exists() and (path/"trainer_state.json").exists()       # what is listed is whole
    assert forked(plan_code(tiny, "run", fields) + "plan.options(resume=True).fit()") == 0
    return Run.open("run")


def test_the_runs_that_are_killed_are_as_meant(wholes):
    worse, middle = wholes["worse"], wholes["middle"]
    assert made(worse, "eval", "step") == [(6,), (12,), (18,)] and len(losses(worse)) == 18 and made(worse, "result", "step") == [(6,)]
    assert [s for s, _ in worse.directory.checkpoints()] == [6, 18]
    assert len(losses(middle)) == 9 and [s for s, in made(middle, "eval", "step")] == [2, 4, 6, 8, 9] and [s for s, _ in middle.directory.checkpoints()] == [6, 9]


@pytest.mark.parametrize("first, second", [*zip(EARLY, LATE, strict=True), ("while the result is written", "after a last sample")])
def test_acceptance_24_killed_at_any_moment(forked, tiny, wholes, first, second):
    "Killed while it trains, and what goes on with it near its end: each moment once; and one that is near its end already."
    same_run(wholes["worse"], kill_and_resume(forked, tiny, WORSE, MOMENTS[first], MOMENTS[second]))


@pytest.mark.parametrize("moments", [["writing('step', 9)", "writing('eval', 9)", "writing('checkpoint', 9)"], ["writing('checkpoint', 9, before=False)", "writing('sample', 'after')", "writing('result')"]], ids=["its last step", "its result"])
def test_acceptance_24_killed_at_the_end_of_a_run_that_ends_within_an_epoch(forked, tiny, wholes, moments):
    same_run(wholes["middle"], kill_and_resume(forked, tiny, MIDDLE, *moments))


def test_acceptance_24_killed_again_and_again(forked, tiny, wholes):
    same_run(wholes["worse"], kill_and_resume(forked, tiny, WORSE, *(MOMENTS[m] for m in ("while checkpoints rotate", "in the evaluation that stops early", "after the evaluation that stops early", "in the final scores"))))


@pytest.mark.parametrize("step", [3, 6, 8, 12])
def test_acceptance_24_stopped_within_or_at_the_end_of_an_epoch(forked, tiny, wholes, step):
    "A stop writes a checkpoint and makes no evaluation that the whole run does not make."
    write_jsonl("chat.jsonl", CHAT[:24]); write_jsonl("valid.jsonl", CHAT[24:30])
    stop = f"""
import sftkit.engine as engine
class Stopping(engine.Recorder):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == {step - 1}: self.engine.run.request("stop")
engine.Recorder = Stopping
assert plan.fit().state == "stopped"
"""
    assert forked(plan_code(tiny, "run", WORSE) + stop) == 0
    assert RunDirectory("run").checkpoints()[-1][0] == step
    assert forked(plan_code(tiny, "run", WORSE) + "plan.options(resume=True).fit()") == 0
    run = Run.open("run")
    assert made(run, "checkpoint", "step") == sorted({*made(wholes["worse"], "checkpoint", "step"), (step,)})
    assert made(run, "eval", "step", "loss") == made(wholes["worse"], "eval", "step", "loss")
    assert losses(run) == losses(wholes["worse"])
    a, b = load_file(wholes["worse"].path/"adapter_model.safetensors"), load_file(run.path/"adapter_model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


# -- several processes -----------------------------------------------------------------------------------------------------------------

def test_another_number_of_processes_is_refused(tiny, monkeypatch):
    plan = chat_plan(tiny, "run", CHAT[:24], batch_size=2, gradient_accumulation=2, max_steps=4)
    with monkeypatch.context() as during:
        during.setattr(Recorder, "on_step_begin", lambda self, *args, **kwargs: self.engine.run.request("stop"))
        assert plan.fit().state == "stopped"
    with pytest.raises(RunError, match="1 processes trained it, now 2 would"): plan.options(resume=True, gpus=2).start()
    recipe = Path("run/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("processes: 1", "processes: 2"))
    with pytest.raises(RunError, match="2 processes trained it, now 1 would.*`resume=False`"): plan.options(resume=True).fit()
    recipe.write_text(recipe.read_text().replace("processes: 2", "processes: 1"))
    assert plan.options(resume=True).fit().state == "finished"


def test_acceptance_24_two_processes_killed_and_resumed(tiny, chat_file):
    plan = chat_plan(tiny, "whole", chat_file, batch_size=2, gradient_accumulation=1, max_steps=14, save_steps=3, valid_split=6).lora(r=4, dropout=0.1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sftkit", "llm"]
    def start(**fields): return subprocess.Popen([*launcher, *plan.options(**fields).recipe.to_args()], env=environment(CUDA_VISIBLE_DEVICES=""), stdout=subprocess.DEVNULL)
    assert start().wait(120) == 0
    killed, events = start(project_name="killed"), Path("killed/events.jsonl")
    until(lambda: killed.poll() is not None or events.exists() and '"kind": "step", "step": 5,' in events.read_text(), 120, 0.002)
    os.kill(Run.open("killed").directory.status()["pid"], signal.SIGKILL)                 # the first of them; torchrun ends the other
    assert killed.wait(60) and Run.open("killed").state == "died"
    assert start(project_name="killed", resume=True).wait(120) == 0
    run, whole = Run.open("killed"), Run.open("whole")
    assert losses(run) == losses(whole) and len(losses(run)) == 14 and made(run, "eval", "step", "loss") == made(whole, "eval", "step", "loss")
    assert kinds(run, "training") == 2 and kinds(whole, "training") == 1
    a, b = load_file("whole/adapter_model.safetensors"), load_file("killed/adapter_model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def kinds(run, state): return sum(e["kind"] == "state" and e["state"] == state for e in run.events)

"""Taking a result away: the card, `save`, `push`, `push_to_hub`, against a stand-in of the hub."""
import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CHAT, TEXT
from huggingface_hub import ModelCard
from hub import Hub
from sftkit import Recipe, Run, Session
from sftkit.cli import main
from sftkit.export import UploadError, result_files
from sftkit.recipe import RecipeError, RunError
from running import chat_plan, environment
from tiny import save_tiny, save_tiny_gguf, write_jsonl

ROOT = Path(__file__).parent.parent
TOKEN, READER, STRANGER = "hf_thewritersverysecrettoken", "hf_thereadersverysecrettoken", "hf_atokennobodyknows"
FAST = dict(batch_size=8, gradient_accumulation=1, max_steps=2, lr=1e-3)
REPO_FILES = {"README.md", "recipe.yaml", "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A hub that this process is on line with, and no token yet."
    from huggingface_hub import constants
    hub = Hub({TOKEN: ("ada", ("club",), "write"), READER: ("bob", (), "read")})
    for name, value in dict(ENDPOINT=hub.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True, HF_TOKEN_PATH=str(tmp_path/"no-token"), HF_STORED_TOKENS_PATH=str(tmp_path/"no-tokens")).items(): monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=__import__("time").sleep: sleep(min(seconds, 0.01)))       # no test waits for a second attempt
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    "A folder that holds a finished run and its data."
    with contextlib.chdir(tmp_path_factory.mktemp("trained")):
        plan_for(tiny).fit()
        return Path.cwd()


def plan_for(model, name="run", **options): return chat_plan(model, name, write_jsonl("chat.jsonl", CHAT), eval=6, **{**FAST, **options})
def notes(run, level): return [e["text"] for e in run.events if e["kind"] == "note" and e["level"] == level]


def names_no_path(data): return str(Path.cwd()).encode() not in data and str(ROOT).encode() not in data


def holds_no_token(folder, *more):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            for token in (TOKEN, READER, STRANGER): assert token.encode() not in path.read_bytes(), path
    for text in more:
        for token in (TOKEN, READER, STRANGER): assert token not in text


def run_example(card, folder):
    "Run a card's example as it stands, in `folder`."
    code, = re.findall(r"```python\n(.*?)\n```", card, re.S)
    done = subprocess.run([sys.executable, "-c", f"import warnings; warnings.simplefilter('error', UserWarning)\n{code}"], cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


# -- the card ------------------------------------------------------------------------------------------------------------------

def test_card_tells_what_was_done(tiny, hub):
    run = plan_for(tiny, use_enhanced_eval=True, eval_metrics="perplexity,bleu,exact_match", eval_max_new_tokens=4).lora(r=4).fit()
    text = Path("run/README.md").read_text()
    card, steps = ModelCard(text), [e for e in run.events if e["kind"] == "step"]
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation" and card.data.tags == ["sft", "sftkit", "lora"]
    assert not {"base_model", "datasets", "license"} & set(card.data.to_dict())              # a local folder and file, whose licence nobody stated
    scores = [e for e in run.events if e["kind"] == "scores"][-1]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {k: scores[k] for k in ("loss", "perplexity", "bleu", "exact_match")}
    about = run.about
    for told in ("| rows trained on | 42 |", "| rows held out | 6 |", f"`{about['data_hash']}`", "`chat.jsonl`", "| chat template | `chatml` |", "| columns | `messages` |", "| `lora_r` | `4` |",
                 f"| training loss of the last step (nats per token) | {steps[-1]['loss']:.4g} |", f"| perplexity of the held-out rows | {scores['perplexity']:.4g} |", f"torch {about['packages']['torch']}", about["python"]):
        assert told in text, told
    assert f"| trained tokens in an epoch | {run.events[[e['kind'] for e in run.events].index('plan')]['trained_tokens']:,} |" in text
    assert len([p for p in Path("run").rglob("README.md")]) == 1               # none in the checkpoints
    assert str(Path.cwd()) not in text and str(Path(tiny).parent) not in text


def test_card_of_a_model_and_data_of_the_hub_names_them():
    from sftkit.export import model_card
    card = lambda **more: ModelCard(model_card(Recipe(**{**dict(model="org/base", data_path="org/rows:config", project_name="p"), **more}), {}, [])).data
    assert card().base_model == "org/base" and card().datasets == ["org/rows"]
    for given in ("rows/part", "chat.jsonl"):
        data = ModelCard(model_card(Recipe(model="m", data_path=given, project_name="p"), {"local": ["data_path", "model"]}, [])).data.to_dict()
        assert "datasets" not in data and "base_model" not in data
    assert card(model="/models/base").base_model is None and card(data_path="data-0123456789ab.jsonl").datasets is None


def test_card_names_the_run_whose_weights_are_continued(tiny):
    from sftkit.export import model_card
    plan_for(tiny, "runs/first").fit(); plan_for(tiny, "runs/low", save_steps=1).lora(r=4).fit()
    card = lambda *args, **fields: (plan_for(tiny, *args, **fields).fit(), Path(args[0], "README.md").read_text())[1]
    base, here = Path(tiny).name, str(Path.cwd())
    for given in "runs/first", str(Path("runs/first").absolute()) + "/":
        text = card("second", continue_from=given, resume=False)
        assert f"All weights fine-tuned from `{base}` (a model in a local folder), continuing the weights of the run `first`. " in text and here not in text
    assert "), continuing the weights of the run `low` at step 1. " in card("third", continue_from="runs/low/checkpoint-1", peft=True, lora_r=4)
    assert "continuing" not in Path("runs/first/README.md").read_text()
    told = lambda given, **facts: model_card(Recipe(model="org/base", data_path="d", project_name="p", continue_from=given), {"local": ["continue_from"], **facts}, [])
    assert "from `org/base`, continuing the weights of the run `work`. " in told("..", folder="/home/grace/work/tries") and "grace" not in told("..", folder="/home/grace/work/tries")
    assert "the run `first` at step 30. " in told(r"C:\Users\ada\first\checkpoint-30") and "the run `first` at step 30. " in told("checkpoint-30", folder="/home/grace/first")


def test_licence_is_that_of_the_base_and_of_nobody_else(tiny):
    from sftkit.training import _stated_license
    base = save_tiny("base", extra=("<|im_start|>", "<|im_end|>"))
    assert _stated_license(base, True) == {}
    Path("base/README.md").write_text("---\nlicense: other\nlicense_name: acme\nlicense_link: https://example.org/l\nlanguage: en\n---\n# Base\n")
    assert _stated_license(base, True) == dict(license="other", license_name="acme", license_link="https://example.org/l")
    plan_for(base).fit()
    assert ModelCard.load("run/README.md").data.license_name == "acme"
    for broken in ("---\nlicense: [\n---\n", "---\n- a\n---\n", "no front matter", "---\nlicense: {a: b}\n---\n", b"\xff\xfe---"):
        Path("base/README.md").write_bytes(broken.encode() if isinstance(broken, str) else broken)
        assert _stated_license(base, True) == {}, broken
    Path("base/README.md").unlink()
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "license": "mit"}))
    assert _stated_license(base, True) == dict(license="mit") and _stated_license("nobody/nothing", False) == {}


def test_card_tells_the_weights_that_were_kept(tiny):
    run = plan_for(tiny, max_steps=-1, epochs=6, lr=0.5, eval_steps=2, early_stopping_patience=2).fit()
    kept = next(e["step"] for e in run.events if e["kind"] == "result")
    evals = {e["step"]: e["loss"] for e in run.events if e["kind"] == "eval"}
    assert kept < max(evals) and evals[kept] == min(evals.values())
    assert f"| steps | {kept} |" in Path("run/README.md").read_text() and f"| {evals[kept]:.4g} |" in Path("run/README.md").read_text()


@pytest.mark.parametrize("case", ["adapter", "adapter with new tokens", "adapter on GGUF", "whole", "text"])
def test_example_of_a_card_runs_and_says_what_the_run_says(tiny, tiny_gpt2, case):
    base = tiny_gpt2 if "new" in case else save_tiny_gguf("tiny.gguf", extra=("<|im_start|>", "<|im_end|>")) if "GGUF" in case else tiny
    plan = Session(base, project="runs/it", **{**FAST, "chat_template": None if case == "text" else "chatml"}).data(TEXT if case == "text" else CHAT)
    run = (plan.lora(r=4) if "adapter" in case else plan).fit()
    ask = "The" if case == "text" else "What can you do?"
    expected = run.generate(ask, max_new_tokens=128)
    assert run_example(Path("runs/it/README.md").read_text(), "runs").strip() == expected.strip()
    run.save("elsewhere/copy")
    assert run_example(Path("elsewhere/copy/README.md").read_text(), "elsewhere").strip() == expected.strip()
    assert Run.open("elsewhere/copy").generate(ask, max_new_tokens=128) == expected
    if "adapter" in case:
        run.merge("merged")
        assert run_example(Path("merged/README.md").read_text(), ".").strip() == expected.strip() and ModelCard.load("merged/README.md").data.library_name == "transformers"


# -- save ----------------------------------------------------------------------------------------------------------------------

def test_save_writes_the_result_and_nothing_else(tiny):
    run = plan_for(tiny, eval_save_predictions=True, eval_max_new_tokens=2).lora(r=4, merge=True).fit()
    run.report(); Path("run/private.txt").write_text("mine"); Path("run/.env").write_text("KEY=1")
    assert run.save("out") == Path("out") and {p.name for p in Path("out").iterdir()} == REPO_FILES
    for name, path in result_files(run.directory).items(): assert Path("out", name).read_bytes() == path.read_bytes()
    assert names_no_path(Path("out/recipe.yaml").read_bytes()) and names_no_path(Path("out/README.md").read_bytes())
    with pytest.raises(RunError, match="exists already"): run.save("out")
    assert Run.open("out").generate("turn on light 1", max_new_tokens=4) == run.generate("turn on light 1", max_new_tokens=4)
    assert {"README.md", "recipe.yaml", "config.json", "model.safetensors"} <= {p.name for p in Path("run/merged").iterdir()}
    whole = plan_for(tiny, "whole").fit()
    whole.save("all")
    assert {p.name for p in Path("all").iterdir()} == REPO_FILES - {"adapter_config.json", "adapter_model.safetensors"} | {"config.json", "model.safetensors"}


def test_save_is_complete_or_not_at_all(tiny, monkeypatch):
    run = plan_for(tiny).fit()
    copy, copied = __import__("shutil").copyfile, []
    def full(source, target):
        copied.append(target)
        if len(copied) == 3: raise OSError("no space left on device")
        return copy(source, target)
    monkeypatch.setattr("sftkit.export.shutil.copyfile", full)
    before = sorted(p.name for p in Path.cwd().iterdir())
    with pytest.raises(OSError, match="no space"): run.save("out")
    assert sorted(p.name for p in Path.cwd().iterdir()) == before


def test_a_stopped_run_is_saved_from_its_checkpoint(tiny):
    from sftkit.events import EventLog
    run = plan_for(tiny, save_steps=2).lora(r=4).fit()
    lines = [l for l in run.directory.events_path.read_text().splitlines() if json.loads(l)["kind"] != "result"]
    run.directory.events_path.write_text("\n".join(lines) + "\n")
    log = EventLog(run.directory.events_path); log.append("state", state="interrupted", step=2); log.close()
    for path in Path("run").glob("adapter*"): path.unlink()
    run.save("out")
    assert {p.name for p in Path("out").iterdir()} == REPO_FILES and names_no_path(Path("out/README.md").read_bytes())
    for _, folder in run.directory.checkpoints(): __import__("shutil").rmtree(folder)
    with pytest.raises(RunError, match="holds no result yet"): run.save("none")


# -- push ----------------------------------------------------------------------------------------------------------------------

def test_push_uploads_the_result_byte_for_byte(tiny, hub):
    base = save_tiny("models/base", extra=("<|im_start|>", "<|im_end|>"))
    run = plan_for(str(Path(base).absolute()), eval_save_predictions=True, eval_max_new_tokens=2).lora(r=4).fit()
    run.report()
    assert run.url is None and run.push("club/lamps", token=TOKEN) == f"{hub.url}/club/lamps" == run.url
    repo = hub.repos["club/lamps"]
    assert set(repo["files"]) == REPO_FILES and repo["private"] is True and repo["commits"] == 1
    for name, path in result_files(run.directory).items():
        if name != "adapter_config.json": assert repo["files"][name] == path.read_bytes(), name
    ours, theirs = json.loads(Path("run/adapter_config.json").read_text()), json.loads(repo["files"]["adapter_config.json"])
    assert theirs == {**ours, "base_model_name_or_path": "base"} and Path(ours["base_model_name_or_path"]).is_absolute()
    for name, data in repo["files"].items(): assert names_no_path(data), name
    card = repo["files"]["README.md"].decode()
    assert "source = 'club/lamps'" in card and "# `club/lamps`" in card and "`base` (a model in a local folder" in card
    assert Recipe(**{k: v for k, v in yaml.safe_load(repo["files"]["recipe.yaml"]).items() if k != "about"}).lora_r == 4
    holds_no_token(".", repr(run), card, json.dumps(run.events), repr(run.recipe))
    assert not list(Path("run").glob(".pushing*")) and notes(run, "info")[-1] == f"Uploaded to {hub.url}/club/lamps"


def test_push_again_sends_what_changed_and_removes_what_would_be_loaded_along(tiny, hub):
    run = plan_for(tiny).lora(r=4).fit()
    run.push("lamps", token=TOKEN)
    sent = len(hub.paths("PUT /lfs"))
    assert sent == 1 and "ada/lamps" in hub.repos
    run.push("ada/lamps", token=TOKEN)
    assert len(hub.paths("PUT /lfs")) == sent                     # the weights are there already
    hub.repos["ada/lamps"]["files"].update({"notes.txt": b"theirs", "model-00001-of-00002.safetensors": b"old"})
    assert run.push("ada/lamps", merged=True, token=TOKEN) == f"{hub.url}/ada/lamps"
    files = hub.repos["ada/lamps"]["files"]
    assert {"config.json", "model.safetensors", "notes.txt", "README.md", "recipe.yaml"} <= set(files) and not {"adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"} & set(files)
    assert ModelCard(files["README.md"].decode()).data.library_name == "transformers" and not list(Path("run").glob(".pushing*"))


def test_public_is_asked_for_and_what_is_there_stays_as_it_is(tiny, hub):
    run = plan_for(tiny).fit()
    run.push("ada/open", private=False, token=TOKEN)
    run.push("ada/open", token=TOKEN)
    assert hub.repos["ada/open"]["private"] is False


def test_what_is_uploaded_can_be_loaded_from_there(tiny, hub, tmp_path):
    run = plan_for(tiny).fit()
    run.push("ada/whole", token=TOKEN)
    code, = re.findall(r"```python\n(.*?)\n```", hub.repos["ada/whole"]["files"]["README.md"].decode(), re.S)
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | dict(HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path/"home"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == run.generate("What can you do?", max_new_tokens=128).strip()


@pytest.mark.parametrize("where", ["GET /api/whoami", "POST /api/repos/create", "POST /api/validate-yaml", "/preupload/", "objects/batch", "PUT /lfs", "/commit/"])
def test_a_server_error_is_waited_out(trained, hub, where):
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    hub.fail(where, 500)
    run = Run.open("run")
    assert run.push("ada/lamps", token=TOKEN) and len(hub.paths(where)) >= 2 and "model.safetensors" in hub.repos["ada/lamps"]["files"]


# -- push_to_hub ---------------------------------------------------------------------------------------------------------------

def test_push_to_hub_uploads_after_training(tiny, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = plan_for(tiny, push_to_hub=True, hub_model_id="club/lamps").lora(r=4).fit()
    assert run.url == f"{hub.url}/club/lamps" and set(hub.repos["club/lamps"]["files"]) == REPO_FILES and hub.repos["club/lamps"]["private"]
    named = plan_for(tiny, "named-after-the-run", push_to_hub=True).fit()
    assert named.url == f"{hub.url}/ada/named-after-the-run"
    kinds = [e["kind"] for e in run.events]
    assert kinds.index("result") < max(i for i, k in enumerate(kinds) if k == "state") < kinds.index("note", len(kinds) - 1)


def test_what_the_two_fields_mean_together():
    base = dict(model="m", data_path="d", project_name="p")
    with pytest.raises(RecipeError, match="`push_to_hub` is off.*push_to_hub=True"): Recipe(**base, hub_model_id="org/name")
    for wrong in ("a/b/c", "a b", "-a", "org/", "a--b", "x" * 97, "../up", "org/name.git"):
        with pytest.raises(RecipeError, match="`hub_model_id` is .*accepted: `org/name`"): Recipe(**base, push_to_hub=True, hub_model_id=wrong)
    with pytest.raises(RecipeError, match="does not take `my run!`.*hub_model_id"): Recipe(**{**base, "project_name": "runs/my run!"}, push_to_hub=True)
    with pytest.raises(RecipeError) as e: Recipe(**base, push_to_hub=True, hub_model_id="a/b/c", max_steps=0)
    assert "2 things" in str(e.value)
    assert Recipe(**base, push_to_hub=True).hub_model_id is None and Session.from_recipe(Recipe(**base, push_to_hub=True, hub_model_id="o/n")).recipe.hub_model_id == "o/n"


@pytest.mark.parametrize("case", ["no token", "unknown token", "reader", "other account", "other's repository", "offline", "no hub"])
def test_what_cannot_be_uploaded_is_refused_before_training(tiny, hub, monkeypatch, case):
    words = {"no token": "hf auth login", "unknown token": "does not know this token", "reader": "may read only", "other account": "may not write to `other/lamps`.*`ada/...`, `club/...`",
             "other's repository": "may not write to `club/lamps`", "offline": "HF_HUB_OFFLINE", "no hub": "could not be reached"}
    repo = "other/lamps" if case == "other account" else "club/lamps"
    if case == "other's repository": hub.repos[repo] = {"private": False, "files": {}, "commits": 0}; hub.protected.add(repo)
    if case == "offline": monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if case == "no hub": monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("sftkit.model.load_base", lambda *a, **k: pytest.fail("the model was loaded"))
    plan = plan_for(tiny, push_to_hub=True, hub_model_id=repo, **({} if case == "no token" else {"token": {"unknown token": STRANGER, "reader": READER}.get(case, TOKEN)}))
    for verb in (plan.fit, plan.start):
        with pytest.raises(UploadError, match=words[case]) as e: verb()
        assert not Path("run").exists()
        holds_no_token(".", str(e.value), repr(plan))


def test_a_failing_upload_leaves_a_finished_run(tiny, hub, capsys):
    hub.fail("/commit/", 403, times=1)
    run = plan_for(tiny, push_to_hub=True, hub_model_id="ada/lamps", token=TOKEN).lora(r=4).fit()
    assert run.state == "finished" and run.url is None and isinstance(run.generate("turn on", max_new_tokens=2), str)
    said = notes(run, "warning")[-1]
    assert "failed (403: made to fail, •••)" in said and 'Run.open("run").push("ada/lamps") tries again' in said and said in capsys.readouterr().err
    holds_no_token(".", said)
    assert Run.open("run").push(token=TOKEN) == f"{hub.url}/ada/lamps" and set(hub.repos["ada/lamps"]["files"]) == REPO_FILES
    hub.fail("PUT /lfs", 403, times=1)
    whole = plan_for(tiny, "whole").fit()
    with pytest.raises(UploadError, match="failed") as e: whole.push("ada/whole", token=TOKEN)
    assert "signed" not in str(e.value) and "signed" not in "".join(notes(whole, "warning"))


def test_command_line_uploads_and_says_when_it_could_not(tiny, hub, tmp_path, capsys, monkeypatch):
    write_jsonl("chat.jsonl", CHAT)
    env = environment("HF_", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path/"home"), HF_HUB_DISABLE_XET="1")
    words = ["llm", "--model", tiny, "--data-path", "chat.jsonl", "--project-name", "cli", "--max-steps", "1", "--gradient-accumulation", "1", "--push-to-hub"]
    hub.fail("/commit/", 403)
    done = subprocess.run([sys.executable, "-m", "sftkit", *words], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "Report: " in done.stdout and 'Run.open("cli").push("cli")' in done.stderr and Run.open("cli").state == "finished", done.stderr
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", "cli"]) == 0 and f"{hub.url}/ada/cli" in capsys.readouterr().out
    assert main(["push", "cli", "club/cli"]) == 0 and set(hub.repos["club/cli"]["files"]) == set(hub.repos["ada/cli"]["files"])
    assert main(["push", "cli", "a", "b"]) == main(["push"]) == 1 and "takes one run directory" in capsys.readouterr().err
    assert main(["push", "cli", "no such name"]) == 1 and "accepted: `org/name`" in capsys.readouterr().err
    holds_no_token("cli")


def test_worker_process_uploads_with_the_token_of_its_plan(tiny, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", hub.url); monkeypatch.setenv("HF_HUB_DISABLE_XET", "1"); monkeypatch.setenv("HF_HOME", str(tmp_path/"home")); monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    run = plan_for(tiny, push_to_hub=True, hub_model_id="club/worker", token=TOKEN).start().wait(180)
    assert run.url == f"{hub.url}/club/worker" and "model.safetensors" in hub.repos["club/worker"]["files"]
    holds_no_token("run")


def test_of_several_processes_one_asks_and_uploads(tiny, hub, tmp_path):
    write_jsonl("chat.jsonl", CHAT)
    env = environment("HF_", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path/"home"), HF_HUB_DISABLE_XET="1")
    words = ["llm", "--model", tiny, "--data-path", "chat.jsonl", "--project-name", "two", "--max-steps", "1", "--gradient-accumulation", "1", "--gpus", "2", "--push-to-hub"]
    sftkit = lambda token: subprocess.run([sys.executable, "-m", "sftkit", *words], capture_output=True, text=True, env={**env, "HF_TOKEN": token})
    refused = sftkit(READER)
    assert refused.returncode != 0 and refused.stderr.count("may read only") == 1 and not Path("two").exists() and len(hub.paths("whoami")) == 1
    done = sftkit(TOKEN)
    assert done.returncode == 0, done.stderr
    assert Run.open("two").url == f"{hub.url}/ada/two" and hub.repos["ada/two"]["commits"] == 1 and len(hub.paths("whoami")) == 3              # before training, and before the upload
    holds_no_token("two", done.stdout, done.stderr)


def test_acceptance_31_no_token_in_any_file_event_log_or_repr(tiny, hub, monkeypatch, caplog, capsys):
    plan = plan_for(tiny, log="tensorboard", push_to_hub=True, hub_model_id="club/lamps", token=TOKEN).lora(r=4, merge=True)
    run = plan.fit()
    run.report(); plan.to_yaml("plan.yaml"); plan.to_script("plan.py"); run.save("saved")
    with pytest.raises(RecipeError) as e: Recipe(model="m", data_path="d", project_name="p", token=3, lr=0)
    out, err = capsys.readouterr()
    holds_no_token(".", repr(plan), plan._repr_html_(), repr(run), run._repr_html_(), repr(plan.recipe), repr(run.recipe), str(run.recipe.to_dict()), " ".join(plan.recipe.to_args()), str(run.events), caplog.text, out, err, str(e.value))
    for files in hub.repos.values():
        for data in files["files"].values(): assert TOKEN.encode() not in data
    assert plan.recipe.replace(lr=1e-4).token == TOKEN                # it is kept where it is used


# -- a run directory that somebody else wrote ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "sub/model.safetensors", "..", ".", "", "sub/../adapter.bin", "link.bin", "gone.bin", "a\0b", 7])
def test_a_result_is_only_what_lies_in_the_run_directory(tmp_path, name):
    folder = tmp_path/"run"
    (folder/"sub").mkdir(parents=True)
    for file in ("adapter.bin", "sub/model.safetensors", "../secret.txt"): (folder/file).write_text("private")
    (folder/"link.bin").symlink_to("../secret.txt")
    tell = lambda *files: (folder/"events.jsonl").write_text(json.dumps({"t": 1, "kind": "result", "step": 1, "files": list(files)}) + "\n")
    from sftkit.events import RunDirectory
    tell("adapter.bin")
    assert result_files(RunDirectory(folder)) == {"adapter.bin": folder/"adapter.bin"}
    tell("adapter.bin", name)
    with pytest.raises(RunError, match="as a file of the result") as told: result_files(RunDirectory(folder))
    assert str(folder) in str(told.value) and repr(name)[1:-1] in str(told.value)


def test_a_checkpoint_gives_only_its_own_files(tmp_path):
    from sftkit.events import RunDirectory
    folder = tmp_path/"elsewhere"/"checkpoint-3"
    folder.mkdir(parents=True)
    (folder/"config.json").write_text("{}"); (tmp_path/"secret.txt").write_text("private")
    (tmp_path/"run").mkdir(); (tmp_path/"run"/"checkpoint-3").symlink_to(folder)           # a bigger disk: the folder's own choice
    assert list(result_files(RunDirectory(tmp_path/"run"))) == ["config.json"]
    (folder/"notes.txt").symlink_to("../../secret.txt")
    with pytest.raises(RunError, match="notes.txt"): result_files(RunDirectory(tmp_path/"run"))


# -- what may pass ---------------------------------------------------------------------------------------------------------------

def test_only_what_may_pass_is_tried_again(monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError
    from sftkit.export import retry
    http = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])          # httpx, or what the installed huggingface_hub has in its place
    status = lambda code: HfHubHTTPError("said no", response=http.Response(code, request=http.Request("GET", "http://hub")))
    def caused(error, cause):
        error.__cause__ = cause
        return error
    passing = [ConnectionError("reset"), TimeoutError(), http.ConnectError("no route"), http.ReadTimeout("slow"), http.RemoteProtocolError("cut off"), *map(status, (500, 503, 408, 429)),
               caused(RuntimeError("Error while uploading"), status(502)), caused(RuntimeError("Error while uploading"), http.ConnectError("no route"))]
    lasting = [TypeError("a bug"), KeyError("a bug"), RuntimeError("a bug"), AttributeError("a bug"), ValueError("no"), FileNotFoundError("gone"), OSError(28, "disk full"), LocalTokenNotFoundError(), OfflineModeIsEnabled("offline"),
               *map(status, (400, 401, 403, 404, 409)), caused(RuntimeError("Error while uploading"), status(403)), caused(RuntimeError("Error while uploading"), TypeError("a bug"))]
    for error, tries in [*((e, 3) for e in passing), *((e, 1) for e in lasting)]:
        calls = []
        def fail():
            calls.append(1)
            raise error
        with pytest.raises(type(error)): retry(fail, waits=(0, 0))
        assert len(calls) == tries, repr(error)


def test_an_upload_calls_a_bug_a_bug(hub, monkeypatch):
    from sftkit.export import upload
    def broken(*args, **more): raise TypeError("a bug of ours")
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", broken)
    with pytest.raises(TypeError, match="a bug of ours"): upload({"README.md": "x"}, "ada/lamps", TOKEN)


@pytest.mark.parametrize("error", [ValueError("LFS batch API returned errors:\nno space"), RuntimeError("Error while uploading 'a' to the Hub."), ConnectionError("reset"), FileNotFoundError("a")])
def test_an_upload_that_fails_says_so(hub, monkeypatch, error):
    from sftkit.export import upload
    def broken(*args, **more): raise error
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", broken)
    with pytest.raises(UploadError, match="The upload to `ada/lamps` failed"): upload({"README.md": "x"}, "ada/lamps", TOKEN)


# -- no spelling loses what the recipe asks for ------------------------------------------------------------------------------------

def test_a_resumed_run_whose_upload_fails_is_told_by_the_exit_code(tiny, hub, monkeypatch, capsys):
    from sftkit.engine import Recorder
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    plan = plan_for(tiny, max_steps=6, push_to_hub=True)
    for name in ("told", "well"):
        with monkeypatch.context() as m:
            m.setattr(Recorder, "on_step_begin", lambda self, *a, **k: setattr(self, "stop_asked", True), raising=False)
            assert plan.options(project_name=name).fit().state == "interrupted"
        if name == "told": hub.fail("/commit/", 403)
        assert main(["resume", name]) == (1 if name == "told" else 0) and Run.open(name).state == "finished"
        said = capsys.readouterr()
        assert ('Run.open("told").push("told") tries again' in said.err) == (name == "told") and f"{name}: finished" in said.out


@pytest.mark.parametrize("asked", [dict(peft=True, merge_adapter=True), dict(push_to_hub=True)])
def test_the_trainer_alone_refuses_what_it_would_not_do(tiny, asked):
    from sftkit.training import Trainer
    recipe = plan_for(tiny, **asked).recipe
    with pytest.raises(RecipeError, match=f"`{list(asked)[-1]}`.*Session.from_recipe") as told: Trainer(recipe).fit()
    assert not Path("run").exists() and "train(recipe)" in str(told.value)
    run, model, data = Trainer(recipe.replace(merge_adapter=False, push_to_hub=False)).fit()
    assert run.status()["state"] == "finished" and not model.training and len(data.train_rows)

"""The rest of the guide: distillation, metrics, early stopping, trackers, continuing from earlier weights."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHAT, TEXT
from safetensors.torch import load_file
from sftkit import Run, Session
from sftkit.loss import distillation_sums
from sftkit.model import load_base, load_trained
from sftkit.recipe import DataError, ModelError, Recipe, RecipeError, RunError
from running import chat_plan, environment, nats_by_hand, real_rows, steps
from tiny import save_tiny, write_jsonl


def plan_for(model, project="run", source=CHAT, **fields): return chat_plan(model, project, source, **{**dict(max_steps=3, batch_size=4, gradient_accumulation=2), **fields})
def notes(run): return " ".join(e["text"] for e in run.events if e["kind"] == "note")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "A wider model over the same tokens."
    return save_tiny(tmp_path_factory.mktemp("teacher") / "t", extra=("<|im_start|>", "<|im_end|>"), hidden=48, layers=3, seed=7)


# -- distillation ------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def independent_terms(student, teacher, batches, T):
    "Cross-entropy and KL(teacher || student) at temperature T, mean per trained token, row by row in float64 from full logits."
    s, t, kl, rows = load_base(student).double(), load_base(teacher).double(), 0.0, real_rows(batches)
    ce, n = nats_by_hand(s, rows)
    for ids, labels in rows:
        zs, zt = s(ids[None]).logits[0], t(ids[None]).logits[0]
        for i in range(1, len(labels)):
            if labels[i] == -100: continue
            p, q = (zt[i - 1] / T).softmax(-1), (zs[i - 1] / T).softmax(-1)
            kl += (p * (p / q).log()).sum().item()
    return ce, kl / n


@pytest.mark.parametrize("accumulation", [1, 4])
def test_acceptance_17_distillation_equals_an_independent_computation(tiny, teacher, accumulation):
    plan = plan_for(tiny, gradient_accumulation=accumulation, batch_size=3, max_steps=1).distill(teacher, temperature=2.0, alpha=0.6)
    ce, kl = independent_terms(tiny, teacher, [b for b, _ in zip(plan.batches(), range(accumulation))], 2.0)
    run = plan.fit()
    assert kl > 1e-3                                                                     # random models differ
    assert steps(run, "ce")[0] == pytest.approx(ce, abs=1e-4) and steps(run, "kl")[0] == pytest.approx(kl, abs=1e-4)
    assert steps(run)[0] == pytest.approx(0.6 * 4 * kl + 0.4 * ce, abs=1e-4)


def test_acceptance_17_teacher_equal_to_the_student_and_alpha_0(tiny, teacher):
    before = load_file(Path(teacher) / "model.safetensors")
    same = plan_for(tiny, "same", max_steps=1).distill(tiny, temperature=3.0, alpha=0.5).fit()
    assert abs(steps(same, "kl")[0]) < 1e-5
    plain, none = plan_for(tiny, "plain").fit(), plan_for(tiny, "none").distill(teacher, alpha=0.0).fit()
    assert steps(none) == pytest.approx(steps(plain), abs=1e-6)
    after = load_file(Path(teacher) / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_acceptance_17_accumulation_and_padding_change_nothing(tiny, teacher):
    fields = dict(max_steps=1, seed=3)
    values = []
    for i, (size, accumulation) in enumerate([(8, 1), (2, 4), (1, 8)]):
        plan = plan_for(tiny, f"r{i}", CHAT[:8], batch_size=size, gradient_accumulation=accumulation, **fields).distill(teacher)
        values.append(plan.fit().history[["loss", "kl", "ce", "grad_norm"]].iloc[0].tolist())
    assert values[1] == pytest.approx(values[0], abs=1e-4) and values[2] == pytest.approx(values[0], abs=1e-4)


def test_acceptance_17_many_chunks_are_one_and_the_teacher_gets_no_gradient(tiny, teacher, monkeypatch):
    import sftkit.loss
    batch = next(iter(plan_for(tiny, batch_size=8).batches()))
    def terms(student, taught):
        ce, kl = distillation_sums(student, batch, taught, 2.0)
        (ce + kl).backward()
        return ce.item(), kl.item(), student.get_input_embeddings().weight.grad.clone()
    taught = load_base(teacher)
    whole = terms(load_base(tiny).train(), taught)
    monkeypatch.setattr(sftkit.loss._Head, "vocab_size", property(lambda self: 2**25, lambda self, v: None), raising=False)      # chunks of 64 tokens
    pieces = terms(load_base(tiny).train(), taught)
    assert pieces[:2] == pytest.approx(whole[:2], rel=1e-5) and torch.allclose(pieces[2], whole[2], atol=1e-4)
    assert all(p.grad is None for p in taught.parameters())


def test_acceptance_17_another_vocabulary_is_refused_before_training(tiny, tiny_gpt2, tmp_path):
    other = save_tiny(tmp_path / "other", vocab_size=640, extra=("<|im_start|>", "<|im_end|>", "<|more|>"))
    for unlike in tiny_gpt2, other:
        with pytest.raises(ModelError, match="another vocabulary"): plan_for(tiny).distill(unlike).fit()
    with pytest.raises(RecipeError, match="needs a teacher"): Recipe(model="m", data_path="d", project_name="p", use_distillation=True)
    assert not Path("run/events.jsonl").exists()


def test_distillation_brings_the_student_to_the_teacher(tiny, teacher):
    run = plan_for(tiny, max_steps=20, lr=3e-3).distill(teacher, temperature=2.0, alpha=1.0).fit()
    assert steps(run, "kl")[-1] < steps(run, "kl")[0]


# -- evaluation --------------------------------------------------------------------------------------------------------------------

def test_acceptance_18_metrics_equal_sacrebleu_and_rouge_of_the_predictions(tiny):
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
    plan = plan_for(tiny, eval_samples=2, eval_max_new_tokens=24, eval_steps=16, valid_split=6, max_steps=32, scheduler="constant").metrics("perplexity,bleu,rouge,exact_match", save_predictions=True)
    run = plan.fit()
    said = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    scores, evals = run.events and [e for e in run.events if e["kind"] == "scores"][-1], [e for e in run.events if e["kind"] == "eval"]
    assert len(said) == scores["rows"] == 6 and len(evals) >= 2 and all("bleu" in e and "rougeL" in e for e in evals)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"])) and evals[-1]["loss"] == pytest.approx(scores["loss"])
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu([p["prediction"] for p in said], [[p["reference"] for p in said]]).score)
    scorer = RougeScorer(["rougeL"])
    ours = sum(scorer.score(p["reference"], p["prediction"])["rougeL"].fmeasure for p in said) / len(said)
    assert scores["rougeL"] == pytest.approx(ours) and 0.2 < ours < 1 and 1 < scores["bleu"] < 100                     # enough steps for some of the words
    # greedy, from the prompt alone: what a fresh load of the result answers
    again = Run.open("run")
    model, tokenizer, encoder, stops = again._parts()
    rows = plan._work.data.valid_rows
    from sftkit.evaluate import generate
    assert [p["prediction"] for p in said] == generate(model, tokenizer, [encoder.prompt(r.value) for r in rows], max_new_tokens=24, stop_ids=stops)


def test_own_metric_by_name_and_wrong_ones_before_anything_loads(tiny, monkeypatch):
    Path("mine.py").write_text("def words(predictions, references): return sum(len(p.split()) for p in predictions) / len(predictions)\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    run = plan_for(tiny, eval_metrics="mine:words", use_enhanced_eval=True, valid_split=4, eval_max_new_tokens=4, max_steps=1).fit()
    assert [e for e in run.events if e["kind"] == "scores"][0]["words"] >= 0
    for wrong in "perplexty", "nowhere:f", "mine:nothing":
        with pytest.raises(DataError): plan_for(tiny, "wrong", use_enhanced_eval=True, eval_metrics=wrong).fit()
    assert not Path("wrong/events.jsonl").exists()


def test_evaluation_without_data_for_it_holds_rows_out_and_says_so(tiny):
    run = plan_for(tiny, use_enhanced_eval=True, eval_max_new_tokens=4, max_steps=1).fit()
    assert "held out" in notes(run) and [e for e in run.events if e["kind"] == "eval"]
    text = Session(tiny, project="text", max_steps=1, use_enhanced_eval=True).data(TEXT).fit()
    assert "no prompt" in notes(text) and "bleu" not in [e for e in text.events if e["kind"] == "scores"][0]


# -- early stopping ----------------------------------------------------------------------------------------------------------------

def test_acceptance_20_a_loss_that_does_not_fall_stops_and_the_best_is_kept(tiny):
    run = plan_for(tiny, lr=1e-12, max_steps=40, valid_split=6, eval_steps=2, early_stopping_patience=2, early_stopping_threshold=1e-3, save_total_limit=1).fit()
    assert run.state == "finished" and len(steps(run)) == 6 and "Stopped early at step 6" in notes(run) and "step 2" in notes(run)


@pytest.mark.parametrize("lora", [False, True])
def test_acceptance_20_the_result_is_the_best_checkpoint(tiny, lora):
    plan = plan_for(tiny, lr=0.3 if lora else 0.05, max_steps=40, valid_split=6, eval_steps=1, early_stopping_patience=3, save_total_limit=1, warmup_ratio=0, scheduler="constant")
    run = (plan.lora(r=4, dropout=0) if lora else plan).fit()
    evals = {e["step"]: e["loss"] for e in run.events if e["kind"] == "eval"}
    best, last = min(evals, key=evals.get), max(evals)
    assert best < last, evals                                                            # a learning rate that high makes it worse in the end
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    kept, checkpoint = load_file(Path("run") / name), load_file(Path(f"run/checkpoint-{best}") / name)
    assert all(torch.equal(kept[k], checkpoint[k]) for k in kept)
    assert f"weights of step {best}" in notes(run)
    assert run.evaluate(metrics="perplexity")["loss"] == pytest.approx(evals[best], abs=1e-4)


# -- continuing --------------------------------------------------------------------------------------------------------------------

def test_continue_from_starts_a_new_run_from_old_weights(tiny):
    first = plan_for(tiny, "first", max_steps=4).lora(r=4, dropout=0).fit()
    second = plan_for(tiny, "second", max_steps=2, continue_from="first").lora(r=4, dropout=0)
    run = second.fit()
    batch = [b for b, _ in zip(second.batches(), range(2))]
    from sftkit.loss import mean_token_loss
    loss, tokens = mean_token_loss(load_trained("first")[0], batch)
    assert steps(run)[0] == pytest.approx(loss / tokens, abs=1e-4) and [e["step"] for e in run.events if e["kind"] == "step"] == [1, 2]
    full = plan_for(tiny, "third", max_steps=1).fit()
    on_top = plan_for(tiny, "fourth", max_steps=1, continue_from="third").fit()
    loss, tokens = mean_token_loss(load_trained("third")[0], batch)
    assert steps(on_top)[0] == pytest.approx(loss / tokens, abs=1e-4) and full.path.exists()


def test_continue_from_says_what_is_wrong(tiny):
    plan_for(tiny, "first", max_steps=1).lora(r=4, dropout=0).fit()
    with pytest.raises(ModelError, match="lora_r=4"): plan_for(tiny, "x", continue_from="first").lora(r=8).fit()
    with pytest.raises(ModelError, match="peft=True"): plan_for(tiny, "x", continue_from="first").fit()
    with pytest.raises(ModelError, match="no weights"): plan_for(tiny, "x", continue_from="nowhere").fit()
    with pytest.raises(ModelError, match="continue_from='first'"): plan_for("first", "x").fit()
    assert not Path("x/events.jsonl").exists()


# -- trackers and extras -----------------------------------------------------------------------------------------------------------

def test_acceptance_29_tensorboard_writes_a_run(tiny):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = plan_for(tiny, valid_split=6, eval_steps=2).log("tensorboard").fit()
    read = EventAccumulator(str(next(Path("run/tensorboard").glob("**/events.out.*")).parent)); read.Reload()
    assert [s.value for s in read.Scalars("train/loss")] == pytest.approx(steps(run), rel=1e-5) and read.Scalars("eval/loss")


def test_acceptance_29_wandb_offline_writes_a_run(tiny):
    "What is set in the environment is set by the process itself: one that begins warm has no variables that wandb might have read by then."
    pytest.importorskip("wandb")
    write_jsonl("chat.jsonl", CHAT)
    def run(**env):
        code = f"import os\nos.environ |= {env!r}\nfrom sftkit import Session\nSession({tiny!r}, project='run', chat_template='chatml', max_steps=2, batch_size=4).data('chat.jsonl').log('wandb').fit()"
        return subprocess.run([sys.executable, "-c", code], env=environment("WANDB"), capture_output=True, text=True)
    refused = run(HOME=str(Path.cwd()))
    assert refused.returncode and "WANDB_MODE=offline" in refused.stderr and not Path("run").exists()
    done = run(WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert list(Path("run/wandb").glob("offline-run-*/*.wandb"))


def test_acceptance_29_mlflow_writes_a_run_without_a_server(tiny, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False); monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true"); monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    run = plan_for(tiny, valid_split=6, eval_steps=2).log("mlflow").fit()
    again = plan_for(tiny, project="run2", chat_template="chatml").log("mlflow,tensorboard").fit()
    assert not mlflow.is_tracking_uri_set() and "MLFLOW_TRACKING_URI" not in os.environ                 # as before, so that the second run had a store of its own
    for each in run, again:
        store = each.path.absolute()/"mlflow"
        client = mlflow.MlflowClient(f"sqlite:///{store}/mlflow.db" if (store/"mlflow.db").exists() else store.as_uri())
        [experiment] = [e for e in client.search_experiments() if e.name == "sftkit"]
        [logged] = client.search_runs([experiment.experiment_id])
        assert logged.info.run_name == each.path.name and logged.info.status == "FINISHED" and logged.data.params["lr"] == "0.01"
        assert [(m.step, m.value) for m in client.get_metric_history(logged.info.run_id, "train/loss")] == [(i + 1, loss) for i, loss in enumerate(steps(each))]
    assert len(client.get_metric_history(logged.info.run_id, "eval/loss")) == 0 and not Path("mlruns").exists() and not Path("mlflow.db").exists()


TRACKIO = """import json
from pathlib import Path
def said(*what): Path("said.jsonl").open("a").write(json.dumps(what) + "\\n")
class Run:
    def log(self, values, step=None): said("log", values, step)
    def finish(self): said("finish")
def init(**settings): said("init", settings); return Run()
class config:
    update = staticmethod(lambda values, **kw: said("config", values))
"""


def test_acceptance_29_trackio_is_started_here_without_a_dashboard_and_finished_also_after_an_error(tiny, monkeypatch):
    """Against a recorder with trackio's calls: trackio itself wants an older pillow than the pinned one."""
    Path("site").mkdir(); Path("site/trackio.py").write_text(TRACKIO); monkeypatch.syspath_prepend("site"); monkeypatch.setitem(sys.modules, "trackio", None); del sys.modules["trackio"]     # undone at the end
    run = plan_for(tiny, valid_split=6, eval_steps=2).log("trackio").fit()
    (init, config, *logged, finish) = map(json.loads, Path("said.jsonl").read_text().splitlines())
    assert init == ["init", dict(project="sftkit", name="run", embed=False)] and config[1]["lr"] == 0.01 and finish == ["finish"]
    assert [(v["train/loss"], step) for _, v, step in logged if "train/loss" in v] == [(loss, i + 1) for i, loss in enumerate(steps(run))] and any("eval/loss" in v for _, v, _ in logged)
    monkeypatch.setattr("sftkit.engine.Recorder.on_step_end", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError): plan_for(tiny, project="broken").log("trackio").fit()
    assert json.loads(Path("said.jsonl").read_text().splitlines()[-1]) == ["finish"]


def test_a_folder_named_as_a_tracker_is_no_tracker(tiny, monkeypatch):
    Path("here/trackio").mkdir(parents=True); monkeypatch.syspath_prepend("here")
    with pytest.raises(RunError, match="pip install trackio"): plan_for(tiny).log("trackio").fit()


def test_acceptance_29_a_missing_tracker_fails_before_the_model_loads(tiny, monkeypatch):
    import importlib.util
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in ("trackio", "mlflow") else real(name, *a))
    for name in "trackio", "mlflow":
        with pytest.raises(RunError, match=f"pip install {name}"): plan_for(tiny).log(name).fit()
    with pytest.raises(RecipeError, match="Did you mean `wandb`"): plan_for(tiny).log("wandbb").recipe
    assert not Path("run").exists() or not any(Path("run").glob("events*"))


def test_acceptance_28_unsloth_is_replaced_by_name(tiny):
    assert "nsloth" in notes(plan_for(tiny, max_steps=1, unsloth=True).fit())


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_every_optimizer_of_the_recipe_trains(tiny, optimizer):
    values = steps(plan_for(tiny, optimizer=optimizer, max_steps=6, lr=1.0 if optimizer == "sgd" else 3e-3).fit())
    assert len(values) == 6 and values[-1] < values[0]


def test_wrong_combinations_are_refused_together():
    base = dict(model="m", data_path="d", project_name="p")
    for fields, words in [(dict(merge_adapter=True), "peft=True"), (dict(teacher_model="t"), "use_distillation"), (dict(quantization="int4"), "peft=True"),
                          (dict(peft=True, quantization="int4", init_lora_weights="pissa"), "pissa"), (dict(packing=True, padding="left"), "padding"),
                          (dict(distributed_backend="ddp", gpus=1), "raise `gpus`"), (dict(log="wandb,foo"), "accepted")]:
        with pytest.raises(RecipeError, match=words): Recipe(**base, **fields)


# -- packing -----------------------------------------------------------------------------------------------------------------------

def documents_loss(model_path, batches):
    "Mean cross-entropy of the trained tokens, document by document, of a freshly loaded model."
    apart = [(ids[d == k], labels[d == k]) for b in batches for ids, labels, d in zip(b["input_ids"], b["labels"], b["documents"]) for k in range(1, int(d.max()) + 1)]
    return nats_by_hand(load_base(model_path).double(), apart)[0]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("train_on", ["auto", "all"])
def test_acceptance_16_packed_loss_is_the_masked_cross_entropy(tiny, accumulation, train_on):
    plan = plan_for(tiny, packing=True, max_seq_length=96, batch_size=2, gradient_accumulation=accumulation, train_on=train_on, max_steps=1)
    batches = [b for b, _ in zip(plan.batches(), range(accumulation))]
    assert max(int(b["documents"].max()) for b in batches) > 1
    assert steps(plan.fit())[0] == pytest.approx(documents_loss(tiny, batches), abs=1e-4)


def test_acceptance_21_fewer_steps_same_tokens_same_logits(tiny, tiny_gpt2):
    fields = dict(epochs=1, max_steps=-1, max_seq_length=128, batch_size=2, gradient_accumulation=1)
    packed, plain = plan_for(tiny, "packed", packing=True, **fields).fit(), plan_for(tiny, "plain", **fields).fit()
    assert len(steps(packed)) < len(steps(plain)) / 2 and sum(steps(packed, "tokens")) == sum(steps(plain, "tokens"))
    assert sum(steps(packed, "seq_tokens")) == sum(steps(plain, "seq_tokens"))
    for path, rows in (tiny, CHAT), (tiny_gpt2, TEXT):
        model = load_base(path)
        for batch in Session(path, project="x", packing=True, chat_template="chatml" if rows is CHAT else None, **fields).data(rows).batches():
            with torch.no_grad():
                together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
                for i, documents in enumerate(batch["documents"]):
                    for d in range(1, int(documents.max()) + 1):
                        at = documents == d
                        assert (together[i, at] - model(batch["input_ids"][i, at][None]).logits[0]).abs().max() < 1e-4


def test_acceptance_21_a_packed_run_resumes_and_covers_each_row_once_an_epoch(tiny):
    plan = plan_for(tiny, packing=True, max_seq_length=64, batch_size=2)
    rows = sorted(int(i) for b in plan.batches() for i in b["rows"])
    assert rows == list(range(48))
    full = plan_for(tiny, "full", packing=True, max_seq_length=64, batch_size=2, gradient_accumulation=1, max_steps=6, save_steps=3).fit()
    import shutil
    shutil.copytree("full", "cut"); [shutil.rmtree(p) for p in Path("cut").glob("checkpoint-6")]
    events = [json.loads(l) for l in Path("cut/events.jsonl").read_text().splitlines()]
    Path("cut/events.jsonl").write_text("".join(json.dumps({**e, "state": "stopped"} if e.get("state") == "finished" else e) + "\n" for e in events))
    Path("cut/recipe.yaml").write_text(Path("cut/recipe.yaml").read_text().replace("project_name: full", "project_name: cut"))
    assert steps(Run.open("cut").resume()) == steps(full)


def test_packing_is_refused_where_a_document_would_see_another(tiny, monkeypatch):
    from transformers import MambaConfig, MambaForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4)).save_pretrained("mamba"); tokenizer.save_pretrained("mamba")
    with pytest.raises(ModelError, match="--disable-packing"): plan_for("mamba", packing=True).fit()


# -- merging and several processes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ["llama", "gpt2 with new tokens", "dora", "bf16 base"])
def test_acceptance_08_merged_equals_adapter(tiny, tiny_gpt2, case, tmp_path):
    path, dtype = tiny_gpt2 if "gpt2" in case else tiny, "float32"
    if case == "bf16 base":
        path, dtype = str(tmp_path / "bf16"), "bfloat16"
        from transformers import AutoModelForCausalLM, AutoTokenizer
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(path); AutoTokenizer.from_pretrained(tiny).save_pretrained(path)
    run = plan_for(path, max_steps=4).lora(r=4, dropout=0, dora=case == "dora", merge=True).fit()
    kept = Path("run/adapter_model.safetensors").read_bytes()
    result = run.merge("out")
    assert result.dtype == dtype and result.positions > 20 and (dtype != "float32" or result.max_difference < 1e-3)
    assert Path("run/adapter_model.safetensors").read_bytes() == kept and "Merged model in run/merged" in notes(run)
    weights = load_file("out/model.safetensors")
    assert {str(v.dtype).removeprefix("torch.") for v in weights.values()} == {dtype} and not any("lora" in k for k in weights)
    assert all(torch.equal(v, load_file("run/merged/model.safetensors")[k]) for k, v in weights.items())
    from transformers import AutoModelForCausalLM, AutoTokenizer
    merged, tokenizer = AutoModelForCausalLM.from_pretrained("out").float(), AutoTokenizer.from_pretrained("out")
    ids = torch.tensor([tokenizer.apply_chat_template(CHAT[0]["messages"], tokenize=True)["input_ids"]])
    with torch.no_grad(): apart = (merged(ids).logits - load_trained("run", torch.float32)[0](ids).logits).abs().max()
    assert apart < (1e-3 if dtype == "float32" else 0.05)
    with pytest.raises(RunError, match="exists already"): run.merge("out")


def test_acceptance_08_a_quantised_run_merges_into_the_full_precision_base(tiny_wide):
    run = plan_for(tiny_wide, max_steps=2).lora(r=4, dropout=0).quantize("int4").fit()
    result = run.merge("out")
    assert result.max_difference < 1e-3 and result.trained_difference > result.max_difference
    base, merged = load_file(Path(tiny_wide) / "model.safetensors"), load_file("out/model.safetensors")
    adapter = load_file("run/adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    low = adapter[f"base_model.model.{name}.lora_B.weight"].float() @ adapter[f"base_model.model.{name}.lora_A.weight"].float()
    assert torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + 32 / 4 * low, atol=1e-6)


@pytest.mark.parametrize("option", [dict(dora=True), dict(rslora=True), dict(init="gaussian"), dict(init="pissa"), dict(init="olora"), dict(modules_to_save="lm_head")], ids=str)
def test_every_lora_option_trains_reloads_merges_and_knows_its_base(tmp_path, option):
    untied = save_tiny(tmp_path / "untied", extra=("<|im_start|>", "<|im_end|>"), tie=False)
    run = plan_for(untied, max_steps=4).lora(r=4, dropout=0, **option).fit()
    assert steps(run)[-1] < steps(run)[0]
    ids = torch.tensor([[5, 9, 300, 44, 61, 7]])
    with torch.no_grad():
        trained, again, base = run.model(ids).logits, load_trained("run")[0](ids).logits, load_base(untied)(ids).logits
    assert (trained - again).abs().max() < 1e-4 and (trained - base).abs().max() > 1e-3
    run.merge("out")
    with torch.no_grad(): assert (load_base("out")(ids).logits - trained).abs().max() < 1e-3
    from sftkit.session import _as_base
    with _as_base(run) as plain, torch.no_grad(): assert (plain.model(ids).logits - base).abs().max() < 1e-5


def test_merge_says_what_is_wrong(tiny):
    run = plan_for(tiny, max_steps=1).fit()
    with pytest.raises(RunError, match="whole model"): run.merge("out")
    assert not Path("out").exists()


def test_acceptance_30_the_command_line_launches_its_own_processes(tiny):
    Path("chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in CHAT[:45]))       # 45 rows: the last round is not full
    plan = lambda name, accumulation: plan_for(tiny, name, "chat.jsonl", batch_size=4, gradient_accumulation=accumulation, max_steps=-1, epochs=2)
    one = plan("one", 2).fit()
    env = environment(CUDA_VISIBLE_DEVICES="")
    two = plan("two", 1).options(distributed_backend="ddp")
    done = subprocess.run([sys.executable, "-m", "sftkit", "llm", *two.recipe.to_args()], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "2 processes" in done.stderr, done.stderr
    run = Run.open("two")
    assert run.state == "finished" and steps(run) == pytest.approx(steps(one), abs=1e-4) and steps(run, "tokens") == steps(one, "tokens")
    a, b = load_file("one/model.safetensors"), load_file("two/model.safetensors")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    with pytest.raises(RunError, match="sftkit llm"): plan("three", 1).options(gpus=2).fit()
    failed = subprocess.run([sys.executable, "-m", "sftkit", "llm", *two.recipe.replace(chat_template="chatlm", project_name="x").to_args()], capture_output=True, text=True, env=env)
    assert failed.returncode != 0 and failed.stderr.count("chatml") and "Traceback (most recent call last):\n  File" not in failed.stderr.split("error:")[0]


def test_the_table_of_parameters_is_complete_and_names_tests_that_exist():
    import re
    from parameters import ROOT, SHOWN_BY, table
    assert (ROOT / "docs" / "parameters.md").read_text() == table()
    names = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py")), re.M))
    for shown in SHOWN_BY.values(): assert shown in names or any(n.startswith(f"test_acceptance_{shown}_") for n in names), shown

"""Numbers: what the trainer computes against an independent computation, and what survives an interruption."""
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CHAT, TEXT
from safetensors.torch import load_file
from sftkit import Run, Session
from sftkit.events import EventLog, RunDirectory, this_process
from sftkit.model import load_base, load_trained
from sftkit.recipe import DataError, ModelError, RecipeError, RunError
from sftkit.engine import Engine, NonFiniteLoss, Recorder
from sftkit.training import Trainer
from running import chat_plan, environment, losses, nats_by_hand, real_rows, steps, until
from tiny import save_tiny, write_jsonl

def plan_for(model, source, project="run", **fields): return chat_plan(model, project, source, epochs=1, **fields)


def independent_loss(model_path, batches):
    "Mean cross-entropy of the trained tokens of `batches`, row by row without padding, of a freshly loaded model."
    return nats_by_hand(load_base(model_path).double(), real_rows(batches))[0]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("train_on", ["auto", "all"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_acceptance_16_logged_loss_is_the_masked_cross_entropy(tiny, accumulation, train_on, padding):
    plan = plan_for(tiny, CHAT, gradient_accumulation=accumulation, batch_size=3, train_on=train_on, padding=padding, max_steps=1)
    batches = [b for b, _ in zip(plan.batches(), range(accumulation))]
    assert len({int(n) for b in batches for n in b["attention_mask"].sum(1)}) > 1          # uneven lengths
    assert losses(plan.fit())[0] == pytest.approx(independent_loss(tiny, batches), abs=1e-4)


def test_acceptance_16_plain_text_and_other_architectures(tiny_gpt2):
    plan = Session(tiny_gpt2, project="run", gradient_accumulation=2, batch_size=4, max_steps=1).data(TEXT)
    assert losses(plan.fit())[0] == pytest.approx(independent_loss(tiny_gpt2, [b for b, _ in zip(plan.batches(), range(2))]), abs=1e-4)


def test_acceptance_12_the_batch_is_what_the_preview_shows(tiny, chat_file):
    plan = plan_for(tiny, chat_file, batch_size=5, padding="left")
    seen = 0
    for batch in plan.batches():
        for i, row in enumerate(batch["rows"].tolist()):
            encoded, real = plan.encode(CHAT[row]), batch["attention_mask"][i].bool()
            assert batch["input_ids"][i][real].tolist() == encoded["input_ids"]
            assert batch["labels"][i][real].tolist() == encoded["labels"]
            assert (batch["labels"][i][~real] == -100).all()
            seen += 1
    assert seen == len(CHAT)
    shown = plan.preview(n=1).text
    trained = plan._work.data.tokenizer.decode([t for t in plan.encode(CHAT[0])["labels"] if t != -100])
    assert trained == CHAT[0]["messages"][1]["content"] + "<|im_end|>"
    assert f"assistant        ● {trained}" in shown


def test_acceptance_15_padding_side_reaches_the_batch(tiny):
    left, right = (next(plan_for(tiny, CHAT, padding=side).batches()) for side in ("left", "right"))
    short = int(left["attention_mask"].sum(1).argmin())
    assert left["attention_mask"][short, 0] == 0 and left["attention_mask"][short, -1] == 1
    assert right["attention_mask"][short, 0] == 1 and right["attention_mask"][short, -1] == 0
    assert left["position_ids"][short][left["attention_mask"][short].bool()].tolist() == list(range(int(left["attention_mask"][short].sum())))


@pytest.mark.parametrize("lora", [False, True])
def test_acceptance_13_pad_that_is_eos_changes_nothing_of_the_training(tmp_path, lora):
    "A padding token that a model's configuration names has no gradient in its embedding; here it ends every turn, and is a token like any other."
    markers = ("<|system|>", "<|user|>", "<|assistant|>")
    save_tiny("named", extra=() if lora else markers, pad="</s>", tie=False)
    shutil.copytree("named", "unnamed")
    config = json.loads(Path("named/config.json").read_text())
    assert config["pad_token_id"] == config["eos_token_id"]
    Path("unnamed/config.json").write_text(json.dumps(config | dict(pad_token_id=None)))
    plans = [plan_for(name, CHAT, f"run-{name}", chat_template="zephyr", max_steps=3, batch_size=4, gradient_accumulation=1) for name in ("named", "unnamed")]
    named, unnamed = ((plan.lora(r=4, dropout=0, modules_to_save="embed_tokens") if lora else plan).fit() for plan in plans)
    for field in ("loss", "grad_norm"): assert steps(named, field) == steps(unnamed, field)
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    a, b = load_file(named.path/file), load_file(unnamed.path/file)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    before = load_base("unnamed").get_input_embeddings().weight[config["eos_token_id"]]
    after = next(t for n, t in a.items() if n.endswith("embed_tokens.weight"))[config["eos_token_id"]]
    assert (after - before).abs().max() > 1e-3


def test_acceptance_25_batch_1_times_32_is_batch_32(tiny):
    "However 32 rows are cut, the same rows make a step, the smaller last one of an epoch too."
    fields = dict(max_steps=4, warmup_ratio=0.0)
    rows = [*CHAT, *({"messages": [*row["messages"], {"role": "user", "content": f"once more {i}"}, {"role": "assistant", "content": "no " * i + "more"}]} for i, row in enumerate(CHAT[:28]))]
    one, *others = (plan_for(tiny, rows, f"{size}", batch_size=size, gradient_accumulation=32 // size, **fields).options(epochs=2).fit() for size in (32, 8, 1))
    assert len(losses(one)) == 4
    for run in others:
        assert losses(run) == pytest.approx(losses(one), abs=1e-4)
        a, b = load_file(one.path/"model.safetensors"), load_file(run.path/"model.safetensors")
        assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_acceptance_22_recomputing_activations_changes_nothing(tiny):
    runs = [plan_for(tiny, CHAT, f"r{i}", gradient_checkpointing=gc, max_steps=3).fit() for i, gc in enumerate([True, False, "auto"])]
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])


def test_acceptance_23_seed_decides_everything(tiny):
    plan = plan_for(tiny, CHAT, max_steps=4, batch_size=4, gradient_accumulation=1).lora(dropout=0.2)
    same, again, other = (plan.options(project_name=n, seed=s).fit() for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert losses(same) == losses(again) != losses(other)


def test_acceptance_06_lora_on_exactly_the_targets_and_base_untouched(tiny):
    plan = plan_for(tiny, CHAT, max_steps=3).lora(r=4, alpha=8, dropout=0.1, targets="q_proj, v_proj")
    run = plan.fit()
    adapted = {n.rsplit(".lora_A", 1)[0].rsplit(".", 1)[-1] for n, _ in run.model.named_parameters() if "lora_A" in n}
    config = run.model.peft_config["default"]
    assert adapted == {"q_proj", "v_proj"} and (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    base = load_file(f"{tiny}/model.safetensors")
    with_adapter = {k.replace(".base_layer", "").removeprefix("base_model.model."): v for k, v in run.model.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(base[k], with_adapter[k]) for k in base)
    event = next(e for e in run.events if e["kind"] == "plan")
    assert event["trainable_parameters"] == sum(p.numel() for n, p in run.model.named_parameters() if "lora_" in n) < event["total_parameters"]
    with pytest.raises(ModelError, match="q_prj.*Did you mean `q_proj`"): plan.lora(targets="q_prj").options(project_name="b").fit()


@pytest.mark.parametrize("bits,kind,dtype", [("int4", "Linear4bit", torch.uint8), ("int8", "Linear8bitLt", torch.int8)])
def test_acceptance_07_quantised_base_trains_on_cpu(tiny_wide, bits, kind, dtype):
    run = plan_for(tiny_wide, CHAT, batch_size=8, gradient_accumulation=1, valid_split=8).options(epochs=4).lora(r=8).quantize(bits).fit()
    layers = {n: m for n, m in run.model.named_modules() if type(m).__name__ == kind and type(m).__module__.startswith("bitsandbytes")}
    assert len(layers) == 2 * 7 and all(m.weight.dtype == dtype for m in layers.values())
    if bits == "int4": assert all(m.weight.quant_state.nested and m.weight.quant_type == "nf4" and m.compute_dtype == torch.float32 for m in layers.values())
    values = losses(run)
    assert sum(values[-3:]) < 0.9 * sum(values[:3])
    opened = Run.open("run")
    assert opened.generate("turn on light 3", max_new_tokens=8) == run.generate("turn on light 3", max_new_tokens=8)
    assert any(type(m).__name__ == kind for m in opened.model.modules())


def test_acceptance_07_quantised_without_adapter_is_refused():
    with pytest.raises(RecipeError, match="peft=True"): Session("nowhere", project="x").data("none.jsonl").quantize("int4").recipe


def test_int4_gradients_survive_an_evaluation_before_training(tiny_wide):
    """bitsandbytes repacks 4-bit layers at an eval-mode forward on some CPUs and then loses gradients; the adapter's gradients must be those of the dequantised model."""
    import bitsandbytes as bnb
    from sftkit.model import add_lora
    from sftkit.loss import token_loss_sum
    from sftkit.recipe import Recipe
    recipe = Recipe(model=tiny_wide, data_path="d", project_name="p", peft=True, lora_dropout=0.0, quantization="int4")
    batch = next(plan_for(tiny_wide, CHAT).batches())

    def gradients(model):
        torch.manual_seed(0)
        model = add_lora(model, recipe)
        for n, p in model.named_parameters():
            if "lora_B" in n: p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
            if "lora_A" in n: p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
        model.eval()
        with torch.no_grad(): token_loss_sum(model, batch)
        token_loss_sum(model.train(), batch).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    quantised, plain = load_base(tiny_wide, quantization="int4"), load_base(tiny_wide)
    for (_, q), (_, p) in zip(((n, m) for n, m in quantised.named_modules() if isinstance(m, bnb.nn.Linear4bit)),
                              ((n, m) for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n)):
        p.weight.data = bnb.functional.dequantize_4bit(q.weight.data, q.weight.quant_state).float()
    a, b = gradients(quantised), gradients(plain)
    assert max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in a) < 1e-4


def test_acceptance_05_the_split_that_is_named_is_trained_on(tiny, monkeypatch):
    "Of a folder, a hub id and a DatasetDict; in a plan, its script, its YAML and on the command line. Another one is evaluated."
    import datasets
    from sftkit.cli import main
    parts = dict(train=CHAT[:16], shouted=CHAT[16:32], validation=CHAT[32:40])
    Path("rows").mkdir()
    for name, rows in parts.items(): write_jsonl(f"rows/{name}.jsonl", rows)
    many = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **k: many)
    fields = dict(chat_template="chatml", lr=1e-2, max_steps=2, batch_size=4, gradient_accumulation=1)
    plan = lambda project, source, **more: Session(tiny, project=project, **fields).data(source, **more)
    kept = lambda run: (losses(run), [e["loss"] for e in run.events if e["kind"] == "eval"])
    expected = kept(plan("file", "rows/shouted.jsonl", eval=Path("rows/validation.jsonl")).fit())
    assert expected[1] and expected[0] != losses(plan("train", "rows").fit())
    for name, source in (("folder", "rows"), ("hub", "acme/rows"), ("dict", many)):
        named = plan(name, source, split="shouted", eval="validation")
        assert kept(named.fit()) == expected and named.recipe.train_split == "shouted"
    again = plan("again", "rows", split="shouted", eval="validation")
    again.to_yaml("again.yaml")
    assert kept(Session.from_yaml("again.yaml").fit()) == expected and "split='shouted'" in again.to_script()
    flags = [word for name, value in (fields | dict(model=tiny, data_path="rows", project_name="flags", train_split="shouted", valid_split="validation")).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["llm", *flags]) == 0 and kept(Run.open("flags")) == expected
    with pytest.raises(DataError, match="no split `shoutd`. Splits: train, validation, shouted.*Did you mean `shouted`"): plan("wrong", "rows", split="shoutd").fit()


def test_acceptance_19_validation_is_evaluated_and_shares_no_row(tiny, tmp_path):
    rows = CHAT + CHAT[:10]                                        # duplicates
    plan = plan_for(tiny, rows, valid_split=0.25, max_steps=2)
    data = plan._work.data
    content = lambda rows: {json.dumps(r.value) for r in rows}
    assert data.valid_rows and not content(data.train_rows) & content(data.valid_rows)
    run = plan.fit()
    last = [e for e in run.events if e["kind"] == "eval"][-1]
    from sftkit.data import collate
    batch = collate(data.valid.examples, data.tokenizer.pad_token_id)
    model, _ = load_trained("run")
    with torch.no_grad(): logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    truth = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100).item()
    assert last["loss"] == pytest.approx(truth, abs=1e-4) and last["perplexity"] == pytest.approx(math.exp(truth), rel=1e-3)
    file_run = plan_for(tiny, CHAT, "with-file", max_steps=1).options(valid_path=write_jsonl(tmp_path / "v.jsonl", CHAT[:5])).fit()
    assert any(e["kind"] == "eval" for e in file_run.events)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import conftest
from sftkit import Session, Run
plan = Session({model!r}, project={project!r}, chat_template="chatml", epochs=3, lr=1e-2, batch_size=4, gradient_accumulation=2, save_steps=2, valid_split=6).data({data!r})
print("ready", flush=True)
run = Run.open({project!r}).resume() if {resume} else plan.fit()
"""


def start(tiny, chat_file, project, resume=False):
    code = KILLED.format(tests=str(Path(__file__).parent), model=tiny, project=project, data=chat_file, resume=resume)
    return subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.DEVNULL)


def test_acceptance_24_killed_and_resumed_is_bit_identical(tiny, chat_file):
    "From outside, at no chosen moment, and resumed by a process that knows the folder alone; the moments, and adapters, are those of test_resume.py."
    whole = start(tiny, chat_file, "whole")
    for after_step in 3, 7:
        name = f"killed-after-{after_step}"
        killed, events = start(tiny, chat_file, name), Path(name, "events.jsonl")
        def reached():
            assert killed.poll() is None
            return f'"kind": "step", "step": {after_step}' in (events.read_text() if events.exists() else "")
        until(reached, 180, every=0.002)
        os.kill(Run.open(name).directory.status()["pid"], signal.SIGKILL); killed.wait()
        assert whole.wait(180) == 0
        run = Run.open(name)
        if run.state == "finished": pytest.fail("the run ended before it was killed; raise the number of steps")
        assert run.state == "died"
        assert start(tiny, chat_file, name, resume=True).wait(180) == 0
        assert run.state == "finished" and losses(run) == losses(Run.open("whole")) and len(losses(run)) == 18
        a, b = load_file("whole/model.safetensors"), load_file(f"{name}/model.safetensors")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert not list(Path(name).glob(".saving*"))


def test_interrupt_finishes_the_step_checkpoints_and_returns(tiny, chat_file, monkeypatch):
    """SIGINT arrives in mid-run; fit returns a Run; resumed it ends as if nothing had happened."""
    fields = dict(epochs=4, batch_size=4, gradient_accumulation=1, save_steps=100)
    plan = plan_for(tiny, chat_file, "cut").options(**fields)
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 5: os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)                # which a process in the background of a shell has not
    with monkeypatch.context() as during:
        during.setattr(Recorder, "on_step_begin", interrupt)
        run = plan.fit()
    assert run.state == "interrupted" and run.directory.checkpoints()[-1][0] == 6 and len(losses(run)) == 6
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert isinstance(run.generate("turn on", max_new_tokens=4), str)
    with pytest.raises(RunError, match="resume=True"): plan.fit()
    done = run.resume()
    whole = plan_for(tiny, chat_file, "whole").options(**fields).fit()
    assert done.state == "finished" and losses(done) == losses(whole)
    a, b = load_file("cut/model.safetensors"), load_file("whole/model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_acceptance_26_non_finite_loss_stops_names_rows_and_saves_nothing(tiny):
    plan = plan_for(tiny, CHAT, batch_size=4, gradient_accumulation=1, save_steps=1, warmup_ratio=0.0, max_grad_norm=0.0).options(lr=1e30)
    with pytest.raises(NonFiniteLoss, match=r"(?s)At step \d+ .*Rows of that step: row \d+, row \d+"): plan.fit()
    run = Run.open("run")
    assert run.state == "failed" and run.directory.status()["error"].startswith("At step")
    assert not Path("run/model.safetensors").exists()
    for _, checkpoint in run.directory.checkpoints():
        assert all(torch.isfinite(v).all() for v in load_file(checkpoint / "model.safetensors").values())


class Spoiling(Recorder):
    "Puts a value into the weights right after the update of a step, as an update that is too large does."
    step, value = 4, math.nan
    def on_optimizer_step(self, args, state, control, **kwargs):
        super().on_optimizer_step(args, state, control, **kwargs)
        if state.global_step + 1 == self.step:
            with torch.no_grad(): next(p for p in self.engine.model.parameters() if p.requires_grad).view(-1)[3] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("lora", [False, True])
def test_acceptance_26_the_last_update_is_looked_at_before_it_is_saved(tiny, monkeypatch, lora, value):
    monkeypatch.setattr("sftkit.engine.Recorder", type("Spoiled", (Spoiling,), {"value": value}))
    plan = plan_for(tiny, CHAT, batch_size=4, gradient_accumulation=1, max_steps=4, save_steps=2)
    batch = [b for b, _ in zip(plan.batches(), range(4))][-1]
    rows = ", ".join(f"row {i + 1}" for i in batch["rows"].tolist())
    with pytest.raises(NonFiniteLoss, match=f"After step 4 .*Rows of that step: {rows}\\. "): (plan.lora(r=4) if lora else plan).fit()
    run = Run.open("run")
    assert run.state == "failed" and [step for step, _ in run.directory.checkpoints()] == [2] and not list(Path("run").glob("*.safetensors"))


def test_acceptance_26_an_update_that_overflows(tiny):
    "Loss and gradient of the only step are finite; what weight decay at that learning rate makes of the weights is not."
    with pytest.raises(NonFiniteLoss, match="After step 1 "): plan_for(tiny, CHAT, max_steps=1, warmup_ratio=0.0, weight_decay=100.0).options(lr=1e37).fit()
    assert not list(Path("run").glob("*.safetensors")) and not list(Path("run").glob("checkpoint-*"))


def test_acceptance_26_the_result_is_looked_at_before_it_is_kept(tiny, monkeypatch):
    def spoil(self):
        with torch.no_grad(): next(self.model.parameters()).view(-1)[3] = math.nan
    monkeypatch.setattr(Engine, "load_best", spoil)
    with pytest.raises(NonFiniteLoss, match="After step 2 "): plan_for(tiny, CHAT, max_steps=2).fit()
    assert not list(Path("run").glob("*.safetensors"))


def test_an_evaluation_that_is_not_finite_is_never_the_best(tiny, monkeypatch):
    """The first evaluation overflows, and so does the third; the second is the best, also for a run that reads them from its record."""
    real = Engine.held_out_loss
    monkeypatch.setattr(Engine, "held_out_loss", lambda self: math.nan if self.state.global_step in (1, 3) else real(self) + self.state.global_step)
    plan = plan_for(tiny, CHAT, batch_size=4, gradient_accumulation=1, max_steps=9, valid_split=4, eval_steps=1, early_stopping_patience=3)
    def result(run):
        assert run.state == "finished" and [e["loss"] is None for e in run.events if e["kind"] == "eval"] == [True, False, True, False, False]
        return [e["step"] for e in run.events if e["kind"] == "result"]
    assert result(plan.fit()) == [2]
    cut = plan.options(project_name="cut")
    with monkeypatch.context() as during:
        def stop(self, args, state, control, **kwargs):
            if state.global_step == 2: self.engine.run.request("stop")
        during.setattr(Recorder, "on_step_begin", stop)
        assert cut.fit().state == "stopped"
    assert result(cut.options(resume=True).fit()) == [2]
    monkeypatch.setattr(Engine, "held_out_loss", lambda self: math.nan)
    never = plan.options(project_name="never").fit()
    assert never.state == "finished" and [e["step"] for e in never.events if e["kind"] == "result"] == [3]
    assert any("Stopped early at step 3: 3 evaluations and none had a finite loss" in e["text"] for e in never.events if e["kind"] == "note")


def test_acceptance_27_precision(tiny):
    from sftkit.model import compute_dtype
    cpu = torch.device("cpu")
    assert compute_dtype(None, cpu) == torch.float32
    with pytest.raises(ModelError, match="fp16.*needs an NVIDIA GPU.*'no'"): plan_for(tiny, CHAT, mixed_precision="fp16").fit()
    assert not Path("run").exists()
    run = plan_for(tiny, CHAT, max_steps=2).fit()
    assert {v.dtype for v in load_file("run/model.safetensors").values()} == {torch.float32}
    half = plan_for(tiny, CHAT, "half", max_steps=2, mixed_precision="bf16").fit()
    assert losses(half) == pytest.approx(losses(run), abs=0.05) and losses(half) != losses(run)
    assert next(e for e in half.events if e["kind"] == "plan")["dtype"] == "bfloat16"


def test_acceptance_28_flash_attention_falls_back_by_name(tiny):
    run = plan_for(tiny, CHAT, max_steps=1, use_flash_attention_2=True).fit()
    notes = [e["text"] for e in run.events if e["kind"] == "note"]
    assert any("flash-attn" in n and "scaled_dot_product_attention" in n for n in notes)
    assert losses(run) == losses(plan_for(tiny, CHAT, "plain", max_steps=1).fit())


def test_acceptance_10_own_preprocessing_reaches_the_batch(tiny_gpt2):
    class Instructed(Trainer):
        def preprocess(self, row): return {"text": f"### Instruction: {row['text']}\n### Response: "}
    base = Session(tiny_gpt2, project="run", max_steps=1).data(TEXT)
    mapped = base.map(lambda row: {"text": f"### Instruction: {row['text']}\n### Response: "})
    for plan in (base.trainer(Instructed), mapped):
        ids = next(plan.batches())["input_ids"][0]
        assert plan._work.data.tokenizer.decode(ids).startswith("### Instruction: Question: what is")
        assert plan.encode(TEXT[0])["text"].startswith("### Instruction: Question: what is 0?")
    with pytest.raises(RecipeError, match="Instructed"): base.trainer(type("Instructed", (Trainer,), {"__module__": "__main__"})).to_script()


def test_acceptance_11_markers_are_added_and_only_their_rows_trained(tiny_gpt2, tmp_path):
    from sftkit.model import load_base
    full = Session(tiny_gpt2, project="full", chat_template="chatml", max_steps=2, lr=1e-3).data(CHAT).fit()
    model, tokenizer = load_trained("full")
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == len(tokenizer) - 2 and model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    lora = Session(tiny_gpt2, project="lora", chat_template="chatml", max_steps=3, lr=1e-2).data(CHAT).lora(r=4).fit()
    before, after = load_base(tiny_gpt2).get_input_embeddings().weight, lora.model.get_base_model().transformer.wte
    merged = after.token_adapter.get_merged_weights(["default"])
    assert torch.equal(merged[:len(before)], before) and len(merged) == len(before) + 2
    start = after.token_adapter.base_layer.weight[len(before):]
    assert not torch.allclose(merged[len(before):], start, atol=1e-4)
    assert Run.open("lora").generate("turn on light 3", max_new_tokens=6) == lora.generate("turn on light 3", max_new_tokens=6)
    assert full.generate("turn on light 3", max_new_tokens=6) == Run.open("full").generate("turn on light 3", max_new_tokens=6)


def test_acceptance_14_lengths_are_cut_and_lost_answers_reported(tiny):
    long = {"messages": [{"role": "user", "content": "light " * 60}, {"role": "assistant", "content": "ok"}]}
    run = plan_for(tiny, CHAT + [long], max_seq_length=48, max_steps=1).fit()
    notes = " ".join(e["text"] for e in run.events if e["kind"] == "note")
    assert "longer than max_seq_length=48" in notes and "lose their whole answer" in notes and "row 49" in notes
    plan = plan_for(tiny, CHAT + [long], max_seq_length=48)
    assert max(b["input_ids"].shape[1] for b in plan.batches()) <= 48
    with pytest.raises(DataError, match="max_seq_length"): plan_for(tiny, [long], "x", max_seq_length=16).fit()
    assert not Path("x").joinpath("events.jsonl").exists()


def test_block_size_cuts_joined_text(tiny_gpt2):
    plan = Session(tiny_gpt2, project="run", block_size=16, max_steps=1).data(TEXT)
    batch = next(plan.batches())
    assert batch["input_ids"].shape[1] == 16 and (batch["labels"][:, 0] == -100).all()
    with pytest.raises(DataError, match="block_size"): next(Session(tiny_gpt2, project="r", block_size=16).data(CHAT).batches())


def test_a_finished_run_is_kept_when_its_name_is_used_again(tiny, chat_file):
    first = plan_for(tiny, chat_file, max_steps=1).fit()
    second = plan_for(tiny, chat_file, max_steps=2).fit()
    assert len(losses(second)) == 2 and len(losses(Run.open("run.1"))) == 1
    Path("mine").mkdir(); Path("mine/notes.txt").write_text("x")
    with pytest.raises(RunError, match="holds other files"): plan_for(tiny, chat_file, "mine").fit()
    assert first.path.name == "run.1" and second.path.name == "run" and len(losses(first)) == 1       # each stays itself


def test_requests_from_outside(tiny, chat_file):
    """A watcher asks the running process to write a checkpoint, to pause, to go on, and to stop."""
    import threading
    plan, seen = plan_for(tiny, chat_file).options(epochs=500, batch_size=4, gradient_accumulation=1, save_steps=10**6), []

    def watcher():
        directory = RunDirectory("run")
        until(lambda: directory.status().get("state") == "training")
        directory.request("checkpoint"); until(lambda: directory.checkpoints())
        directory.request("pause"); until(lambda: directory.status()["state"] == "paused")
        at = len(directory.events()); time.sleep(0.3); seen.append(len(directory.events()) == at)
        directory.request("resume"); until(lambda: directory.status()["state"] == "training" and len(directory.events()) > at + 5)
        directory.request("stop")
    thread = threading.Thread(target=watcher); thread.start()
    run = plan.fit(); thread.join()
    assert run.state == "stopped" and seen == [True] and len(run.directory.checkpoints()) == 2


def test_each_evaluation_is_made_once_and_its_time_is_not_the_next_steps(tiny, chat_file, monkeypatch):
    slow = Engine.held_out_loss
    monkeypatch.setattr(Engine, "held_out_loss", lambda self: (time.sleep(0.5), slow(self))[1])
    run = plan_for(tiny, chat_file, valid_split=4, batch_size=11, gradient_accumulation=1, eval_steps=2).fit()                # the last of 4 steps is also the end of the epoch
    assert [e["step"] for e in run.events if e["kind"] == "eval"] == [2, 4] and run.history.seconds[2] < 0.4


def fit_with_requests(plan, *requests):
    "Train; `requests`, lists of names, are each made at once: the first when the first step begins, the others while the run is paused."
    directory, left = RunDirectory(plan.recipe.project_name), list(requests)
    class Asking(Recorder):
        def on_step_begin(self, args, state, control, **kwargs):
            if left and state.global_step == 0: [directory.request(name) for name in left.pop(0)]
        def _asked(self):
            if left and directory.status()["state"] == "paused": [directory.request(name) for name in left.pop(0)]
            return super()._asked()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sftkit.engine.Recorder", Asking)
        return plan.fit()


def kinds(run, *names): return [e["state"] if e["kind"] == "state" else e["kind"] for e in run.events if e["kind"] in names]


def test_requests_made_within_one_step_are_all_carried_out(tiny, chat_file):
    plan = plan_for(tiny, chat_file, valid_split=4, max_steps=6, batch_size=4, gradient_accumulation=1, save_steps=10**6, eval_steps=10**6)
    run = fit_with_requests(plan, ["checkpoint", "evaluate", "stop", "resume"])
    assert run.state == "stopped" and len(losses(run)) == 1 and kinds(run, "eval", "checkpoint") == ["eval", "checkpoint"]
    run = fit_with_requests(plan.options(project_name="b"), ["evaluate", "stop", "pause", "checkpoint"])                      # stop wins
    assert run.state == "stopped" and "paused" not in kinds(run, "state") and kinds(run, "eval", "checkpoint") == ["eval", "checkpoint"]
    run = fit_with_requests(plan.options(project_name="c"), ["pause", "evaluate"], ["checkpoint"], ["stop", "resume"])         # what is asked in a pause is kept
    assert run.state == "stopped" and "paused" in kinds(run, "state") and kinds(run, "eval", "checkpoint") == ["eval", "checkpoint"] and len(losses(run)) == 1
    run = fit_with_requests(plan.options(project_name="d"), ["pause", "resume", "checkpoint"])                                 # of the two, the later counts
    assert run.state == "finished" and "paused" not in kinds(run, "state") and [e["step"] for e in run.events if e["kind"] == "checkpoint"][0] == 1
    run = fit_with_requests(plan.options(project_name="e"), ["resume", "pause"], ["resume"])
    assert run.state == "finished" and "paused" in kinds(run, "state") and len(losses(run)) == 6


def test_requests_of_many_processes_at_once_are_none_lost_and_a_resumed_run_is_not_stopped_by_an_old_one(tiny, chat_file):
    plan = plan_for(tiny, chat_file, max_steps=3, batch_size=4, gradient_accumulation=1)
    run = fit_with_requests(plan, ["stop"])
    directory = run.directory
    with contextlib.closing(EventLog(directory.events_path)) as log:
        log.append("state", state="training", step=1, **this_process())
        ask = "import sys; from sftkit.events import RunDirectory; run = RunDirectory('run'); [run.request('checkpoint') for i in range(50)]"
        asking, got = [subprocess.Popen([sys.executable, "-c", ask], env=environment()) for _ in range(3)], []
        while any(p.poll() is None for p in asking): got += directory.take_requests()
        got += directory.take_requests()
        assert got == ["checkpoint"] * 150 and directory.take_requests() == []
        directory.request("stop")
        log.append("state", state="stopped", step=1, **this_process())
    resumed = plan.options(resume=True).fit()
    assert resumed.state == "finished" and len(losses(resumed)) == 3


QUIET = """
import importlib.util, sys
import sftkit.engine
from sftkit import Run, Session
class Stopping(sftkit.engine.Recorder):
    def on_step_begin(self, args, state, control, **kwargs):
        if self.engine.run.path.name.startswith("stopped") and state.global_step == 1: self.engine.run.request("stop")
sftkit.engine.Recorder = Stopping
tiny, wide, gpt2 = sys.argv[1:]
def plan(project, model=tiny, **fields): return Session(model, project=project, chat_template="chatml", max_steps=4, batch_size=4, gradient_accumulation=1, **fields).data("chat.jsonl", eval=4)
for project, lora in ("stopped-full", False), ("stopped-lora", True):
    run = plan(project, peft=lora).fit()
    assert run.state == "stopped"
    assert Run.open(project).resume().state == "finished"
plan("best", eval_steps=1, early_stopping_patience=1, early_stopping_threshold=9.0, use_enhanced_eval=True, eval_max_new_tokens=4).fit()
plan("int4", wide).lora(merge=True).quantize("int4").fit().generate("turn on light 1", max_new_tokens=4)
plan("packed", packing=True, max_seq_length=128).fit().report()
plan("padded", gpt2, packing=True, max_seq_length=128).lora().fit().versus_base(["turn on light 1"], max_new_tokens=4)
plan("taught").distill(tiny).fit()
if importlib.util.find_spec("wandb") and importlib.util.find_spec("tensorboard"):
    tracked = (plan("stopped-tracked", wide, eval_steps=1, early_stopping_patience=1, early_stopping_threshold=9.0, eval_max_new_tokens=4)
               .lora().quantize("int4").metrics("bleu,rouge", save_predictions=True).log("wandb,tensorboard"))
    assert tracked.fit().state == "stopped" and Run.open("stopped-tracked").resume().state == "finished"
    assert [e for e in Run.open("stopped-tracked").events if "wandb keeps this run" in e.get("text", "")]
"""


def test_acceptance_33_runs_and_resumes_say_nothing_but_their_own_lines(tiny, tiny_wide, tiny_gpt2, chat_file):
    """As in a terminal: in a process of its own, since pytest keeps warnings to itself."""
    done = subprocess.run([sys.executable, "-c", QUIET, tiny, tiny_wide, tiny_gpt2], capture_output=True, text=True, env=environment("WANDB", WANDB_MODE="offline"))
    assert (done.returncode, done.stderr) == (0, "")
    own = ("starting ", "training ", "stopped ", "finished ", "note: Stopped early at step", "note: wandb keeps this run in", "warning: `quantization='int4'` on a CPU saves memory")
    assert all(line.startswith(own) for line in done.stdout.splitlines()), done.stdout


def test_a_checkpoint_that_does_not_fit_stops_the_run(tiny, chat_file):
    from safetensors.torch import save_file
    plan = plan_for(tiny, chat_file, max_steps=3, batch_size=4, gradient_accumulation=1)
    run = fit_with_requests(plan, ["stop"])
    weights = run.directory.checkpoints()[-1][1]/"model.safetensors"
    tensors = load_file(weights); lost = sorted(tensors)[-1]; del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RunError, match=f"does not fit the model.*{lost}"): plan.options(resume=True).fit()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_acceptance_16_two_processes_have_the_loss_of_one(tiny, chat_file, accumulation):
    """torchrun with two processes against one process that cuts the same number of rows otherwise: the same rows in each step, the same losses and weights."""
    fields = dict(epochs=2, save_steps=3, valid_split=8)
    one = plan_for(tiny, chat_file, "one", batch_size=8, gradient_accumulation=accumulation).options(**fields).fit()
    args = plan_for(tiny, chat_file, "two", batch_size=4, gradient_accumulation=accumulation).options(**fields).recipe.to_args()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "sftkit", "llm", *args],
                          capture_output=True, text=True, env=environment(CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stdout + done.stderr
    two = Run.open("two")
    assert two.state == "finished" and losses(two) == pytest.approx(losses(one), abs=1e-4) and len(losses(two)) > 3
    evals = lambda run: [e["loss"] for e in run.events if e["kind"] == "eval"]
    assert evals(two) == pytest.approx(evals(one), abs=1e-4)
    a, b = load_file("one/model.safetensors"), load_file("two/model.safetensors")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    failed = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "sftkit", "llm",
                             *plan_for(tiny, chat_file, tiny).recipe.to_args()], capture_output=True, text=True, timeout=120,
                            env=environment(CUDA_VISIBLE_DEVICES=""))
    assert failed.returncode != 0 and "holds other files" in failed.stderr


CALLS = """{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
SCORED = dict(max_steps=2, batch_size=4, gradient_accumulation=1, eval_steps=1, eval_max_new_tokens=4, use_enhanced_eval=True, eval_metrics="perplexity,exact_match", eval_save_predictions=True)


def scored(run): return json.loads("[" + ",".join((run.path / "predictions.jsonl").read_text().splitlines()) + "]")
def notes(run): return [e["text"] for e in run.events if e["kind"] == "note"]


def test_blank_answers_are_listed_and_neither_sampled_nor_scored(tiny):
    rows = [{"question": f"what is {i}", "answer": "" if i in (0, 2, 5) else f"it is {i}"} for i in range(12)]
    run = Session(tiny, project="run", chat_template="chatml", **SCORED).data(rows, eval=rows[:6]).fit()
    assert run.state == "finished" and [s["prompt"] for s in run.events if s["kind"] == "sample" and s["when"] == "before"] == ["what is 1", "what is 3", "what is 4"]
    assert [p["reference"] for p in scored(run)] == ["it is 1", "it is 3", "it is 4"] and all("exact_match" in e for e in run.events if e["kind"] == "eval")
    assert sum("validation rows have nothing to train on" in n for n in notes(run)) == 1 and not any("no answer in words" in n for n in notes(run))
    assert len(run.evaluate(max_new_tokens=4)["predictions"]) == 3
    unheld = Session(tiny, project="unheld", chat_template="chatml", max_steps=1).data(rows).fit()
    assert [s["prompt"] for s in unheld.events if s["kind"] == "sample" and s["when"] == "after"] == ["what is 1", "what is 3", "what is 4"]


def test_an_answer_that_is_a_tool_call_counts_for_perplexity_alone(tiny):
    ask = lambda i: {"role": "user", "content": f"light {i}"}
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "light", "arguments": {"on": True}}}]}
    rows = [{"messages": [ask(i), call if i % 2 else {"role": "assistant", "content": f"light {i} is on"}]} for i in range(8)]
    run = Session(tiny, project="run", chat_template=CALLS, **SCORED).data(rows, eval=rows[:5]).fit()
    assert run.state == "finished" and [p["reference"] for p in scored(run)] == [f"light {i} is on" for i in (0, 2, 4)]
    assert [n for n in notes(run) if "no answer in words" in n] == ["2 of 5 validation rows have no answer in words to compare with, or a question that leaves no room for one, and count for loss and perplexity alone: row 2, row 4."]
    again = Run.open("run").evaluate(max_new_tokens=4)
    assert len(again["predictions"]) == 3 and again["loss"] == pytest.approx([e for e in run.events if e["kind"] == "scores"][0]["loss"], rel=1e-4)
    calls = Session(tiny, project="calls", chat_template=CALLS, **SCORED).data(rows, eval=[rows[1], rows[3]]).fit()
    assert calls.state == "finished" and "perplexity" in [e for e in calls.events if e["kind"] == "scores"][0] and not (calls.path / "predictions.jsonl").exists()
    assert len([e for e in calls.events if e["kind"] == "sample" and e["when"] == "before"]) == 2


def test_a_question_that_leaves_no_room_for_an_answer_is_not_asked(tiny_gpt2):
    "The first answer of a long conversation is trained, the last one lies beyond what the model reads."
    turns = lambda *texts: {"messages": [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts)]}
    rows = [turns("hello", "world", "light " * 700, "on"), *(turns(f"light {i}", f"on {i}") for i in range(5))]
    run = Session(tiny_gpt2, project="run", chat_template="chatml", max_seq_length=512, **SCORED).data(rows, eval=rows[:3]).fit()
    assert run.state == "finished" and len(scored(run)) == 2 and len([e for e in run.events if e["kind"] == "sample" and e["when"] == "before"]) == 2


def test_a_pair_without_a_prompt_is_not_asked(tiny_gpt2, tmp_path):
    rows = [{"prompt": "" if i < 2 else f"what is {i}", "completion": f" it is {i}"} for i in range(10)]
    from tiny import save_tiny
    run = Session(save_tiny(tmp_path / "m", bos=None), project="run", **SCORED).data(rows, eval=rows[:4]).fit()
    assert run.state == "finished" and [p["reference"] for p in scored(run)] == [" it is 2", " it is 3"]


def test_predictions_are_saved_whatever_the_metrics(tiny):
    run = Session(tiny, project="run", chat_template="chatml", **{**SCORED, "eval_metrics": "perplexity"}).data(CHAT, eval=3).fit()
    assert len(scored(run)) == 3 and not any("exact_match" in e for e in run.events if e["kind"] == "eval")


def test_encode_takes_rows_that_become_one(tiny):
    data = lambda fn: type("Own", (Trainer,), {"preprocess": lambda self, row: fn(row)})(Session(tiny, project="p", chat_template="chatml").data("chat.jsonl").recipe).data
    write_jsonl("chat.jsonl", CHAT)
    assert data(lambda row: row).encode(CHAT[0])["input_ids"]
    several = data(lambda row: [row, row])
    with pytest.raises(DataError, match="becomes 2 rows"): several.encode(CHAT[0])
    one = data(lambda row: None if row == CHAT[0] else row)
    with pytest.raises(DataError, match="leaves this row out"): one.encode(CHAT[0])

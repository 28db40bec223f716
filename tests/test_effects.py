"""Each setting does what its name says: the effect is looked at, not only that a run with it ends."""
import json
import math

import pytest
import torch
from conftest import CHAT
from running import chat_plan, losses, steps
from sftkit.engine import Engine, Recorder
from sftkit.loss import distillation_sums, flat_batch, use_flat_attention
from sftkit.model import decoder_layers, load_base
from tiny import save_tiny
import sftkit.engine as engine
import sftkit.training as training


def plan_for(model, project="run", eval=None, **fields): return chat_plan(model, project, CHAT, eval, **{**dict(max_steps=6, batch_size=4, gradient_accumulation=1), **fields})


# -- early stopping and checkpoints ------------------------------------------------------------------------------------------------

FALLING = [3.0, 2.95, 2.9, 2.85, 2.8, 2.75]


@pytest.mark.parametrize("threshold,last,best", [(0.0, 6, 6), (0.08, 6, 6), (0.2, 3, 3)])
def test_acceptance_20_only_a_fall_beyond_the_threshold_is_an_improvement(tiny, monkeypatch, threshold, last, best):
    "The threshold decides how long training goes on; the weights that are kept are the best there were."
    monkeypatch.setattr(Engine, "held_out_loss", lambda self: FALLING[self.state.global_step - 1])
    run = plan_for(tiny, eval=4, eval_steps=1, early_stopping_patience=2, early_stopping_threshold=threshold).fit()
    assert len(losses(run)) == last and [e["step"] for e in run.events if e["kind"] == "result"] == [best]


@pytest.mark.parametrize("limit,left", [(None, [1, 2, 3, 4, 5, 6]), (1, [6]), (2, [5, 6]), (4, [3, 4, 5, 6])])
def test_save_total_limit_leaves_the_last_checkpoints(tiny, limit, left):
    run = plan_for(tiny, save_steps=1, save_total_limit=limit).fit()
    assert [step for step, _ in run.directory.checkpoints()] == left and [e["step"] for e in run.events if e["kind"] == "checkpoint"] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in run.path.glob("*checkpoint*")) == sorted(f"checkpoint-{step}" for step in left) and not list(run.path.glob(".*"))


@pytest.mark.parametrize("limit,left", [(1, [2, 6]), (3, [2, 4, 5, 6]), (5, [2, 3, 4, 5, 6])])
def test_save_total_limit_keeps_the_best_checkpoint_besides(tiny, monkeypatch, limit, left):
    monkeypatch.setattr(Engine, "held_out_loss", lambda self: abs(self.state.global_step - 2))
    run = plan_for(tiny, eval=4, eval_steps=1, save_steps=1, save_total_limit=limit, early_stopping_patience=9).fit()
    assert [step for step, _ in run.directory.checkpoints()] == left


def test_a_resumed_run_evaluates_and_saves_as_often_as_it_is_told_now(tiny, caplog):
    from sftkit import Run
    first = plan_for(tiny, eval=4, eval_steps=1, save_steps=3, max_steps=9)
    asked = []
    def stop(self, state, control, real=Recorder._obey):
        if state.global_step == 4 and not asked: asked.append(1); self.engine.run.request("stop")
        real(self, state, control)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "_obey", stop)
        assert first.fit().state == "stopped"
    run = first.fit(eval_steps=4, save_steps=2, save_total_limit=None, resume=True)
    assert [e["step"] for e in run.events if e["kind"] == "eval"] == [1, 2, 3, 4, 8, 9]
    assert [e["step"] for e in run.events if e["kind"] == "checkpoint" and e["step"] > 4] == [6, 8, 9]
    assert not caplog.records


def test_an_interrupt_of_the_last_evaluation_costs_no_result(tiny, monkeypatch):
    import sftkit.engine as engine
    real = Engine.scores
    def interrupted(self, rows=None):
        if rows is None: raise KeyboardInterrupt
        return real(self, rows)
    monkeypatch.setattr(Engine, "scores", interrupted)
    run = plan_for(tiny, eval=4, use_enhanced_eval=True, eval_metrics="exact_match", eval_max_new_tokens=4).fit()
    assert run.state == "finished" and (run.path/"model.safetensors").exists()
    assert any("interrupted" in e["text"] for e in run.events if e["kind"] == "note")
    assert run.evaluate(CHAT[:2], metrics="perplexity")["trained_tokens"] > 0


def test_a_metric_that_fails_is_told_before_anything_loads(tiny, monkeypatch, tmp_path):
    from sftkit.recipe import DataError
    (tmp_path/"my_metric.py").write_text("def share(predictions, references): return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(training, "load_for_training", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match="`share` failed on 4 predictions: ZeroDivisionError"):
        plan_for(tiny, eval=4, use_enhanced_eval=True, eval_metrics="my_metric:share").fit()


def test_answers_end_where_any_of_the_rows_ends(tiny):
    "Rows that are cut say nothing of the token that ends a turn, however many of them come first."
    cut = [{"messages": [{"role": "user", "content": "light"}, {"role": "assistant", "content": "on " * 60}]}] * 40
    data = chat_plan(tiny, "run", cut + CHAT[:3], max_seq_length=40)._work.data
    assert data.stop_ids == [data.tokenizer.eos_token_id, data.tokenizer.convert_tokens_to_ids("<|im_end|>")]


# -- recomputing, order, rate ------------------------------------------------------------------------------------------------------

def test_acceptance_22_activations_are_recomputed_where_it_is_asked_for(tiny, monkeypatch):
    real, calls = training.load_for_training, []
    def load(*args):
        model = real(*args)
        decoder_layers(model)[0].self_attn.register_forward_pre_hook(lambda layer, given: calls.append(1) if layer.training else None)
        return model
    monkeypatch.setattr(training, "load_for_training", load)
    def trained(setting):
        calls.clear()
        run = plan_for(tiny, str(setting), gradient_checkpointing=setting, gradient_accumulation=2, max_steps=3).fit()
        return losses(run), len(calls), next(e["recompute"] for e in run.events if e["kind"] == "plan")
    (on, twice, _), (off, once, _), (auto, either, decided) = trained(True), trained(False), trained("auto")
    assert (once, twice) == (3 * 2, 3 * 2 * 2) and on == off == auto and either == (twice if decided else once)


def test_acceptance_23_the_seed_decides_on_the_order_of_rows(tiny, monkeypatch):
    seen, real = [], Engine.training_step
    monkeypatch.setattr(Engine, "training_step", lambda self, model, inputs, *args: (seen.append(inputs["rows"].tolist()), real(self, model, inputs, *args))[1])
    def trained(project, seed):
        seen.clear()
        plan = plan_for(tiny, project, seed=seed, max_steps=-1, epochs=2)
        plan.fit()
        assert seen[:len(seen) // 2] == [b["rows"].tolist() for b in plan.batches()]
        return list(seen)
    same, again, other = trained("a", 1), trained("b", 1), trained("c", 2)
    epochs = same[:len(same) // 2], same[len(same) // 2:]
    assert same == again != other and epochs[0] != epochs[1]
    for order in (*epochs, other[:len(other) // 2]): assert sorted(sum(order, [])) == list(range(len(CHAT)))


RATES = dict( # share of `lr` at update k of n, of which w warm up; k from 0
    linear=lambda k, n, w: (n - k) / (n - w), cosine=lambda k, n, w: (1 + math.cos(math.pi * (k - w) / (n - w))) / 2, cosine_with_restarts=lambda k, n, w: (1 + math.cos(math.pi * (k - w) / (n - w))) / 2,
    polynomial=lambda k, n, w: (1 - 1e-7 / 1e-2) * (1 - (k - w) / (n - w)) + 1e-7 / 1e-2, constant=lambda k, n, w: 1, constant_with_warmup=lambda k, n, w: 1, inverse_sqrt=lambda k, n, w: math.sqrt(w / k))


@pytest.mark.parametrize("scheduler", RATES)
def test_each_step_has_the_learning_rate_of_the_formula(tiny, scheduler):
    """Seven updates, ceil(0.4 * 7) = 3 of them to warm up, in equal parts from 0; the rate on record is the one that the update was made with."""
    rates = steps(plan_for(tiny, scheduler=scheduler, max_steps=7, warmup_ratio=0.4).fit(), "lr")
    assert rates == pytest.approx([1e-2 * (k / 3 if k < 3 and scheduler != "constant" else RATES[scheduler](k, 7, 3)) for k in range(7)])


def test_the_learning_rate_on_record_is_the_one_used(tiny):
    "Plain gradient descent without momentum: a step moves the weights by rate times norm of the clipped gradient."
    moved, before = [], {}
    class Measuring(Recorder):
        def on_pre_optimizer_step(self, *args, **kwargs):
            before.update({n: p.detach().clone() for n, p in self.engine.model.named_parameters()})
            return super().on_pre_optimizer_step(*args, **kwargs)
        def on_optimizer_step(self, *args, **kwargs):
            moved.append(math.sqrt(sum(float((p.detach() - before[n]).square().sum()) for n, p in self.engine.model.named_parameters())))
            return super().on_optimizer_step(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Recorder", Measuring)
        run = plan_for(tiny, optimizer="sgd", lr=1.0, max_grad_norm=0.01, warmup_ratio=0.5).fit()
    assert moved == pytest.approx([0.01 * rate for rate in steps(run, "lr")], rel=1e-3, abs=1e-7) and len({round(m, 5) for m in moved}) == 4      # up in 3, down in 3


def optimizers():
    from transformers.optimization import Adafactor
    import bitsandbytes as bnb
    return dict(adamw_torch=(torch.optim.AdamW, dict(fused=True)), adamw_torch_fused=(torch.optim.AdamW, dict(fused=True)), adafactor=(Adafactor, {}), sgd=(torch.optim.SGD, {}),
                adamw_bnb_8bit=(bnb.optim.AdamW, dict(optim_bits=8, is_paged=False)), paged_adamw_8bit=(bnb.optim.AdamW, dict(optim_bits=8, is_paged=True)),
                paged_adamw_32bit=(bnb.optim.AdamW, dict(optim_bits=32, is_paged=True)), lion_8bit=(bnb.optim.Lion, dict(optim_bits=8, is_paged=False)))


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_the_optimizer_is_the_one_that_is_named(tiny, monkeypatch, name):
    used = []
    def look(self, args, state, control, **kwargs):
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        settings = inner.args if hasattr(inner, "args") else None
        used.append((type(inner), {"fused": inner.defaults.get("fused"), "optim_bits": getattr(settings, "optim_bits", None), "is_paged": getattr(inner, "is_paged", None)}))
    monkeypatch.setattr(Recorder, "on_step_begin", look)
    plan_for(tiny, optimizer=name, max_steps=1).fit()
    (kind, has), (meant, settings) = used[0], optimizers()[name]
    assert kind is meant and {k: has[k] for k in settings} == settings


# -- evaluation --------------------------------------------------------------------------------------------------------------------

def test_eval_samples_and_eval_batch_size_are_what_an_evaluation_takes(tiny, monkeypatch):
    answered, batches, evaluate, score = [], [], engine.evaluate, engine.mean_token_loss
    monkeypatch.setattr(engine, "evaluate", lambda model, tokenizer, rows, encoder, metrics, size, *args: (answered.append((len(rows), size)), evaluate(model, tokenizer, rows, encoder, metrics, size, *args))[1])
    monkeypatch.setattr(engine, "mean_token_loss", lambda model, given: score(model, (batches.append(len(b["cu_seq_lens"]) - 1) or b for b in given)))
    fields = dict(max_steps=2, eval_steps=1, use_enhanced_eval=True, eval_metrics="exact_match", eval_max_new_tokens=2)
    plan_for(tiny, "a", eval=7, eval_samples=2, eval_batch_size=3, **fields).fit()
    assert answered == [(2, 2), (2, 2), (7, 3)] and batches == [3, 3, 1] * 3                     # two evaluations, and the final scores of all rows
    answered.clear(); batches.clear()
    plan_for(tiny, "b", eval=7, **fields).fit()
    assert answered == [(7, 4)] * 3 and batches == [4, 3] * 3                                    # as many rows at a time as in training


# -- distillation ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    "A teacher whose configuration asks for much dropout."
    folder = tmp_path_factory.mktemp("dropping")/"t"
    save_tiny(folder, extra=("<|im_start|>", "<|im_end|>"), cls="gpt2", seed=3)
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(config | dict(resid_pdrop=0.5, embd_pdrop=0.5)))
    return str(folder)


def nats(logits, others, T):
    p, q = (others.double() / T).log_softmax(-1), (logits.double() / T).log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def test_acceptance_17_the_teacher_drops_nothing_and_learns_nothing(tiny, dropping, monkeypatch):
    teachers, modes, real, step = [], [], training.load_teacher, Engine.compute_loss
    monkeypatch.setattr(training, "load_teacher", lambda *args: (teachers.append(real(*args)), teachers[-1])[1])
    monkeypatch.setattr(Engine, "compute_loss", lambda self, *a, **k: (modes.append([m.training for m in self.teacher.modules()]), step(self, *a, **k))[1])
    plan = plan_for(tiny, max_steps=3, weight_decay=0.1, eval=4, eval_steps=1).distill(dropping, temperature=2.0)
    first, again = plan.fit(), plan.options(project_name="again").fit()
    assert steps(first, "kl") == steps(again, "kl") and not any(map(any, modes)) and len(modes) == 6
    student, teacher, total, count = load_base(tiny), load_base(dropping).eval(), 0.0, 0
    batch = next(plan.batches())
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]):
        with torch.no_grad(): zs, zt = student(ids[mask][None]).logits[0], teacher(ids[mask][None]).logits[0]
        for i in (labels[mask][1:] != -100).nonzero()[:, 0].tolist(): total, count = total + nats(zs[i], zt[i], 2.0), count + 1
    assert steps(first, "kl")[0] == pytest.approx(total / count, abs=1e-4)
    fresh = load_base(dropping).state_dict()
    for used in teachers:
        assert not any(p.requires_grad or p.grad is not None for p in used.parameters())
        assert all(torch.equal(v, fresh[k]) for k, v in used.state_dict().items())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("flat", [False, True])
def test_acceptance_17_a_batch_of_unlike_rows_is_the_sum_of_its_rows(tiny, dropping, side, flat):
    batch = next(plan_for(tiny, batch_size=8, padding=side).batches())
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2
    student, teacher = load_base(tiny), load_base(dropping).eval()
    def sums(batch):
        student.zero_grad()
        ce, kl = distillation_sums(student, batch, teacher, 2.0)
        (0.3 * ce + 0.7 * kl).backward()
        return float(ce), float(kl), student.get_input_embeddings().weight.grad.clone()
    rows = []
    for i, mask in enumerate(batch["attention_mask"].bool()):
        rows.append(sums({k: batch[k][i:i + 1, mask] for k in ("input_ids", "labels", "attention_mask", "position_ids")}))
    if flat:
        ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
        assert [use_flat_attention(m, ids) for m in (student, teacher)] == [None, None]
    ce, kl, gradient = sums(flat_batch(batch) if flat else batch)
    assert ce == pytest.approx(sum(r[0] for r in rows), rel=1e-5) and kl == pytest.approx(sum(r[1] for r in rows), rel=1e-4) and kl > 0.1
    assert torch.allclose(gradient, sum(r[2] for r in rows), atol=1e-4)


@pytest.mark.parametrize("more, asked", [(dict(max_steps=4, eval_steps=2), ["before", 2, 4]), (dict(max_steps=3, eval_steps=2), ["before", 2, "after"])], ids=["evaluated at the last step", "trained on after it"])
def test_prompts_are_answered_once_by_the_same_weights(tiny, monkeypatch, more, asked):
    "Answering takes as long as many steps; the answers after training are those of an evaluation at its last step."
    from sftkit import engine
    count, generate = [], engine.generate
    monkeypatch.setattr(engine, "generate", lambda *a, **k: count.append(1) or generate(*a, **k))
    run = plan_for(tiny, eval=3, **more).fit()
    samples = {when: [e["text"] for e in run.events if e["kind"] == "sample" and e["when"] == when] for when in ("before", 2, more["max_steps"], "after")}
    assert len(count) == len(asked) and len(samples["after"]) == 3
    monkeypatch.undo()
    after = [e for e in run.events if e["kind"] == "sample" and e["when"] == "after"]
    room = 8 + max(len(run.tokenizer(e["reference"])["input_ids"]) for e in after)
    assert 8 < room < 64 and samples["after"] == [run.generate(e["prompt"], max_new_tokens=room, cut=" …") for e in after]


@pytest.mark.parametrize("fields, fused", [({}, True), (dict(mixed_precision="fp16"), False), (dict(distributed_backend="fsdp"), False), (dict(mixed_precision="fp16", optimizer="adamw_torch_fused"), True)], ids=str)
def test_adamw_is_fused_where_weights_are_whole_and_no_step_is_skipped(fields, fused):
    from sftkit.memory import optimizer_name
    from sftkit.recipe import Recipe
    r = Recipe(model="m", data_path="d", project_name="p", **fields)
    assert optimizer_name(r, dict(fp16=torch.float16).get(r.mixed_precision, torch.float32)) == ("adamw_torch_fused" if fused else "adamw_torch")

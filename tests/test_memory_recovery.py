"""Running out of memory: the step begins again in smaller pieces, and the losses, gradients and weights are those of a run that never ran out. A pass over too many tokens fails here in the
middle of its backward pass, after the upper layers have their gradients, which is the worst moment."""
import pytest
import torch
from conftest import CHAT
from running import losses, steps
from safetensors.torch import load_file
from sftkit import Session
from sftkit.model import decoder_layers, load_base
from sftkit.loss import flat_batch, plain_attention, split_batch, token_loss_sum, use_flat_attention
from sftkit.recipe import ModelError
from sftkit.charts import Progress, curve_svg, series
import sftkit.evaluate as evaluation
import sftkit.training as training

FIELDS = dict(chat_template="chatml", max_steps=3, lr=0.1, optimizer="sgd", batch_size=6, gradient_accumulation=2, gradient_checkpointing=False)


@pytest.fixture
def small_memory(monkeypatch):
    "`small_memory(n)`: backward passes over more than n tokens run out of memory in the lowest layer. Returns the sizes that were tried."
    def limit(most, error=lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")):
        tried, real = [], training.load_for_training
        def load(*args):
            model = real(*args)
            def refuse(gradient): raise error()
            def watch(module, given, output):
                hidden = output[0] if isinstance(output, tuple) else output
                if not hidden.requires_grad: return
                tried.append(hidden.shape[0] * hidden.shape[1])
                if tried[-1] > most: hidden.register_hook(refuse)
            decoder_layers(model)[0].register_forward_hook(watch)
            return model
        monkeypatch.setattr(training, "load_for_training", load)
        return tried
    return limit


def norms(run): return steps(run, "grad_norm")


@pytest.mark.parametrize("kind", ["flat", "padded", "packed", "packed by mask", "LoRA"])
def test_a_run_that_ran_out_of_memory_is_the_run_that_did_not(tiny, small_memory, monkeypatch, kind):
    if kind in ("padded", "packed by mask"): monkeypatch.setattr(training, "use_flat_attention", lambda *a: "not here")
    fields = {**FIELDS, **(dict(packing=True, max_seq_length=128, batch_size=3) if "packed" in kind else {}), **(dict(peft=True, lora_dropout=0) if kind == "LoRA" else {})}
    plan = Session(tiny, project="whole", **fields).data(CHAT, eval=6)
    whole = plan.fit()
    most = 130 if "packed" in kind else 60
    tried = small_memory(most)
    cut = plan.options(project_name="cut").fit()
    assert max(tried) > most and sum(n <= most for n in tried) > 2 * 3                       # it did run out, and went on in pieces
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-5) and norms(cut) == pytest.approx(norms(whole), rel=1e-4)
    name = "adapter_model.safetensors" if kind == "LoRA" else "model.safetensors"
    a, b = load_file(whole.path/name), load_file(cut.path/name)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    events = [e for e in cut.events if e["kind"] == "oom"]
    assert events and events[0]["step"] == 1 and events[-1]["most_tokens"] < max(tried) and "stay what they were" in events[0]["text"]
    progress = Progress(cut.events)
    assert [m["step"] for m in progress.marks if m["kind"] == "out of memory"] == [e["step"] for e in events] and "out of memory" in curve_svg(series(progress), progress.marks)


def test_a_single_row_that_does_not_fit_ends_the_run_with_what_helps(tiny, small_memory):
    small_memory(10)
    with pytest.raises(ModelError, match="single row.*max_seq_length=.*peft=True") as told: Session(tiny, project="run", **FIELDS).data(CHAT).fit()
    assert "step 1" in str(told.value)


def test_other_errors_are_not_taken_for_it(tiny, small_memory):
    tried = small_memory(10, lambda: RuntimeError("device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"): Session(tiny, project="run", **FIELDS).data(CHAT).fit()
    assert len(tried) == 1


def test_memory_that_runs_out_elsewhere_is_said_plainly(tiny, monkeypatch):
    def load(*args): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
    monkeypatch.setattr(training, "load_for_training", load)
    with pytest.raises(ModelError, match="9.00 GiB.*quantization='int4'"): Session(tiny, project="run", **FIELDS).data(CHAT).fit()


@pytest.mark.parametrize("most", [1, 12, 25, 60, None])
def test_pieces_hold_every_row_once_and_their_losses_add_up(tiny, most):
    plan = Session(tiny, project="run", **FIELDS).data(CHAT)
    model, padded = load_base(tiny), next(plan.batches())
    packed = next(plan.options(packing=True, max_seq_length=128, batch_size=3).batches())
    for batch in (padded, flat_batch(padded), packed, flat_batch(packed)):
        if "cu_seq_lens" in batch: use_flat_attention(model, batch["input_ids"][0, :40].tolist())
        elif "documents" in batch: plain_attention(model)
        pieces = split_batch(batch, most)
        with torch.no_grad(): whole, parts = token_loss_sum(model, batch), [token_loss_sum(model, p) for p in pieces]
        assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)
        real = lambda b: b["input_ids"][(b["documents"] if "documents" in b else b["attention_mask"]) > 0].tolist() if "cu_seq_lens" not in b else b["input_ids"][0].tolist()
        assert sum(map(real, pieces), []) == real(batch)
        single = lambda b: len(b["cu_seq_lens"]) == 2 if "cu_seq_lens" in b else len(b["input_ids"]) == 1
        assert most is None or all(p["input_ids"].numel() <= most or single(p) for p in pieces)


def test_the_prompts_are_answered_at_each_evaluation(tiny):
    run = Session(tiny, project="run", **{**FIELDS, "eval_steps": 1}).data(CHAT, eval=4).fit()
    asked = [e["when"] for e in run.events if e["kind"] == "sample"]
    assert asked == ["before"] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + ["after"] * 3
    assert len({e["prompt"] for e in run.events if e["kind"] == "sample"}) == 3


# -- evaluation and generation ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_forward(monkeypatch):
    "`small_forward(n, generating=)`: passes without gradients over more than n rows, the ones that generate or the others, run out of memory. Returns the numbers of rows that were tried."
    def limit(most, generating):
        import sftkit.engine as engine
        tried, name = [], "_new_ids" if generating else "mean_token_loss"
        module = evaluation if generating else engine
        real = getattr(module, name)
        def generate(model, prompts, *args, **kwargs):
            tried.append(len(prompts))
            if len(prompts) > most: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(model, prompts, *args, **kwargs)
        def score(model, batches):
            def checked(batch):
                rows = len(batch["cu_seq_lens"]) - 1 if "cu_seq_lens" in batch else len(batch["input_ids"])
                tried.append(rows)
                if rows > most: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                return batch
            return real(model, map(checked, batches))
        monkeypatch.setattr(module, name, generate if generating else score)
        return tried
    return limit


EVALUATED = {**FIELDS, **dict(max_steps=2, eval_steps=1, eval_batch_size=6, eval_max_new_tokens=8, use_enhanced_eval=True, eval_metrics="exact_match,rouge", eval_save_predictions=True)}
def told(run): return [e["text"] for e in run.events if e["kind"] == "note" and "Memory ran out" in e["text"]]
def evaluated(run): return [{k: v for k, v in e.items() if k not in ("t", "state")} for e in run.events if e["kind"] in ("eval", "scores", "sample")]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("generating", [False, True])
def test_an_evaluation_that_ran_out_of_memory_is_the_one_that_did_not(tiny, small_forward, monkeypatch, generating, flat):
    if not flat: monkeypatch.setattr(training, "use_flat_attention", lambda *a: "not here")
    plan = Session(tiny, project="whole", **EVALUATED).data(CHAT, eval=6)
    whole = plan.fit()
    tried = small_forward(2, generating)
    cut = plan.options(project_name="cut").fit()
    assert max(tried) > 2 and tried.count(max(tried)) == 1 and sum(n <= 2 for n in tried) > 2                # it goes on with what was found to fit
    assert len(evaluated(cut)) == len(evaluated(whole)) > 8
    for a, b in zip(evaluated(cut), evaluated(whole)): assert a == {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in b.items()}
    assert (cut.path/"predictions.jsonl").read_text() == (whole.path/"predictions.jsonl").read_text() and losses(cut) == losses(whole)
    assert len(told(cut)) >= 1 and "`eval_batch_size`" in told(cut)[-1] and not told(whole)


@pytest.mark.parametrize("generating,helps", [(False, "max_seq_length=1024"), (True, "eval_max_new_tokens=4; max_seq_length")])
def test_an_evaluation_of_a_single_row_that_does_not_fit_ends_the_run_with_what_helps(tiny, small_forward, generating, helps):
    small_forward(0, generating)
    with pytest.raises(ModelError, match=f"single row.*{helps}") as said: Session(tiny, project="run", **EVALUATED).data(CHAT, eval=6).fit()
    assert ("answers" in str(said.value)) == generating and ("eval_max_new_tokens" in str(said.value)) == generating


def test_processes_that_share_a_model_are_told_to_evaluate_fewer_rows(tiny, small_forward, monkeypatch):
    from sftkit.engine import Engine
    monkeypatch.setattr(Engine, "sharded", True)
    monkeypatch.setattr(Engine, "whole_state", lambda self: None)
    small_forward(2, False)
    with pytest.raises(ModelError, match="6 rows at a time.*eval_batch_size=3"): Session(tiny, project="run", **EVALUATED).data(CHAT, eval=6).fit()

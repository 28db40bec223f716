"""A trainer of tests/test_distributed.py that notes what each process loads and holds of a model that is shared out: `--trainer watched:Watched`.

It has accelerate take FSDP on a CPU, which PyTorch can do, and breaks a run off at the step that BREAKS names."""
import json
import os
from pathlib import Path
from unittest.mock import patch
import accelerate.state
from accelerate.utils import DistributedType
from sftkit import engine, model, training

RANK = int(os.environ.get("RANK", 0))
size = lambda t: 0 if t is None or t.is_meta else t.numel() * t.element_size()


def held(model): # bytes
    return sum(size(getattr(p, "_local_tensor", p)) + size(getattr(p, "ds_tensor", None)) for p in model.parameters())


class Watched(training.Trainer):
    def _fit(self, view):
        seen, backend, project = dict(loads=0, most=0), self.recipe.distributed_backend, self.recipe.project_name
        usual = dict(load=model.load_base, replace=model.replace_parameters, begin=engine.Engine.begin, state=accelerate.state.AcceleratorState.__init__, step=engine.Engine.training_step)
        def load(*args, **kwargs):
            seen["loads"] += 1
            return usual["load"](*args, **kwargs)
        def replace(whole, new):
            if not seen.get("loaded"): seen["loaded"] = held(whole)
            def one(name, p):
                made = new(name, p)
                seen["most"] = max(seen["most"], held(whole) + size(getattr(made, "_local_tensor", made)) + size(getattr(made, "ds_tensor", None)))
                return made
            usual["replace"](whole, one)
        def begin(own, fresh):
            usual["begin"](own, fresh)
            seen.update(flat=own.flat, formats=sorted({str(p.dtype) for p in own.model.parameters()}))
            Path(f"{project}-{RANK}.json").write_text(json.dumps(seen))
        def state(self, *args, fsdp_plugin=None, **kwargs):
            usual["state"](self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
            if fsdp_plugin is None: return
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP          # as accelerate does on GPUs
        def step(own, *args, **kwargs):
            if own.state.global_step == int(os.environ.get("BREAKS", -1)): raise ValueError("broken off")
            return usual["step"](own, *args, **kwargs)
        if backend == "deepspeed":
            import deepspeed.ops
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False              # else DeepSpeed compiles it for a minute; gloo does the same
        with patch.object(model, "load_base", load), patch.object(engine, "replace_parameters", replace), patch.object(engine.Engine, "begin", begin), \
             patch.object(accelerate.state.AcceleratorState, "__init__", state), patch.object(engine.Engine, "training_step", step), \
             patch.object(training, "check_backend", lambda r: None): return super()._fit(view)

"""A worker of tests/test_distributed.py: two optimizer steps of a model in FSDP, laid out as accelerate does it, against the same model whole. torchrun tests/sharded.py FOLDER"""
import copy
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import sftkit.loss as loss_module
from sftkit.model import decoder_layers, load_base, recompute_activations
from sftkit.loss import token_loss_sum

dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
whole = load_base(sys.argv[1]).train()
loss_module._CHUNK_LOGITS = 64 * whole.config.vocab_size                    # 64 tokens at a time
sharded = copy.deepcopy(whole)
for m in (whole, sharded): recompute_activations(m)
tied = sharded.get_input_embeddings().weight is sharded.get_output_embeddings().weight
for layer in decoder_layers(sharded): fully_shard(layer, mesh=mesh, reshard_after_forward=True)
if not tied: fully_shard(sharded.get_input_embeddings(), mesh=mesh, reshard_after_forward=True)
fully_shard([sharded.model.norm, *([sharded.get_input_embeddings()] if tied else []), sharded.get_output_embeddings()], mesh=mesh, reshard_after_forward=False)
fully_shard(sharded, mesh=mesh)
optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (whole, sharded)]
for step in range(3):
    ids = torch.randint(5, 250, (2, 150), generator=torch.Generator().manual_seed(step))
    batch = dict(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    losses = [token_loss_sum(m, batch) / ids.numel() for m in (whole, sharded)]
    for loss, optimizer in zip(losses, optimizers):
        loss.backward(); optimizer.step(); optimizer.zero_grad()
    assert abs(float(losses[0]) - float(losses[1])) < 1e-5, losses
gather = lambda p: p.full_tensor() if isinstance(p, DTensor) else p
for (name, a), (_, b) in zip(whole.named_parameters(), sharded.named_parameters()): assert torch.allclose(a, gather(b), atol=1e-5), name
with torch.no_grad(): assert abs(float(token_loss_sum(whole, batch)) - float(token_loss_sum(sharded, batch))) < 1e-3
print(f"same as whole, {'tied' if tied else 'untied'}, {len(decoder_layers(sharded))} layers")

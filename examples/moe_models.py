"""Mixtral, Qwen3-MoE and DeepSeek-V3 of transformers, their experts spread over ranks, and checked.

    python examples/moe_models.py --ranks 4
    torchrun --nproc-per-node 4 examples/moe_models.py --device cuda --dtype bf16

Needs torch and transformers (this was written for 5.24). shard() is all that a model takes: in each
sparse block the experts are replaced by those of this rank, with dispatch and combine around them;
routers, shared experts and attention stay as they are. The models are tiny and random. Each rank
works on a part of the batch; logits, generated tokens and gradients are compared with the same
model in one process.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
import transformers
from torch import nn

import mooncake_ep as ep
from mooncake_ep.autograd import Exchange

EXPERTS, TOPK_MAX, HIDDEN, LAYERS = 8, 4, 64, 3
SEQUENCES, LENGTH, NEW_TOKENS = 9, 12, 8  # ranks have more and less of them
VOCABULARY = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest differences from the model in one process. Only in float32: in bfloat16 rounding lets
# routers choose other experts for some tokens, in either model.
LOGITS_ERROR_MAX, GRADIENTS_ERROR_MAX = 1e-4, 1e-5
# Relative L2 errors of sparse blocks whose tokens and choices are the same.
BLOCKS_ERROR_MAX = {"fp32": 1e-5, "bf16": 1e-2}

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,  # so that all ranks generate equally many
}
_MIXTRAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
_QWEN3_MOE = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOPK_MAX,
    "moe_intermediate_size": 48,
    "head_dim": 16,
    "norm_topk_prob": True,
}
_DEEPSEEK_V3 = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _MIXTRAL),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN3_MOE),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _DEEPSEEK_V3),
}


# ---- What a model takes --------------------------------------------------------------------------


class ShardedExperts(nn.Module):
    """The experts of this rank, called as transformers calls all the experts of a block."""

    def __init__(self, experts: Any, exchange: Exchange) -> None:
        """Copy this rank's share of ``experts`` (gate_up_proj [E, 2I, H], down_proj [E, H, I])."""
        super().__init__()
        own = own_experts(exchange)
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj[own].detach().clone())
        self.down_proj = nn.Parameter(experts.down_proj[own].detach().clone())
        self.act_fn = experts.act_fn
        self.exchange = exchange

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the experts' weighted sums [T, H] of tokens [T, H], with choices [T, K]."""
        routed = self.exchange.dispatch(hidden_states, top_k_index, top_k_weights.float())
        room = routed.x.shape[1]
        outputs = []
        # Those without rows too: backward is collective, so all ranks need the same graph.
        for expert, (rows, count) in enumerate(zip(routed.x, routed.count.tolist(), strict=True)):
            gate, up = F.linear(rows[:count], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            outputs.append(F.pad(y, (0, 0, 0, room - count)))
        return self.exchange.combine(torch.stack(outputs), routed)


def own_experts(exchange: Exchange) -> slice:
    """Tell which experts are this rank's."""
    local = exchange.buffer.local_experts
    first = exchange.buffer.group.rank * local
    return slice(first, first + local)


def sparse_blocks(model: nn.Module) -> list[Any]:
    """List the blocks of a model that have experts."""
    return [block for block in model.modules() if hasattr(block, "experts")]


def shard(model: nn.Module, exchange: Exchange) -> None:
    """Let each sparse block of a model have only this rank's experts."""
    for block in sparse_blocks(model):
        block.experts = ShardedExperts(block.experts, exchange)


# ---- The same in one process, and the comparison -------------------------------------------------


@dataclass
class Results:
    """What a model made of a batch."""

    logits: torch.Tensor  # [sequences, LENGTH, VOCABULARY], float32 as all here
    tokens: torch.Tensor  # [sequences, NEW_TOKENS]
    gradients: dict[str, torch.Tensor]  # by name of the parameter


@dataclass
class Report:
    """How far a rank is from the model in one process; differences are the largest.

    Gradients are by kind: "router", "experts" and "others".
    """

    logits: float
    tokens_equal: float  # the share of the tokens that it generated
    gradients: dict[str, float]
    gradient_sizes: dict[str, float]  # the largest entries
    recomputed: float = math.inf  # what activation checkpointing changes in the gradients
    expert_share: float = 1.0  # of all experts' parameters, on this rank
    blocks: dict[str, float] = field(default_factory=dict)  # see BLOCKS_ERROR_MAX


def make_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Make a random model, the same on each rank."""
    model_class, config_class, options = MODELS[name]
    config = getattr(transformers, config_class)(**(_COMMON | options))
    config._experts_implementation = "eager"  # plain torch, which any device has
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    return getattr(transformers, model_class)(config).to(device, dtype).eval()


def make_batch(device: torch.device) -> torch.Tensor:
    """Make all ranks' prompts, [SEQUENCES, LENGTH]."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, VOCABULARY, (SEQUENCES, LENGTH), generator=generator).to(device)


def gradients_of(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits, and the gradients of this part of the mean loss over all sequences."""
    model.zero_grad(set_to_none=True)
    logits = model(batch, use_cache=False).logits.float()
    predicted, wanted = logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
    loss = F.cross_entropy(predicted, wanted, reduction="sum") / (SEQUENCES * (LENGTH - 1))
    loss.backward()
    gradients = {name: one.grad.float().cpu() for name, one in model.named_parameters()}
    return logits.detach().cpu(), gradients


def results_of(model: Any, batch: torch.Tensor) -> Results:
    """Run a model over a batch: forward, backward, and generation from its prompts."""
    logits, gradients = gradients_of(model, batch)
    with torch.no_grad():
        generated = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    return Results(logits, generated[:, batch.shape[1] :].cpu(), gradients)


def kind_of(name: str) -> str:
    """Tell what a parameter belongs to, by its name."""
    if ".experts." in name:
        return "experts"
    return "router" if ".gate." in name else "others"


def sum_over_ranks(gradients: dict[str, torch.Tensor]) -> None:
    """Add up the gradients of what all ranks have; those of experts are complete at their owner."""
    for name in sorted(gradients):
        if kind_of(name) != "experts":
            distributed.all_reduce(gradients[name])


def recompute(model: Any, batch: torch.Tensor, gradients: dict[str, torch.Tensor]) -> float:
    """Return the largest difference that activation checkpointing makes, before they are summed."""
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    _, recomputed = gradients_of(model, batch)
    model.activation_checkpointing_disable()
    model.eval()
    return _greatest(_largest(recomputed[name] - kept) for name, kept in gradients.items())


def compare(got: Results, expected: Results, part: slice, own: slice) -> Report:
    """Compare with what belongs to this rank: its sequences, and the gradients of its experts."""
    report = Report(
        logits=_largest(got.logits - expected.logits[part]),
        tokens_equal=(got.tokens == expected.tokens[part]).float().mean().item(),
        gradients={},
        gradient_sizes={},
    )
    for kind in sorted(set(map(kind_of, expected.gradients))):
        pairs = [
            (got.gradients[name], gradient[own] if kind == "experts" else gradient)
            for name, gradient in expected.gradients.items()
            if kind_of(name) == kind
        ]
        report.gradients[kind] = _greatest(_largest(ours - wanted) for ours, wanted in pairs)
        report.gradient_sizes[kind] = _greatest(_largest(wanted) for _, wanted in pairs)
    return report


def compare_blocks(
    dense: nn.Module, sharded: nn.Module, batch: torch.Tensor, part: slice, own: slice
) -> dict[str, float]:
    """Give the experts of each block what they get in one process, and any gradient of the sums.

    Returns the largest relative L2 errors, against float32 in one process. Collective.
    """
    inputs: list[tuple[torch.Tensor, ...]] = []
    blocks = sparse_blocks(dense)
    hooks = [
        block.experts.register_forward_pre_hook(lambda _, given: inputs.append(given))
        for block in blocks
    ]
    with torch.no_grad():
        dense(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    tokens = slice(part.start * LENGTH, part.stop * LENGTH)
    errors: dict[str, list[float]] = {}
    for block, own_block, (x, idx, weights) in zip(
        blocks, sparse_blocks(sharded), inputs, strict=True
    ):
        exact = copy.deepcopy(block.experts).float()
        generator = torch.Generator().manual_seed(3)
        grad = torch.randn(x.shape, generator=generator).to(x)
        expected = _differentiate(exact, (x.float(), idx, weights.float()), grad.float())
        cut = (x[tokens], idx[tokens], weights[tokens].float())
        got = _differentiate(own_block.experts, cut, grad[tokens])
        for kind, value in got.items():
            wanted = expected[kind][own if kind.endswith("proj") else tokens]
            error = ((value - wanted).norm() / wanted.norm()).item()
            errors.setdefault(kind, []).append(error)
    return {kind: _greatest(of_blocks) for kind, of_blocks in errors.items()}


def _differentiate(
    experts: Any, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the experts' sums of (tokens, choices, weights), and all gradients."""
    experts.zero_grad()
    x, weights = (inputs[at].detach().clone().requires_grad_() for at in (0, 2))
    sums = experts(x, inputs[1], weights)
    sums.backward(grad)
    results = {"sums": sums.detach(), "tokens": x.grad, "weights": weights.grad}
    results |= {name: one.grad for name, one in experts.named_parameters()}
    return {kind: result.float() for kind, result in results.items()}


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def _greatest(values: Iterable[float]) -> float:
    """Return the greatest value, or NaN if there is one, which max() may pass over."""
    return _largest(torch.tensor(list(values)))


def check_model(name: str, exchange: Exchange, device: torch.device, dtype_name: str) -> Report:
    """Run a model over the ranks and in one process. Collective."""
    group, batch = exchange.buffer.group, make_batch(device)
    bounds = [SEQUENCES * rank // group.rank_count for rank in range(group.rank_count + 1)]
    part, own = slice(*bounds[group.rank : group.rank + 2]), own_experts(exchange)
    dense = make_model(name, device, DTYPES[dtype_name])
    sharded = copy.deepcopy(dense)
    shard(sharded, exchange)

    got = results_of(sharded, batch[part])
    recomputed = recompute(sharded, batch[part], got.gradients)
    sum_over_ranks(got.gradients)
    report = compare(got, results_of(dense, batch), part, own)
    report.recomputed = recomputed
    report.expert_share = _expert_parameters(sharded) / _expert_parameters(dense)
    report.blocks = compare_blocks(dense, sharded, batch, part, own)
    return report


def _expert_parameters(model: nn.Module) -> int:
    return sum(one.numel() for name, one in model.named_parameters() if kind_of(name) == "experts")


# ---- Ranks ---------------------------------------------------------------------------------------


def check_models(names: list[str], device_type: str, dtype_name: str) -> dict[str, Report]:
    """Check models on the ranks of torch.distributed's default group. Collective."""
    rank = distributed.get_rank()
    options: dict[str, Any] = {"backend": "cpu"}
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        options = {"backend": "cuda", "device_id": device.index}
    else:
        torch.set_num_threads(1)  # ranks share the cores
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with (
        ep.Group.from_torch(**options) as group,
        make_buffer(group, dtype_name) as buffer,
        Exchange(buffer) as exchange,
    ):
        return {name: check_model(name, exchange, device, dtype_name) for name in names}


def make_buffer(group: ep.Group, dtype_name: str) -> ep.Buffer:
    """Make the buffer that all layers of all the models share. Collective."""
    return ep.Buffer(
        group,
        max_tokens=-(-SEQUENCES // group.rank_count) * (LENGTH + NEW_TOKENS),
        hidden=HIDDEN,
        experts=EXPERTS,
        topk=TOPK_MAX,
        payloads=[dtype_name],
    )


def failures(report: Report, device_type: str, dtype_name: str) -> list[str]:
    """List what is further from the model in one process than rounding explains."""
    limit = BLOCKS_ERROR_MAX[dtype_name]
    problems = [f"blocks: {kind}" for kind, error in report.blocks.items() if not error <= limit]
    # The same bits; on a GPU the rest of a model may add up in another order each time.
    if device_type == "cpu" and report.recomputed != 0:
        problems.append("recomputed gradients")
    if dtype_name != "fp32":
        return problems
    if not report.logits <= LOGITS_ERROR_MAX:
        problems.append("logits")
    if report.tokens_equal != 1:
        problems.append("tokens")
    return problems + [
        f"gradients of {kind}"
        for kind, error in report.gradients.items()
        if not error <= GRADIENTS_ERROR_MAX
    ]


def _run(rank: int, rank_count: int, meeting: str, arguments: argparse.Namespace) -> None:
    """Be one rank: check the models; rank 0 prints what all have found."""
    distributed.init_process_group("gloo", meeting, rank=rank, world_size=rank_count)
    try:
        mine = check_models(arguments.models, arguments.device, arguments.dtype)
        reports: list[Any] = [None] * rank_count
        distributed.all_gather_object(reports, mine)
    finally:
        distributed.destroy_process_group()
    failed = False
    for name in arguments.models:
        for of_rank, report in enumerate(one[name] for one in reports):
            problems = failures(report, arguments.device, arguments.dtype)
            failed |= bool(problems)
            if rank == 0:
                print(f"{name}, rank {of_rank}: " + ", ".join(_lines(report, problems)))
    _leave(int(failed))


def _leave(status: int) -> None:
    """End this process without the interpreter's own end.

    Threads of torch's gloo may still be letting go of tensors after the group is destroyed; one
    that does so while the interpreter ends aborts the process (seen with torch 2.13, rarely).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _lines(report: Report, problems: list[str]) -> Iterator[str]:
    yield f"{report.expert_share:.0%} of the experts"
    yield f"{report.tokens_equal:.0%} of the tokens equal"
    yield f"logits differ by {report.logits:.1e}"
    yield "gradients by " + ", ".join(
        f"{error:.1e} ({kind})" for kind, error in report.gradients.items()
    )
    yield f"blocks by {max(report.blocks.values()):.1e} of their size"
    yield "FAILED: " + ", ".join(problems) if problems else "ok"


def main() -> None:
    """Start the ranks, or be one of those that torchrun has started."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--ranks", type=int, default=2, help="1, 2, 4 or 8 (default: 2); torchrun says it itself"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    arguments = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", arguments.ranks))
    if ranks < 1 or EXPERTS % ranks:
        parser.error(f"--ranks {ranks} does not divide {EXPERTS}, the number of experts")
    if "RANK" in os.environ:
        _run(int(os.environ["RANK"]), ranks, "env://", arguments)
        return
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(
            _run, (ranks, f"file://{directory}/meeting", arguments), nprocs=ranks
        )


if __name__ == "__main__":
    main()

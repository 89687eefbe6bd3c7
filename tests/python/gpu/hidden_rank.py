"""One rank of test_hidden_gpu.py: python hidden_rank.py DEVICE_ID, with torchrun's variables set.

Prints, as JSON, how it reaches the other rank, what its window takes, and a digest of a round.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch

import mooncake_ep as ep

HIDDEN, EXPERTS, TOPK, TOKENS = 512, 8, 2, 16


def main(device_id: int) -> None:
    """Join, run a round, print."""
    torch.cuda.set_device(device_id)
    with (
        ep.Group.from_env(backend="cuda", device_id=device_id, timeout_s=30) as group,
        ep.Buffer(group, max_tokens=TOKENS, hidden=HIDDEN, experts=EXPERTS, topk=TOPK) as buffer,
    ):
        torch.manual_seed(group.rank)
        x = torch.randn(TOKENS, HIDDEN).to(torch.bfloat16).cuda()
        idx = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(TOKENS)]).cuda()
        received = buffer.dispatch(x, idx, torch.rand(TOKENS, TOPK).cuda())
        out = buffer.combine(received.x, received)
        digest = hashlib.sha256()
        for array in (received.count, out):
            digest.update(array.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        transport = group.transport(1 - group.rank)
        print(
            json.dumps(
                {
                    "transport": transport.name,
                    "reason": transport.reason,
                    "window_bytes": buffer.window_bytes,
                    "digest": digest.hexdigest(),
                }
            )
        )
        group.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]))

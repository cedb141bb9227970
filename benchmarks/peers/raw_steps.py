"""Steps of a loop in plain PyTorch, over batches that are in memory.

python raw_steps.py mlp|conv BATCH_SIZE
"""

from __future__ import annotations

import sys

import torch
from gate import Gate
from toys import arrays, network


def main(kind: str, size: int) -> None:
    """Train until nobody asks for more."""
    x, y = map(torch.from_numpy, arrays())
    batches = list(zip(x.split(size), y.split(size), strict=True))
    net, loss_function, gate = network(kind), torch.nn.CrossEntropyLoss(), Gate()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    while True:
        for images, labels in batches:
            optimizer.zero_grad()
            loss_function(net(images), labels).backward()
            optimizer.step()
            gate.step()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""Steps of a loop in plain PyTorch, over batches that are in memory."""

from __future__ import annotations

import torch
from gate import Gate
from settings import settings
from toys import arrays, network

ASKED = settings(net="mlp", batch_size=64)


def main() -> None:
    """Train until nobody asks for more."""
    x, y = map(torch.from_numpy, arrays())
    size = ASKED.batch_size
    batches = list(zip(x.split(size), y.split(size), strict=True))
    net, loss_function, gate = network(ASKED.net), torch.nn.CrossEntropyLoss(), Gate()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    while True:
        for images, labels in batches:
            optimizer.zero_grad()
            loss_function(net(images), labels).backward()
            optimizer.step()
            gate.step()


if __name__ == "__main__":
    main()

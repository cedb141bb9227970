"""One batch, with PyTorch alone: a loop, a validation, a checkpoint."""

from __future__ import annotations

import torch
from one_batch import BATCH, FOLDER, conv_net, datasets, first_step_ended
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader


def main() -> None:
    """Train one batch, validate, and save."""
    torch.manual_seed(0)
    train, held_out = datasets()
    net = conv_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    x, y = next(iter(DataLoader(train, BATCH, shuffle=True)))
    optimizer.zero_grad()
    cross_entropy(net(x), y).backward()
    optimizer.step()
    first_step_ended()
    net.eval()
    with torch.inference_mode():
        right = sum((net(x).argmax(1) == y).sum().item() for x, y in DataLoader(held_out, BATCH))
    print(f"accuracy {right / len(held_out):.4f}")
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, FOLDER / "last.pt")


if __name__ == "__main__":
    main()

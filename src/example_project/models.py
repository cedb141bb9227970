"""Networks that read one digit from each image, in plain torch."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["MLP", "ConvNet"]


class ConvNet(nn.Module):
    """Two convolutions that halve the image each, then a linear layer: small, and reads well.

    Takes images `(batch, 1, 28, 28)` and gives raw scores `(batch, n_classes)`.

    Args:
        n_channels: Channels of the first convolution; the second has twice as many.
        n_classes: How many kinds of images there are.
        dropout: The fraction of features that is dropped in training.
    """

    def __init__(self, n_channels: int = 16, n_classes: int = 10, dropout: float = 0.2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(1, n_channels),
            _block(n_channels, 2 * n_channels),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(2 * n_channels * 7 * 7, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of images `x`."""
        scores: Tensor = self.head(self.features(x))
        return scores


class MLP(nn.Sequential):
    """Two linear layers over all pixels: quicker, and blind to what is next to what.

    Takes images `(batch, 1, 28, 28)` and gives raw scores `(batch, n_classes)`.

    Args:
        n_features: Width of the layer between.
        n_classes: How many kinds of images there are.
        dropout: The fraction of features that is dropped in training.
    """

    def __init__(self, n_features: int = 128, n_classes: int = 10, dropout: float = 0.2) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(28 * 28, n_features),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(n_features, n_classes),
        )


def _block(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )

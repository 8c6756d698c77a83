"""The networks: two small ones from scratch, or any of timm's by name, with a linear head to the embedding."""

from typing import Any

import torch
from torch import Tensor, nn

SMALL = "small"
SMALL_VIT = "small-vit"
FROM_SCRATCH = (SMALL, SMALL_VIT)


class Embedder(nn.Module):
    """Images [N, 3, H, W] in [0, 1] to embeddings [N, dim]: features, layer norm if asked, linear, batch norm if asked.

    A batch norm at the end is ArcFace's way (Deng et al., CVPR 2019, section 3.1): without it, features that are never
    negative leave all embeddings in a narrow cone for long.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, features: nn.Module, width: int, dim: int, layer_norm: bool, batch_norm: bool, mean: Any, std: Any
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.features = features
        self.head = nn.Sequential(nn.LayerNorm(width) if layer_norm else nn.Identity(), nn.Linear(width, dim))
        if batch_norm:
            self.head.append(nn.BatchNorm1d(dim))

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to embeddings [N, dim], of any length."""
        return self.head(self.features((images - self.mean) / self.std))


def make_network(
    backbone: str, pretrained: bool, dim: int, layer_norm: bool, size: int, batch_norm: bool = False
) -> Embedder:
    """`backbone`: one of `FROM_SCRATCH`, or the name of a timm model, for images of `size` pixels a side.

    Raises:
        ValueError: there is no such model, or no weights for it, or it does not take images of this size.
        ImportError: timm is missing or does not load.
    """
    if backbone in FROM_SCRATCH:
        if pretrained:
            raise ValueError("there are no weights for the small networks; leave --pretrained out")
        features, width = (_small(), 128) if backbone == SMALL else (_SmallViT(size), 64)
        return Embedder(features, width, dim, layer_norm, batch_norm, [0.5] * 3, [0.25] * 3)
    timm = import_timm(backbone)
    try:
        features = timm.create_model(backbone, pretrained=pretrained, num_classes=0)
    except Exception as error:  # an unknown name, no weights, no network: each its own class
        known = f"; 'small' or one of timm's models, such as {', '.join(timm.list_models('resnet50*')[:3])}"
        raise ValueError(f"timm has no model for --backbone {backbone}: {error}{known}") from error
    config = features.pretrained_cfg
    return Embedder(
        features, _width(features, backbone, size), dim, layer_norm, batch_norm, config["mean"], config["std"]
    )


def _width(features: nn.Module, backbone: str, size: int) -> int:
    """Columns of the features of an image, by trial: many of timm's models give more than their `num_features`."""
    features.eval()  # so that the trial leaves a batch norm as it is
    try:
        with torch.no_grad():
            shape = list(features(torch.zeros(1, 3, size, size)).shape)
    except Exception as error:  # each model refuses in its own way, many by an assertion
        raise ValueError(f"--backbone {backbone} does not take images of --size {size}: {error}") from error
    if len(shape) != 2:
        raise ValueError(f"--backbone {backbone} gives {shape} of one image, and not one row; choose another")
    features.train()
    return int(shape[1])


def import_timm(backbone: str) -> Any:
    """timm, which needs a torchvision that fits the torch there is."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ImportError(
            f"--backbone {backbone} needs timm, and module {error.name!r} is not there: pip install timm, with the "
            "torchvision of your torch; --backbone small needs neither"
        ) from error
    except Exception as error:  # torchvision's operators do not load beside every torch: RuntimeError, OSError, ...
        raise ImportError(
            f"--backbone {backbone} needs timm, which does not load ({type(error).__name__}: {error}). Most often "
            f"torchvision is of another build than torch {torch.__version__}: install the pair that belongs together; "
            "--backbone small needs neither"
        ) from error
    return timm


def _small() -> nn.Sequential:
    """Four convolutions to 128 features: for images of 32 pixels or so."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _SmallViT(nn.Module):
    """A vision transformer to 64 features: patches of 8 x 8 pixels by three convolutions, then four blocks."""

    def __init__(self, size: int, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        side = -(-size // 8)
        self.positions = nn.Parameter(0.02 * torch.randn(side * side, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, size, size] to features [N, 64]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(dim=1)

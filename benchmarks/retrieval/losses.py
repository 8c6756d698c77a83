"""The base losses that TCM is added to, by name."""

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ArcFaceLoss, MultiSimilarityLoss, ProxyAnchorLoss
from torch import Tensor, nn


class SmoothAP(nn.Module):
    r"""1 - mean AP of every embedding as a query, with ranks made smooth.

        AP_q = mean over i in class(q) of  (1 + sum_{j in class(q), j != i} g(s_qj - s_qi))
                                         / (1 + sum_{j != i} g(s_qj - s_qi)),      g(d) = sigmoid(d / temperature)

    A query is one of its own class, as in the authors' release. Memory [N, K, N] for N embeddings, K a class.
    pytorch-metric-learning 2.9.0 has this loss too, right only where a batch has as many classes as images of each: it
    takes the one number for the other.

    Source: Brown et al., Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval, ECCV 2020 (arXiv
    2007.12163).
    """

    def __init__(self, temperature: float = 0.01) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Embeddings [N, D] and labels [N], each class as often as any other, to a scalar."""
        all_above, own_above = _above(embeddings, labels, self.temperature)
        # Each sum holds g(0) = 1/2 of the item against itself, which the rank does not.
        return 1 - ((0.5 + own_above.sum(dim=3)) / (0.5 + all_above)).mean()


class RecallAtK(nn.Module):
    r"""1 - mean recall@k of every embedding as a query among the others, with ranks and the cut at k made smooth.

        recall_k(q) = 1 / min(k, K - 1) * min(k, sum_{i in class(q), i != q} sigmoid((k - r_qi) / cut_temperature))
        r_qi        = 1 + sum_{j != i, j != q} sigmoid((s_qj - s_qi) / temperature)

    averaged over `ks` and q; K images a class. The query is not among the items ranked, as the paper writes it (the
    authors' release leaves it among them). Without the paper's similarity mixup.

    Source: Patel et al., Recall@k Surrogate Loss with Large Batches and Similarity Mixup, CVPR 2022 (arXiv 2108.11179).
    """

    def __init__(
        self, ks: tuple[int, ...] = (1, 2, 4, 8, 16), temperature: float = 0.01, cut_temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.ks, self.temperature, self.cut_temperature = ks, temperature, cut_temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Embeddings [N, D] and labels [N], each class as often as any other and at least twice, to a scalar."""
        all_above, own_above = _above(embeddings, labels, self.temperature)
        per_class = all_above.shape[2]
        if per_class < 2:
            raise ValueError("the recall@k loss needs at least two images of a class; raise --batch-images")
        query_above = own_above.diagonal(dim1=1, dim2=3).transpose(1, 2)  # [P, q, i]: the query against item i
        rank = 0.5 + all_above - query_above
        others = ~torch.eye(per_class, dtype=torch.bool, device=rank.device)
        recall = rank.new_zeros(())
        for k in self.ks:
            inside = (torch.sigmoid((k - rank) / self.cut_temperature) * others).sum(dim=2)
            recall = recall + (inside.clamp_max(k) / min(k, per_class - 1)).mean()
        return 1 - recall / len(self.ks)


def _above(embeddings: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """How many items lie above item i for query q of the same class, smoothly, item i itself with 1/2.

    [P, K, K] (class, q, i) the sum over all items, and [P, K, K, K] (class, q, i, j) those of the class one by one.
    """
    counts = torch.unique(labels, return_counts=True)[1]
    if (counts != counts[0]).any():
        raise ValueError(f"every class must come equally often in a batch, got {counts.tolist()} times")
    classes, per_class = len(counts), int(counts[0])
    x = F.normalize(embeddings[labels.argsort(stable=True)])
    s = (x @ x.T).view(classes, per_class, classes, per_class)
    pick = torch.arange(classes, device=x.device)
    own = s[pick, :, pick, :]  # [P, q, i]
    above = torch.sigmoid((s[:, :, None] - own[:, :, :, None, None]) / temperature)  # [P, q, i, P, j]
    return above.sum(dim=(3, 4)), above[pick, :, :, pick, :]


class ArcFace(ArcFaceLoss):  # type: ignore[misc]  # its base has no types
    """pytorch-metric-learning's ArcFace, kept off cosines of exactly 1, where the gradient of its arccos is infinite.

    In two dimensions float32 rounds the cosine to 1 for every embedding within 0.02 degrees of its class's weight.
    """

    def get_angles(self, cosine: Tensor) -> Tensor:
        """Angles in radians of cosines [N]; those within 0.08 degrees of 0 or 180 get no gradient."""
        return super().get_angles(cosine.clamp(-1 + 1e-6, 1 - 1e-6))


BASES = ("smoothap", "proxyanchor", "arcface", "multisimilarity", "recallatk")
WITH_WEIGHTS = ("proxyanchor", "arcface")  # of them, those that learn a weight for each class


def make_base(name: str, classes: int, dim: int, scale: float = 64.0) -> nn.Module:
    """The base loss `name` with the settings of its paper, but for ArcFace's scale; some have weights to learn."""
    if name == "smoothap":
        return SmoothAP()
    if name == "recallatk":
        return RecallAtK()
    if name == "proxyanchor":
        return ProxyAnchorLoss(classes, dim)
    if name == "arcface":
        return ArcFace(classes, dim, scale=scale)
    if name == "multisimilarity":
        return MultiSimilarityLoss()
    raise ValueError(f"base={name!r} is not known; choose one of {', '.join(map(repr, BASES))}")

"""The feature network for digits: a small classifier, trained on real digits in some seconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 64  # width of the penultimate layer
CLASSES = 10
HELD_OUT = 360  # of the 1,797 digits: no training step sees them
EPOCHS, BATCH, LEARNING_RATE = 20, 64, 3e-3
# What a file of weights must say to be used: to be changed with the network or its training.
RECIPE = "conv 16-32, 64 features, SiLU; 20 epochs of 64, Adam 3e-3"


class DigitClassifier(nn.Module):
    """Two convolutions and two linear layers for 8x8 images.

    Returns of ``forward``:
        Logits of the classes, ``(B, 10)``, of images ``(B, 1, 8, 8)`` in [-1, 1]; `features` gives
        the penultimate layer, ``(B, 64)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, FEATURES),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return F.silu(self.body(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train(images: Tensor, labels: Tensor, seed: int = 0) -> tuple[DigitClassifier, float]:
    """Train on all but `HELD_OUT` images, drawn by the seed.

    Args:
        images: ``(N, 1, 8, 8)`` in [-1, 1].
        labels: ``(N,)`` int64 in 0..9.
        seed: of the start, the split and the order; the same seed gives the same network.

    Returns:
        The network in evaluation mode, on the CPU, and its accuracy on the held-out images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
        order = torch.randperm(len(images))
        held_out, used = order[:HELD_OUT], order[HELD_OUT:]
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
        steps = EPOCHS * -(-len(used) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(EPOCHS):
            for batch in used[torch.randperm(len(used))].split(BATCH):
                loss = F.cross_entropy(model(shifted(images[batch])), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(images[held_out]).argmax(1) == labels[held_out]
    return model, right.float().mean().item()


def shifted(images: Tensor) -> Tensor:
    """Each image moved by a random whole pixel or none, up or down and left or right; the border is
    background.
    """
    B, _, H, W = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(3, (2, B, 1, 1))
    rows, columns = down + torch.arange(H).view(1, H, 1), right + torch.arange(W).view(1, 1, W)
    return padded[torch.arange(B).view(B, 1, 1), 0, rows, columns].unsqueeze(1)

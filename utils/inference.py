"""What a network says of a split: its logits, from which every metric is computed."""

import torch
from torch import Tensor, nn

from utils.data_loader import ImageData, ordered_batches

EVALUATION_BATCH = 1024


@torch.no_grad()
def collect_logits(
    model: nn.Module, data: ImageData, indices: Tensor, batch_size: int = EVALUATION_BATCH
) -> tuple[Tensor, Tensor]:
    """Logits float32 (N, K) and labels int64 (N,), in the order of the indices, on the CPU.

    The images are shown as they are, without augmentation. The network's mode is restored.
    """
    was_training = model.training
    model.eval()
    parts = [model(batch.images).float() for batch in ordered_batches(data, indices, batch_size)]
    model.train(was_training)
    return torch.cat(parts).cpu(), data.labels.cpu()[indices]

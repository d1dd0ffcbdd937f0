"""Cross-entropy on the LR paper's own splits of Fashion-MNIST, as its code trains it and as ours.

    python results/as_published.py --seeds 0 1 2 3 > as-published.csv

Where the published code (github.com/julilien/LabelRelaxation) differs from this project: it splits
with scikit-learn's train_test_split and the seed, subtracts each pixel's mean, draws Glorot's
uniform weights, divides the learning rate by 1 + 1e-5 steps, and lets it fall an epoch later. For
each seed "published" does all of that, and "ours" the first of it only. bfloat16, the last epoch.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from models.simple_dense import simple_dense
from utils import data_loader
from utils.evaluate import expected_calibration_error

EPOCHS, BATCH, LEARNING_RATE, FALL = 50, 64, 0.05, 0.31622777  # utils/params.json


def train(data: data_loader.ImageData, seed: int, published: bool) -> tuple[float, float, float]:
    """Test accuracy, ECE of 15 bins and log loss."""
    images = data.images.flatten(1).float() / 255
    split = train_test_split(images, data.labels, test_size=1 / 7, random_state=seed, shuffle=True)
    training, test, training_labels, test_labels = split
    if published:
        mean, deviation = training.mean(0), 1.0
    else:
        mean, deviation = training.mean(), training.std()
    training, test = (training - mean) / deviation, (test - mean) / deviation
    torch.manual_seed(seed)
    network = simple_dense(data.input_shape, len(data.classes))
    if published:
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True)
    order, step = torch.Generator().manual_seed(seed), 0
    for epoch in range(EPOCHS):
        rate = LEARNING_RATE * (FALL if epoch >= 30 + published else 1)
        for rows in torch.randperm(len(training), generator=order).split(BATCH):
            optimizer.param_groups[0]["lr"] = rate / (1 + 1e-5 * step * published)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(training[rows])
            loss = F.cross_entropy(logits.float(), training_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    with torch.no_grad():
        logits = network(test)
    accuracy = (logits.argmax(1) == test_labels).double().mean()
    ece = expected_calibration_error(logits, test_labels, 15)
    return float(accuracy), ece, float(F.cross_entropy(logits, test_labels))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(10)])
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    data = data_loader.load("fashionmnist", args.data_dir, None, torch.device("cpu"))
    print("seed,trained,accuracy,ece,log_loss")
    for seed in args.seeds:
        for trained in ("published", "ours"):
            numbers = train(data, seed, trained == "published")
            print(seed, trained, *(f"{number:.4f}" for number in numbers), sep=",", flush=True)

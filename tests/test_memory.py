"""How much memory a process takes: the data set once, in uint8, and no more with more epochs."""

import os
from contextlib import closing, redirect_stdout
from dataclasses import replace

import torch
from conftest import memory

from utils import data_loader, training
from utils.arguments import training_parser
from utils.teacher import make_cross_entropy


def test_epochs_do_not_grow_memory(tmp_path):
    """0.3 MiB from epoch 50 to 200 where this was written; one kept logit tensor of an epoch would
    be 10 MiB, one kept network 60."""
    flags = "--model shallownet --epochs 200 --estop 0 --batch_size 48 --augment crop-flip"
    flags += " --lr 0.01 --tr_size 0.9"
    args = training_parser("").parse_args(flags.split())
    args.device = torch.device("cpu")
    data = replace(data_loader.load("digits"), train_size=160)
    trial = training.new_trial(args, data, args.model, 0)
    epochs = training.fit(trial, "vanilla", {}, make_cross_entropy, tmp_path)
    resident = {}
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), closing(epochs):
        for progress in epochs:
            resident[progress.epoch] = memory()
    assert resident[200] - resident[50] < 4, resident


def test_a_data_set_is_uint8_and_is_not_copied():
    data = data_loader.load("digits")
    assert data.images.dtype == torch.uint8
    assert data.images.untyped_storage().nbytes() == 1797 * 8 * 8
    assert data.to(torch.device("cpu")).images.data_ptr() == data.images.data_ptr()
    args = training_parser("").parse_args(["--protocol", "lr", "--tr_size", "0.8"])
    args.device = torch.device("cpu")
    trials = [training.new_trial(args, data, "lenet", seed) for seed in (0, 1)]
    assert {trial.data.images.data_ptr() for trial in trials} == {data.images.data_ptr()}
    for batch in data_loader.ordered_batches(data, torch.arange(8), 8):
        assert batch.images.dtype == torch.uint8

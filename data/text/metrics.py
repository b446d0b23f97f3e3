"""GLUE's metrics, in percent: predictions (N,), labels (N,) -> a number. What is not defined (0 / 0) counts 0."""

from torch import Tensor

from data.suite import accuracy_of


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of two classes: that of Pearson, for numbers 0 and 1."""
    return pearson(predicted, labels)


def f1(predicted: Tensor, labels: Tensor) -> float:
    """The harmonic mean of precision and recall of class 1."""
    found, there = predicted == 1, labels == 1
    total = (found.sum() + there.sum()).item()
    return 100 * 2 * (found & there).sum().item() / total if total else 0.0


def pearson(predicted: Tensor, labels: Tensor) -> float:
    x, y = (values.double() - values.double().mean() for values in (predicted, labels))
    norm = (x.norm() * y.norm()).item()
    return 100 * (x @ y).item() / norm if norm else 0.0


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Pearson's correlation of ranks; of equal values, the mean of their ranks."""
    return pearson(ranks(predicted), ranks(labels))


def ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


METRICS = {
    "accuracy": accuracy_of,
    "matthews": matthews,
    "accuracy and F1": lambda predicted, labels: (accuracy_of(predicted, labels) + f1(predicted, labels)) / 2,
    "Pearson and Spearman": lambda predicted, labels: (pearson(predicted, labels) + spearman(predicted, labels)) / 2,
}

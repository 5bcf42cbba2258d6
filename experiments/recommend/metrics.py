"""How good rankings and probabilities are: AUC, AUC within each person, calibration, error of times.

Legend: N impressions.
"""

import numpy as np


def auc(score_N: np.ndarray, label_N: np.ndarray) -> float:
    """The share of pairs of a yes and a no in which the yes has the higher score, ties counting half; NaN without any.

    >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    0.75
    """
    label_N = np.asarray(label_N, bool)
    yes, no = int(label_N.sum()), int((~label_N).sum())
    if not yes or not no:
        return float("nan")
    _, place_N, counts = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(counts) - (counts - 1) / 2)[place_N]  # the mean rank of equal scores
    return float((rank_N[label_N].sum() - yes * (yes + 1) / 2) / (yes * no))


def gauc(score_N: np.ndarray, label_N: np.ndarray, person_N: np.ndarray) -> float:
    """AUC within each person, weighted by their impressions; those with all yes or all no are left out (Zhu 2017).

    >>> gauc(np.array([0.1, 0.9, 0.2, 0.3]), np.array([0, 1, 1, 0]), np.array([1, 1, 2, 2]))
    0.5
    """
    order = np.argsort(person_N, kind="stable")
    bounds = np.flatnonzero(np.diff(person_N[order])) + 1
    groups = np.split(order, bounds)
    found = [(len(group), auc(score_N[group], label_N[group])) for group in groups]
    known = [(count, value) for count, value in found if not np.isnan(value)]
    return float(np.average([v for _, v in known], weights=[c for c, _ in known])) if known else float("nan")


def calibration(probability_N: np.ndarray, label_N: np.ndarray) -> float:
    """The predicted number of yes over the true one; 1 is right, NaN without any yes.

    >>> calibration(np.array([0.5, 0.5, 0.5, 0.5]), np.array([1, 0, 0, 0]))
    2.0
    """
    yes = float(np.sum(label_N))
    return float(np.sum(probability_N)) / yes if yes else float("nan")


def log_loss(probability_N: np.ndarray, label_N: np.ndarray) -> float:
    """The mean negative log-likelihood in nats.

    >>> round(log_loss(np.array([0.5, 0.5]), np.array([1, 0])), 3)
    0.693
    """
    p_N = np.clip(np.asarray(probability_N, np.float64), 1e-12, 1 - 1e-12)
    return float(-np.mean(np.where(np.asarray(label_N, bool), np.log(p_N), np.log1p(-p_N))))


def mean_error(seconds_N: np.ndarray, true_N: np.ndarray) -> float:
    """The mean absolute error, in seconds; NaN for none.

    >>> mean_error(np.array([1.0, 5.0]), np.array([2.0, 5.0]))
    0.5
    """
    return float(np.mean(np.abs(seconds_N - true_N))) if len(true_N) else float("nan")

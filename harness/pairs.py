"""Differences between rows of a table over the seeds that both have, with their 95 % intervals by a paired t test."""

import math
import statistics

from scipy.stats import t


def paired_interval(differences: list[float], level: float = 0.95) -> tuple[float, float]:
    """(mean, half the width of its confidence interval) of differences in pairs: t s / sqrt(n); n must be two or more."""
    n = len(differences)
    quantile = t.ppf((1 + level) / 2, n - 1).item()
    return statistics.fmean(differences), quantile * statistics.stdev(differences) / math.sqrt(n)


def difference(results, row, control):
    """(mean of accuracy minus the control's, half the width of its interval, seeds), or None of fewer than two common seeds.

    results: {(row, seed): result}.
    """
    ours = accuracies(results, row)
    theirs = accuracies(results, control)
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    return *paired_interval([ours[seed] - theirs[seed] for seed in seeds]), seeds


def accuracies(results, row):
    """{seed: accuracy} of the finished runs of a row."""
    return {seed: run['accuracy'] for (name, seed), run in results.items() if name == row and run['status'] == 'finished'}

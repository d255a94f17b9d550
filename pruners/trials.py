"""What a search has tried: the scores of its candidates, the history of them, and the file that it goes on from."""

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from deploy.files import read_tensors, write_tensors

from . import processes
from .search import Search, as_config_list, fingerprint, keep_counts, trial
from .selection import Keep, Scores


class History:
    """search_history.csv: a line for each candidate. Only the first process writes."""

    def __init__(self, path: Path, *columns: str):
        self.path = path
        self.columns = columns

    def read(self) -> list[dict[str, str]]:
        """The lines as dicts of texts, but one that was cut short; [] where there is no such file."""
        if not self.path.exists():
            return []
        with open(self.path, newline='') as file:
            return [row for row in csv.DictReader(file) if list(row) == list(self.columns) and None not in row.values()]

    def write(self, rows: Iterable) -> None:
        """Begin the file anew with these rows."""
        if processes.rank() == 0:
            with open(self.path, 'w', newline='') as file:
                csv.writer(file).writerows([self.columns, *rows])

    def add(self, *row) -> None:
        if processes.rank() == 0:
            with open(self.path, 'a', newline='') as file:
                csv.writer(file).writerow(row)


class Progress:
    """What a search has done so far, in a file: one of the same name (see fingerprint()) goes on from there."""

    def __init__(self, path: Path, name: str):
        self.path = path
        self.name = name

    def write(self, **state) -> None:
        """Write the state, and that of torch's generator on the CPU."""
        write_tensors(state | {'name': self.name, 'rng': torch.get_rng_state()}, self.path)

    def read(self, device: torch.device) -> dict | None:
        """The state, or None where there is none of the same search."""
        state = read_tensors(self.path, device) if self.path.exists() else {}
        return state if state.get('name') == self.name else None

    def remove(self) -> None:
        if processes.rank() == 0:
            self.path.unlink(missing_ok=True)


class Trials:
    """What candidates are worth: each set of counts is evaluated once, and is a line of search_history.csv.

    A candidate is a list of shares, one for each of splits.units; `splits` (of methods/simulated_annealing.py) says what they
    mean.
    """

    def __init__(self, pruner: Search, splits, importances: Scores):
        self.base = pruner.base
        self.evaluation = pruner.evaluation
        self.splits = splits
        self.importances = importances
        self.name = fingerprint(pruner.base.model, pruner.settings)
        path = pruner.folder / 'search_history.csv'
        self.history = History(path, 'sparsity', 'performance', 'config_list', 'temperature', 'search')
        self.seen = {}  # {counts: score}, in this search so far
        self.known = {}  # the same, of this search when it was cut short

    def begin(self, first: list[float], temperature: float) -> None:
        """Take over the scores of the same search, if the evaluator still says the same of its first candidate."""
        score = self.evaluate(first)
        rows = processes.same([row for row in self.history.read() if row['search'] == self.name])
        if not rows or not same_score(float(rows[0]['performance']), score):
            rows = []
        self.history.write(row.values() for row in rows)
        for row in rows:
            shares = {entry['op_names'][0]: entry['sparsity'] for entry in json.loads(row['config_list'])}
            candidate = [shares[unit[0]] for unit in self.splits.units]
            self.known[self.key(candidate)] = float(row['performance'])
        if not rows:
            self.add(first, score, temperature)

    def add(self, candidate: list[float], score: float, temperature: float) -> None:
        self.seen[self.key(candidate)] = score
        config_list = json.dumps(as_config_list(self.base, self.splits.shares(candidate)))
        self.history.add(self.splits.sparsity(candidate), score, config_list, temperature, self.name)

    def utility(self, candidate: list[float], temperature: float) -> float:
        """Larger is better. A candidate is evaluated if there was none of the same counts before."""
        key = self.key(candidate)
        if key in self.known:  # acceptance looks at the spread of what has been seen, so not earlier than at its turn
            self.seen[key] = self.known[key]
        elif key not in self.seen:
            self.add(candidate, self.evaluate(candidate), temperature)
        return self.evaluation.utility(self.seen[key])

    def score(self, candidate: list[float]) -> float:
        return self.seen[self.key(candidate)]

    def utilities(self) -> list[float]:
        """Of all that was seen so far."""
        return [self.evaluation.utility(score) for score in self.seen.values()]

    def evaluate(self, candidate: list[float]) -> float:
        with trial(self.base.model):
            self.base.set_masks(self.masks(candidate))
            self.base.apply()
            return self.evaluation.score(self.base.model)

    def masks(self, candidate: list[float]) -> Keep:
        return keep_counts(self.importances, self.splits.counts(candidate))

    def key(self, candidate: list[float]) -> tuple[int, ...]:
        """What tells the candidates apart: the numbers that they prune."""
        return tuple(self.splits.counts(candidate).values())


def same_score(before: float, now: float) -> bool:
    """Whether an evaluator still says the same of a network."""
    return math.isclose(before, now, rel_tol=1e-4, abs_tol=1e-12) or math.isnan(before) and math.isnan(now)

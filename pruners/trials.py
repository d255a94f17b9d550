"""What a search has tried: the scores of its candidates, the history of them, and the file that it goes on from."""

import csv
import json
import math

import torch

from deploy.files import read_tensors, write_tensors

from . import processes
from .search import as_config_list, fingerprint, keep_counts, trial


class History:
    """search_history.csv: a line for each candidate. Only the first process writes."""

    def __init__(self, path, *columns):
        self.path = path
        self.columns = columns

    def read(self):
        """The lines as dicts of texts, but one that was cut short; [] where there is no such file."""
        if not self.path.exists():
            return []
        with open(self.path, newline='') as file:
            return [row for row in csv.DictReader(file) if list(row) == list(self.columns) and None not in row.values()]

    def write(self, rows):
        """Begin the file anew with these rows."""
        if processes.rank() == 0:
            with open(self.path, 'w', newline='') as file:
                csv.writer(file).writerows([self.columns, *rows])

    def add(self, *row):
        if processes.rank() == 0:
            with open(self.path, 'a', newline='') as file:
                csv.writer(file).writerow(row)


class Progress:
    """What a search has done so far, in a file: one of the same name (see fingerprint()) goes on from there."""

    def __init__(self, path, name):
        self.path = path
        self.name = name

    def write(self, **state):
        """Write the state, and that of torch's generator on the CPU."""
        write_tensors(state | {'name': self.name, 'rng': torch.get_rng_state()}, self.path)

    def read(self, device):
        """The state, or None where there is none of the same search."""
        state = read_tensors(self.path, device) if self.path.exists() else {}
        return state if state.get('name') == self.name else None

    def remove(self):
        if processes.rank() == 0:
            self.path.unlink(missing_ok=True)


class Trials:
    """What candidates are worth: each set of counts is evaluated once, and is a line of search_history.csv."""

    def __init__(self, pruner, splits, importances):
        self.base = pruner.base
        self.evaluation = pruner.evaluation
        self.splits = splits
        self.importances = importances
        self.name = fingerprint(pruner.base.model, pruner.settings)
        path = pruner.folder / 'search_history.csv'
        self.history = History(path, 'sparsity', 'performance', 'config_list', 'temperature', 'search')
        self.seen = {}  # {counts: score}, in this search so far
        self.known = {}  # the same, of this search when it was cut short

    def begin(self, first, temperature):
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

    def add(self, candidate, score, temperature):
        self.seen[self.key(candidate)] = score
        config_list = json.dumps(as_config_list(self.base, self.splits.shares(candidate)))
        self.history.add(self.splits.sparsity(candidate), score, config_list, temperature, self.name)

    def utility(self, candidate, temperature):
        """Larger is better. A candidate is evaluated if there was none of the same counts before."""
        key = self.key(candidate)
        if key in self.known:  # acceptance looks at the spread of what has been seen, so not earlier than at its turn
            self.seen[key] = self.known[key]
        elif key not in self.seen:
            self.add(candidate, self.evaluate(candidate), temperature)
        return self.evaluation.utility(self.seen[key])

    def score(self, candidate):
        return self.seen[self.key(candidate)]

    def utilities(self):
        """Of all that was seen so far."""
        return [self.evaluation.utility(score) for score in self.seen.values()]

    def evaluate(self, candidate):
        with trial(self.base.model):
            self.base.set_masks(self.masks(candidate))
            self.base.apply()
            return self.evaluation.score(self.base.model)

    def masks(self, candidate):
        return keep_counts(self.importances, self.splits.counts(candidate))

    def key(self, candidate):
        """What tells the candidates apart: the numbers that they prune."""
        return tuple(self.splits.counts(candidate).values())


def same_score(before, now):
    """Whether an evaluator still says the same of a network."""
    return math.isclose(before, now, rel_tol=1e-4, abs_tol=1e-12) or math.isnan(before) and math.isnan(now)

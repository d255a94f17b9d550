"""What the searches of NNI share: simulated annealing, NetAdapt, AutoCompress."""

import contextlib
import hashlib
import json
import math
from pathlib import Path

import torch

from deploy.files import write_json

from . import processes
from .compressor import GlobalPruner, StatisticsPruner
from .selection import join_groups, mark_lowest, pruned_first

CAP = 1 - 1e-9  # shares stay below 1; each layer keeps a filter in any case
FOREVER = 2**62


def base_pruner(kind, model, config_list):
    """The one-shot pruner of a class, set to rank within each layer. Raises ValueError as the class does."""
    options = {'global_sort': False} if issubclass(kind, GlobalPruner) else {}
    if issubclass(kind, StatisticsPruner):
        options['statistics_batch_num'] = FOREVER  # it watches until it is told to stop
    return kind(model, config_list, **options)


def importance(base, statistics=None, groups=()):
    """{layer: scores} by the criterion of a pruner, which agree within each group of layers.

    statistics: a function of the model that runs training batches forward and backward, for the criteria that watch them. Raises
    ValueError where one is needed and there is none.
    """
    if isinstance(base, StatisticsPruner):
        if statistics is None:
            raise ValueError(f'{type(base).__name__} judges by training batches: give statistics, a function of the model')
        with trial(base.model):
            base.watch()
            statistics(base.model)
            base.unwatch()
    scores = base.importance()
    if scores is None:
        raise ValueError('statistics has sent no batch through the model in training mode')
    if isinstance(base, StatisticsPruner):  # each process has seen images of its own
        processes.average(list(scores.values()))
    return join_groups(scores, groups)


@contextlib.contextmanager
def trial(model):
    """Whatever happens to the model inside is taken back: parameters, buffers and modes."""
    state, modes = snapshot(model), [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.load_state_dict(state)
        for module, training in modes:
            module.training = training


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def fingerprint(model, *settings):
    """A short name for a search: hash of the model's tensors and of the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def keep_counts(scores, counts, previous=None):
    """{layer: scores}, {layer: number} -> {layer: bool tensor}, False for that number of least scores (see keep_by_layer)."""
    return {name: ~mark_lowest(score, counts[name]) for name, score in pruned_first(scores, previous).items()}


def own_weights(base):
    """A function of counts: weights that the layers of a pruner keep when counts[layer] of their filters or weights go."""
    sizes = {name: (score_count(base, name), layer.weight.numel()) for name, layer in base.layers.items()}
    return lambda counts: sum(size // n * (n - counts[name]) for name, (n, size) in sizes.items())


def score_count(base, name):
    """How many filters, or weights, of a layer there are to choose from."""
    weight = base.layers[name].weight
    return len(weight) if base.FILTERS else weight.numel()


class Search:
    """What the searches share: `base`, a one-shot pruner that makes the masks, whose methods and attributes they have too.

    units: lists of layers that are decided together. After search(), result is {performance, sparsity, met, config_list}.
    """

    def __init__(self, model, config_list, evaluator, optimize_mode, kind, experiment_data_dir, groups, statistics):
        if not callable(evaluator):
            raise ValueError(f'evaluator must be a function of the model that returns a number, got {evaluator!r}')
        if optimize_mode not in ('maximize', 'minimize'):
            raise ValueError(f"optimize_mode must be 'maximize' or 'minimize', got {optimize_mode!r}")
        self.base = base_pruner(kind, model, config_list)
        targets = sorted(set(self.base.sparsity.values()))
        if len(targets) > 1:
            raise ValueError(f'sparsity is the overall target, so all entries of config_list need the same, not {targets}')
        if isinstance(self.base, StatisticsPruner) and statistics is None:
            raise ValueError(f'{kind.__name__} judges by training batches: give statistics, a function of the model')
        self.target, self.evaluator, self.statistics = targets[0], evaluator, statistics
        self.sign = 1 if optimize_mode == 'maximize' else -1
        self.folder, self.result = Path(experiment_data_dir), None
        self.set_groups(groups)

    def __getattr__(self, name):
        if name == 'base':  # not there yet, or in a copy
            raise AttributeError(name)
        return getattr(self.base, name)

    def set_groups(self, groups):
        self.base.decide_together(groups if self.base.FILTERS else [])
        self.groups = self.base.groups
        home = {name: tuple(group) for group in self.groups for name in group}
        units = {}
        for name in self.base.layers:
            units.setdefault(home.get(name, (name,)), []).append(name)
        self.units = list(units.values())

    def compress(self, return_config_list=False):
        """Search, mask the model in place with what was found, let the masks hold; returns the model, or its config list."""
        self.search()
        self.base.hook()
        self.base.apply()
        return json.loads(self.result['config_list']) if return_config_list else self.base.model

    def search(self):
        raise NotImplementedError

    def export_model(self, *paths, **options):
        """As Compressor.export_model. Raises ValueError when there was no search yet."""
        if self.result is None:
            raise ValueError('call compress() before export_model()')
        self.base.export_model(*paths, **options)

    def score(self):
        """What the evaluator says of the model as it is, the mean over all processes. Raises ValueError for no number."""
        value = self.evaluator(self.base.model)
        try:
            value = torch.tensor(float(value), dtype=torch.float64, device=next(self.base.model.parameters()).device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f'evaluator must return a number, got {value!r}') from None
        processes.average([value])
        return value.item()

    def utility(self, score):
        """Larger is better; what is not a finite number is the worst."""
        return self.sign * score if math.isfinite(score) else -math.inf

    def shares(self, counts):
        """{layer: number of filters} -> {layer: share}"""
        return {name: count / score_count(self.base, name) for name, count in counts.items()}

    def as_config_list(self, shares):
        """{layer: share} -> a config list with which the class of base_algo (slim: with global_sort=False) makes the same masks."""
        kinds = {name: type(layer).__name__ for name, layer in self.base.layers.items()}
        return [{'sparsity': share, 'op_types': [kinds[name]], 'op_names': [name]} for name, share in shares.items()]

    def open_folder(self):
        if processes.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        processes.wait()

    def finish(self, shares, keep, **figures):
        """Take over the masks of what was found, and write search_result.json."""
        self.base.sparsity = dict(shares)
        self.base.set_masks(keep)
        self.base.pending = False
        self.result = figures | {'config_list': json.dumps(self.as_config_list(shares))}
        write_json(self.result, self.folder / 'search_result.json')

"""What the searches of NNI share: simulated annealing, NetAdapt, AutoCompress.

A search tries masks on a model. A one-shot pruner, `base`, says by its criterion which filters (or weights) of a layer go
first, so a candidate is a number for each layer: `counts`, {layer: how many of its filters, or weights, are pruned}. An
evaluator gives the masked model a score.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from deploy.files import write_json
from deploy.graph import release

from . import processes
from .compressor import Compressor, GlobalPruner, StatisticsPruner
from .selection import Keep, Scores, mark_lowest, num_filters, pruned_first

Counts = dict[str, int]  # {layer: number of filters, or weights}
LARGEST_SHARE = 1 - 1e-9  # shares stay below 1; each layer keeps a filter in any case
UNTIL_TOLD = 2**62  # training batches that a criterion watches


def base_pruner(
    kind: type[Compressor], model: nn.Module, config_list: list[dict], groups=(), by_layer=True, parts=None
) -> Compressor:
    """The one-shot pruner of a class for a search; a criterion that watches training does so until it is told to stop.

    groups, parts: see Compressor.decide_together(). by_layer: rank within each layer, also where the class ranks all
    layers together. Raises ValueError as the class does.
    """
    options = {}
    if by_layer and issubclass(kind, GlobalPruner):
        options['global_sort'] = False
    if issubclass(kind, StatisticsPruner):
        options['statistics_batch_num'] = UNTIL_TOLD
    base = kind(model, config_list, **options)
    if base.FILTERS:
        base.decide_together(groups, parts)
    return base


def importance(base: Compressor, statistics: Callable | None = None) -> Scores:
    """{layer: scores} by the criterion of a pruner; layers that are decided together (base.groups) have equal ones.

    statistics: a function of the model that runs training batches forward and backward, for the criteria that watch them.
    Raises ValueError where one is needed and there is none.
    """
    if isinstance(base, StatisticsPruner):
        check_statistics(type(base), statistics)
        with trial(base.model):
            base.watch()
            statistics(base.model)
            base.unwatch()
        return base.joined(watched_importance(base))
    return base.joined(base.importance())


def watched_importance(base: StatisticsPruner) -> Scores:
    """{layer: scores} of a criterion that has watched training batches, the mean over all processes. Raises ValueError."""
    scores = base.importance()
    if scores is None:
        raise ValueError(f'{type(base).__name__} judges by training batches, and the model has seen none in training mode')
    processes.average(list(scores.values()))
    return scores


def check_statistics(kind: type[Compressor], statistics: Callable | None) -> None:
    """Raises ValueError where a class watches training batches and nothing runs them."""
    if issubclass(kind, StatisticsPruner) and statistics is None:
        raise ValueError(f'{kind.__name__} judges by training batches: give statistics, a function of the model')


@contextlib.contextmanager
def trial(model: nn.Module):
    """Whatever happens to the model inside is taken back: parameters, buffers and modes."""
    state = snapshot(model)
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.load_state_dict(state)
        for module, training in modes:
            module.training = training


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def replace_tensors(model: nn.Module, small: nn.Module) -> None:
    """Give the layers of `model` the parameters, buffers and sizes that those of `small` have, a network of shrink()."""
    release(model)  # from an earlier pruner, whose masks have the old shapes
    for name, layer in model.named_modules():
        smaller = small.get_submodule(name)
        for key, tensor in [*smaller.named_parameters(recurse=False), *smaller.named_buffers(recurse=False)]:
            setattr(layer, key, tensor)
        for key, value in vars(smaller).items():
            if type(value) in (int, tuple) and key in vars(layer):  # in_channels, num_features, ...
                setattr(layer, key, value)


def fingerprint(model: nn.Module, *settings) -> str:
    """A short name for a search: hash of the model's tensors and of the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def keep_counts(scores: Scores, counts: Counts) -> Keep:
    """{layer: scores}, {layer: number} -> {layer: bool tensor}, False for that number of least scores."""
    return {name: ~mark_lowest(score, counts[name]) for name, score in pruned_first(scores).items()}


def sizes(base: Compressor) -> Counts:
    """{layer: how many filters, or weights, there are to choose from}."""
    return {name: num_filters(layer) if base.FILTERS else layer.weight.numel() for name, layer in base.layers.items()}


def units(base: Compressor) -> list[list[str]]:
    """[[layer names], ...]: the layers of a pruner, each by itself or with those that are decided together with it."""
    found = []
    for name in base.layers:
        group = next((group for group in base.groups if name in group), [name])
        unit = [member for member in base.layers if member in group]
        if unit not in found:
            found.append(unit)
    return found


class Evaluation:
    """The evaluator of a search, a function of the model that returns a number, of which more or less is better."""

    def __init__(self, evaluator: Callable, optimize_mode: str):
        if not callable(evaluator):
            raise ValueError(f'evaluator must be a function of the model that returns a number, got {evaluator!r}')
        if optimize_mode not in ('maximize', 'minimize'):
            raise ValueError(f"optimize_mode must be 'maximize' or 'minimize', got {optimize_mode!r}")
        self.evaluator = evaluator
        self.sign = 1 if optimize_mode == 'maximize' else -1

    def score(self, model: nn.Module) -> float:
        """What the evaluator says of the model as it is, the mean over all processes. Raises ValueError for no number."""
        value = self.evaluator(model)
        try:
            value = torch.tensor(float(value), dtype=torch.float64, device=next(model.parameters()).device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f'evaluator must return a number, got {value!r}') from None
        processes.average([value])
        return value.item()

    def utility(self, score: float) -> float:
        """Larger is better; what is not a finite number is the worst."""
        return self.sign * score if math.isfinite(score) else -math.inf


class AroundPruner:
    """A pruner around a one-shot pruner, `base`, whose other methods and attributes it has too: masks, bind(), ..."""

    def __getattr__(self, name):
        if name == 'base':  # not there yet, or in a copy
            raise AttributeError(name)
        return getattr(self.base, name)


class Search(AroundPruner):
    """A pruner that searches: search() sets the masks of `base`, and `result`, {performance, sparsity, met, config_list}."""

    def __init__(
        self, model, config_list, evaluator, optimize_mode, kind, experiment_data_dir, statistics, groups=(), parts=None
    ):
        self.evaluation = Evaluation(evaluator, optimize_mode)
        self.base = base_pruner(kind, model, config_list, groups, parts=parts)
        targets = sorted(set(self.base.sparsity.values()))
        if len(targets) > 1:
            raise ValueError(f'sparsity is the overall target, so all entries of config_list need the same, not {targets}')
        check_statistics(kind, statistics)
        self.target = targets[0]
        self.statistics = statistics
        self.folder = Path(experiment_data_dir)
        self.result = None

    def search(self):
        raise NotImplementedError

    def compress(self, return_config_list: bool = False) -> nn.Module | list[dict]:
        """Search, mask the model in place with what was found, let the masks hold; returns the model, or its config list."""
        self.search()
        self.base.hook()
        self.base.apply()
        return json.loads(self.result['config_list']) if return_config_list else self.base.model

    def export_model(self, *paths, **options):
        """As Compressor.export_model. Raises ValueError when there was no search yet."""
        if self.result is None:
            raise ValueError('call compress() before export_model()')
        self.base.export_model(*paths, **options)

    def finish(self, shares: dict[str, float], keep: Keep, figures: dict) -> None:
        """Give `base` the shares and masks that were found, and write search_result.json: figures, and the config list."""
        self.base.sparsity = dict(shares)
        self.base.set_masks(keep)
        self.result = figures | {'config_list': json.dumps(as_config_list(self.base, shares))}
        write_json(self.result, self.folder / 'search_result.json')


def as_config_list(base: Compressor, shares: dict[str, float]) -> list[dict]:
    """{layer: share} -> a config list with which the class of base_algo (slim: with global_sort=False) makes the same masks."""
    kinds = {name: type(layer).__name__ for name, layer in base.layers.items()}
    return [{'sparsity': share, 'op_types': [kinds[name]], 'op_names': [name]} for name, share in shares.items()]


def open_folder(folder: Path) -> None:
    """Make the folder of a search, for all processes."""
    if processes.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    processes.wait()

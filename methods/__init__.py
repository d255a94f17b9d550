"""The protocol that every method follows, and how one is found: `--method x` is the class `Method` in methods/x.py.

Adding a method is adding a file. Only what a paper changes is overridden; the loop in main.py calls the hooks from start_from
to facts in the order in which they stand here, and those after facts when a run is saved, continued or made of stages.
"""

import difflib
import importlib
import pkgutil
from argparse import ArgumentParser, Namespace

import torch
from torch import nn

from pruners.processes import say
from sparse_utils import summary, weights_to_prune

# The classes of NNI's pruners, and the modules they live in.
PRUNERS = {
    'LevelPruner': 'level',
    'SlimPruner': 'slim',
    'FPGMPruner': 'fpgm',
    'L1FilterPruner': 'l1_filter',
    'L2FilterPruner': 'l2_filter',
    'ActivationAPoZRankFilterPruner': 'apoz',
    'ActivationMeanRankFilterPruner': 'mean_activation',
    'TaylorFOWeightFilterPruner': 'taylor_fo',
    'AGP_Pruner': 'agp',
    'NetAdaptPruner': 'netadapt',
    'SimulatedAnnealingPruner': 'simulated_annealing',
    'AutoCompressPruner': 'autocompress',
    'ADMMPruner': 'admm',
    'LotteryTicketPruner': 'lottery_ticket',
}


def __getattr__(name):
    """`from methods import LevelPruner`: imported when asked for, as the modules import this one."""
    if name not in PRUNERS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{PRUNERS[name]}', __name__), name)


def load_but_classifier(model: nn.Module, state: dict) -> dict[str, tuple[int, int]]:
    """Load a state dict strictly, but for a classifier with another number of classes -> {its name: (theirs, ours)}.

    A classifier is a linear layer or convolution that differs in its number of outputs alone; where several differ, all must
    differ in the same way. Raises RuntimeError, as load_state_dict() does, for everything else.
    """
    own = model.state_dict()
    changed = [name for name in own if name in state and own[name].shape != state[name].shape]
    layers = {name.rpartition('.')[0] for name in changed}
    sizes = {(tuple(state[name].shape[:1]), tuple(own[name].shape[:1])) for name in changed}
    same_rest = all(own[name].shape[1:] == state[name].shape[1:] for name in changed)
    known = all(isinstance(model.get_submodule(name), (nn.Linear, nn.Conv2d)) for name in layers)
    if len(sizes) != 1 or not same_rest or not known:
        model.load_state_dict(state)
        return {}
    (theirs,), (ours,) = sizes.pop()
    fresh = {name: tensor for name, tensor in own.items() if name.rpartition('.')[0] in layers}
    model.load_state_dict(state | fresh)
    return dict.fromkeys(sorted(layers), (theirs, ours))


class Method:
    """Dense training, and the base of every method."""

    DEFAULTS = {}  # flag defaults of the paper's example run, over those of args.py: {'epochs': 60, 'lr': 0.1}
    DATASET_DEFAULTS = {}  # those that belong to a data set, over its own: {'cifar10': {'std': (0.25, 0.24, 0.26)}}
    filters = False  # whether whole filters go, so that the result tells what shrinking the network gives
    idle = False  # whether it adds parameters that the forward pass does not use
    replays = False  # whether all steps launch the same kernels on the same memory, as --cuda-graphs needs
    gives = 'zeros'  # 'zeros' in the original network, 'a smaller network', or 'the dense network'

    def __init__(self, args: Namespace):
        """args: the parsed command line. Raises ValueError for settings that cannot work together."""
        self.args = args
        self.started = bool(vars(args).get('from') or vars(args).get('pretrained'))  # with trained weights, none of them fresh
        self.started_with = {}  # what result.json says of that

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        """Add the method's own flags: the paper's default, and help that names the paper's symbol."""

    def start_from(self, model: nn.Module, state: dict, called: str = '--from') -> None:
        """Load the state dict that --from or --pretrained names, before anything else. Raises ValueError when it does not fit.

        Where it has another number of classes, the last classifier stays fresh, and a pipeline begins with dense training.
        """
        try:
            fresh = load_but_classifier(model, state)
        except RuntimeError as error:
            reason = ' '.join(f'{error}'.split())[:200]  # not str(): once methods/str.py is loaded, that name is the module
            raise ValueError(f'the weights of {called} do not fit {self.args.model}: {reason}') from None
        self.started = not fresh
        self.started_with = {'started_with': called, 'fresh': sorted(fresh)}
        for name, (theirs, ours) in fresh.items():
            say(f'{name} stays fresh: the weights of {called} are for {theirs} classes, the data has {ours}')

    def announce(self, model: nn.Module) -> None:
        """Say before training which weights are to be pruned, and which are not although one could expect it."""
        say(summary(model, *weights_to_prune(model, self.args.pthres)))

    def prepare(self, model: nn.Module, steps: int, args: Namespace) -> None:
        """Change the model for a stage of `steps` steps, before the optimizer exists; safe to call again.

        args: the arguments of the stage.
        """

    def param_groups(self, model: nn.Module, args: Namespace) -> list[dict]:
        """Parameter groups for the optimizer. Default: no weight decay on biases and norms, unless --wd-all."""
        parameters = list(model.parameters())
        decayed = [p for p in parameters if p.dim() > 1 or args.wd_all]
        plain = [p for p in parameters if p.dim() <= 1 and not args.wd_all]
        groups = [{'params': decayed, 'weight_decay': args.wd}, {'params': plain, 'weight_decay': 0.0}]
        return [group for group in groups if group['params']]

    def attach(self, fit: Namespace) -> None:
        """Once the optimizer exists.

        fit: what the stage works with: args, model, forward, optimizer, criterion, autocast, example, batches.
        """

    def before_step(self, step: int) -> None:
        """Before the forward pass of step 0, 1, ...: thresholds, temperatures."""

    def loss(self) -> torch.Tensor | None:
        """An extra loss to add to the cross-entropy, or None."""

    def after_backward(self, step: int, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Between backward and optimizer.step(): gradients may be read and changed; batch is (images, labels)."""

    def after_step(self, step: int, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """After optimizer.step(): masks, second passes."""

    def after_epoch(self, epoch: int) -> None:
        """Before the evaluation that ends the epoch."""

    def metrics(self) -> dict[str, float]:
        """{name: float} to log with the epoch, beside loss, accuracy and sparsity."""
        return {}

    def after_evaluation(self, line: dict) -> None:
        """After the evaluation that ends the epoch; `line` is what will be logged."""

    def finalize(self, model: nn.Module) -> nn.Module:
        """Turn the model into plain layers with plain names and exact zeros; returns the model."""
        return model

    def facts(self) -> dict:
        """{name: plain value} for result.json, beside what is measured."""
        return {}

    def state_dict(self) -> dict:
        """What a resumed run needs and model.state_dict() does not hold: tensors and plain types."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take back what state_dict() gave, after prepare()."""

    def pretrain(self, job) -> None:
        """The dense training of --epochs that a pipeline begins with, unless --from or --pretrained gives its end."""
        if not self.started:
            job.fit(Method(self.args), 'pretrain')

    def fine_tune(self, job) -> None:
        """The --finetune-epochs that a pipeline may end with, at a constant --finetune-lr."""
        if self.args.finetune_epochs:
            stage = {'epochs': self.args.finetune_epochs, 'lr': self.args.finetune_lr}
            job.fit(self, 'finetune', **stage, lr_schedule='constant', warmup_epochs=0.0)

    def run(self, job) -> None:
        """One stage of training; pipelines override this with ordinary code over job.fit()."""
        job.fit(self)


def names() -> list[str]:
    """The names that --method takes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith('_'))


def load(name: str) -> type[Method]:
    """The class `Method` of methods/<name>.py. Raises ValueError for a name that is not there."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f' (did you mean {near[0]}?)' if near else ''
        raise ValueError(f'unknown method {name!r}{hint}; there are {", ".join(names())}')
    return importlib.import_module(f'.{name}', __name__).Method

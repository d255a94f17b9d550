"""Group-norm pruning, the method of DepGraph: all that has to lose channel k together is judged, and in training is pushed
towards zero, together.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv 2301.12900, sections 3.3 and 4.1.

A channel's members are the filters that make it, the scales of batch norms on it, and the columns of the weights that read it,
biases never. Its importance is the mean over its members of sum w^2 (equation 5), over the mean of that in its group. Training
has three parts: the dense network (--epochs, or --from, or --pretrained); --sparse-epochs of sparse learning without weight
decay, where every step adds r gamma_k w to the gradient of each member, with gamma_k = 2^(4 (I_max - I_k) / (I_max - I_min)) in
its group and I the square root of the importance (equation 6), so that the weakest channel shrinks 16 times as fast as the
strongest; then channels go in --prune-steps equal steps by one ranking of the whole network, each judged by what is left; then
fine-tuning.

Deviations from the authors' code. --ptarget is a share of the filters, of which each layer keeps one, and a group that would be
cut by the last place stays whole; theirs is a share of MACs. Pruned filters are set to zero with the scale and shift of their
batch norm; --shrink removes them and what reads them, which does not count here as soon as they are pruned. Where all channels
of a group are equally important, gamma is 1; theirs is 0/0. Sparse learning ends with its last epoch, not with the one that is
best on the test set.
"""

from typing import NamedTuple

import torch
from torch import nn

from deploy.ties import Mix, read_channels
from pruners.compressor import FilterPruner, GlobalPruner

from ._flags import nonnegative, positive
from ._one_shot import OneShot

ALPHA = 4  # gamma goes from 1 to 2^ALPHA


class Member(NamedTuple):
    """A weight, and the classes of its channels: those of the filters of a layer and of what they read, [O] and [I].

    A batch norm's scale has rows alone; a depthwise convolution too, as its filter and its one input are one channel.
    """

    name: str
    rows: torch.Tensor
    columns: torch.Tensor | None
    groups: int
    swapped: bool


class Members:
    """The members of all channels of a network; channels that go together have one class, 0, 1, ..., number - 1.

    model: read once, by torch.export. Raises ValueError where it cannot be read.
    """

    def __init__(self, model: nn.Module, example_input: torch.Tensor):
        channels = read_channels(model, example_input)
        names = dict(model.named_parameters(remove_duplicate=False))
        self.number = int(channels.classes.max()) + 1
        self.members = []
        self.filters = {}  # {layer: classes of its filters, [O]}
        for step in channels.steps:
            if isinstance(step, Mix) and step.weight in names:
                rows = channels.classes[step.out]
                columns = None if step.depthwise else channels.classes[step.inputs]
                self.members.append(Member(step.weight, rows, columns, step.groups, step.swapped))
                self.filters[step.weight.rpartition('.')[0]] = rows
        for name, module in model.named_modules():
            numbers = channels.weights.get(f'{name}.weight', {}).get(0)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and numbers is not None:
                self.members.append(Member(f'{name}.weight', channels.classes[numbers.flatten()], None, 1, False))
        self.counts = torch.zeros(self.number)  # members of each class
        for member in self.members:
            for classes in (member.rows, member.columns):
                if classes is not None:
                    self.counts[classes.unique()] += 1

    def move(self, device):
        """Have the classes where the weights are."""
        if self.counts.device != device:
            self.counts = self.counts.to(device)
            self.filters = {name: rows.to(device) for name, rows in self.filters.items()}
            moved = [(member.rows.to(device), member.columns) for member in self.members]
            moved = [(rows, columns if columns is None else columns.to(device)) for rows, columns in moved]
            pairs = zip(self.members, moved, strict=True)
            self.members = [member._replace(rows=rows, columns=columns) for member, (rows, columns) in pairs]

    @torch.no_grad()
    def importance(self, model: nn.Module, dead: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over the members of sum w^2, of each class: [number], 0 where there are none.

        dead: bool [number], channels that are pruned; weights that read them do not count.
        """
        weights = [model.get_parameter(member.name) for member in self.members]
        self.move(weights[0].device)
        sums = torch.zeros_like(self.counts)
        for member, weight in zip(self.members, weights, strict=True):
            for classes, values in self.sums(member, weight.detach().float().square(), dead):
                sums.index_add_(0, classes, values)
        return sums / self.counts.clamp(min=1)

    @staticmethod
    def sums(member, squares, dead):
        """[(classes, sums of squares)] of the rows and the columns of a weight."""
        if member.columns is None:
            return [(member.rows, squares.flatten(1).sum(1) if squares.dim() > 1 else squares)]
        grid = filters_and_inputs(member, squares)  # [groups, O / groups, I / groups]
        if dead is not None:
            grid = grid * ~dead[member.columns].view(member.groups, 1, -1)
        return [(member.rows, grid.sum(2).flatten()), (member.columns, grid.sum(1).flatten())]

    @torch.no_grad()
    def push(self, model: nn.Module, factors: torch.Tensor) -> None:
        """Add factors[class] w to the gradient of each member; a weight between two channels gets both. factors: [number]."""
        self.move(factors.device)
        for member in self.members:
            weight = model.get_parameter(member.name)
            if weight.grad is None:
                continue
            rows = factors[member.rows]
            if member.columns is None:
                scale = rows.view(-1, *[1] * (weight.dim() - 1))
            else:
                columns = factors[member.columns].view(member.groups, 1, -1)
                scale = as_weight(member, rows.view(member.groups, -1, 1) + columns, weight)
            weight.grad.addcmul_(scale.to(weight.dtype), weight)


def filters_and_inputs(member, squares):
    """A tensor of the weight's shape, summed over its places -> [groups, O / groups, I / groups]."""
    summed = squares.flatten(2).sum(2) if squares.dim() > 2 else squares
    if member.swapped:  # [I, O / groups]
        return summed.view(member.groups, -1, summed.shape[1]).transpose(1, 2)
    return summed.view(member.groups, -1, summed.shape[1])


def as_weight(member, grid, weight):
    """[groups, O / groups, I / groups] -> what multiplies the weight."""
    if member.swapped:
        grid = grid.transpose(1, 2)
    return grid.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def strengths(importance: torch.Tensor) -> torch.Tensor:
    """gamma of the channels of a group, by their importances [channels]: 2^(4 (I_max - I) / (I_max - I_min)), I the root.

    The importances may have any common factor.
    """
    root = importance.sqrt()
    spread = root.max() - root.min()
    return torch.where(spread > 0, 2 ** (ALPHA * (root.max() - root) / spread), 1.0)


class GroupNorm(GlobalPruner):
    """GroupNorm(model, config_list, optimizer=None, *, example_input); config keys sparsity, op_types, op_names, exclude.

    members: instead of example_input, Members of the model. global_sort=False ranks within each layer.
    """

    TYPES = FilterPruner.TYPES
    GLOBAL = True

    def __init__(self, model, config_list, optimizer=None, *, example_input=None, members=None, global_sort=None):
        super().__init__(model, config_list, optimizer, global_sort=global_sort)
        self.members = members or Members(model, example_input)
        if unmet := [name for name in self.layers if name not in self.members.filters]:
            raise ValueError(
                f'the channels of {", ".join(unmet)} cannot be followed (not used, or transposed convolutions with groups); '
                'leave it out, with --exclude or in config_list'
            )

    def importance(self):
        """The importance of each filter, over the mean of those that are left in its layer."""
        device = next(iter(self.layers.values())).weight.device
        self.members.move(device)
        dead = torch.zeros(self.members.number, dtype=torch.bool, device=device)
        for name, keep in (self.keep or {}).items():
            dead[self.members.filters[name][~keep]] = True
        of_class = self.members.importance(self.model, dead)
        scores = {}
        for name in self.layers:
            score = of_class[self.members.filters[name]]
            left = score if self.keep is None else score[self.keep[name]]
            scores[name] = score / left.mean().clamp(min=torch.finfo(score.dtype).tiny)
        return scores


class Method(OneShot):
    PRUNER = GroupNorm
    SCOPES = ('global', 'layer')
    DEFAULTS = OneShot.DEFAULTS | {'model': 'resnet56', 'clip': 0.0, 'finetune_epochs': 100, 'finetune_lr': 0.01}

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        add('--sparse-epochs', type=positive, default=100, metavar='N', help='epochs of sparse learning' + shown)
        add('--sparse-lr', type=nonnegative, default=0.01, help='their learning rate, a tenth after 60 and 80 %%' + shown)
        add('--reg', type=nonnegative, default=5e-4, help='r, the strength of the push in sparse learning' + shown)
        add('--prune-steps', type=positive, default=400, metavar='N', help='steps in which channels are pruned' + shown)

    def __init__(self, args):
        super().__init__(args)
        self.members = None
        self.model = None
        self.learning = False  # whether this stage is sparse learning

    def options(self):
        return super().options() | {'members': self.members}

    def run(self, job):
        self.model = job.model
        self.members = Members(job.model, job.example)
        self.groups_of_filters = self.distinct_groups(job.model)
        super().run(job)

    def distinct_groups(self, model):
        """The classes of the filters of each layer that is pruned, those of a group once."""
        groups = {}
        for name in self.layer_names(model)[0]:
            classes = self.members.filters.get(name)
            if classes is not None:
                groups[frozenset(classes.tolist())] = classes.unique()
        return list(groups.values())

    def pretrain(self, job):
        super().pretrain(job)
        schedule = {'lr_schedule': 'multistep', 'lr_milestones': [0.6, 0.8], 'lr_gamma': 0.1, 'warmup_epochs': 0.0}
        self.learning = True
        job.fit(self, 'sparse', epochs=self.args.sparse_epochs, lr=self.args.sparse_lr, wd=0.0, **schedule)
        self.learning = False

    def after_backward(self, step, batch):
        if self.learning:
            self.members.push(self.model, self.args.reg * self.strengths_of_channels())
        super().after_backward(step, batch)

    def strengths_of_channels(self):
        """gamma of each class, [number]; 0 for the channels that no layer with filters to prune makes."""
        importance = self.members.importance(self.model)
        gammas = torch.zeros_like(importance)
        for classes in self.groups_of_filters:
            classes = classes.to(importance.device)
            gammas[classes] = strengths(importance[classes])
        return gammas

    def prune(self, job):
        steps = self.args.prune_steps
        for step in range(1, steps):
            self.pruner.sparsity = dict.fromkeys(self.pruner.sparsity, self.args.ptarget * (step / steps))
            self.pruner.update_mask()
        self.pruner.sparsity = dict.fromkeys(self.pruner.sparsity, self.args.ptarget)
        super().prune(job)

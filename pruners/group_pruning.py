"""Dynamic Structure Pruning, the second half: prune each group's input channels; see group_learning.py."""

import bisect
from typing import NamedTuple

import torch

from deploy.channels import channel_graph, dead_norms, live_masks
from sparse_utils import count_macs

from .group_learning import default_example, group_convs, hard_groups, set_group, strip


class Ranking(NamedTuple):
    """How one convolution is pruned at any beta: shares of squared weight, cumulated from the least important on."""

    group: torch.Tensor  # [out]
    channels: torch.Tensor  # [groups, in], ascending
    channel_rank: torch.Tensor  # [groups, in]: the place of each input channel in that order
    filters: torch.Tensor | None  # [out], ascending; None where whole filters are not pruned
    filter_rank: torch.Tensor | None  # [out]: the place of each filter in the order of its own group


def cumulated(energy):
    """[rows, n] -> (cumulated shares of each row in ascending order, up to exactly 1, -1 for zeros; ranks)."""
    values, order = energy.sort(dim=1, stable=True)
    total = values.cumsum(1)
    return torch.where(total > 0, total / total[:, -1:], -1), order.argsort(1)


def ranking(weight, logits, whole_filters, round_to=1):
    """The Ranking of a weight [out, in, h, w], in double precision on the CPU."""
    energy = weight.detach().cpu().double().square().sum((2, 3))
    if not torch.isfinite(energy).all():
        raise ValueError('the weights hold NaN or infinity')
    group = hard_groups(logits.detach().cpu(), round_to)
    by_group = energy.new_zeros(len(logits), weight.shape[1]).index_add_(0, group, energy)
    if not whole_filters:
        return Ranking(group, *cumulated(by_group), None, None)
    shares, rank = (row[0] for row in cumulated(energy.sum(1)[None]))
    same = group[:, None] == group
    return Ranking(group, *cumulated(by_group), shares[rank], (same & (rank < rank[:, None])).sum(1))


def pruned_counts(total, pruned, round_to):
    """How many of `total` to prune so that what is kept of them, at least total - pruned, is a multiple or all."""
    return (total - -(-(total - pruned) // round_to) * round_to).clamp(min=0)


def mask_at(beta, r, round_to=1):
    """Ranking -> bool mask [out, in]: what is under beta in the cumulated shares is pruned, and what is zero in any case."""
    counts = pruned_counts(r.channels.shape[1], (r.channels < beta).sum(1), round_to)
    mask = (r.channel_rank >= counts[:, None])[r.group]
    if r.filters is not None:
        sizes = r.group.bincount(minlength=len(counts))
        counts = pruned_counts(sizes, r.group[r.filters < beta].bincount(minlength=len(counts)), round_to)
        mask &= (r.filter_rank >= counts[r.group])[:, None]
    return mask


class PruneWrapper:
    """Group channel pruning: in each group of filters the input channels of least squared weight go, down to a share of FLOPs.

    model: plain or group-learned. num_groups: as learned. fp_every_nth_conv: in each n-th of the chosen convolutions (counted
    from 1) whole filters are pruned too; the paper takes the last of each residual block. fp_layer_indices: or the convolutions
    with these indices (counted from 0), which wins; -1 or [] is none. round_to: keep channels of a group, filters of a group
    and groups in multiples of this where they are many enough, for kernels that like 8 or 16. example_input, exclude, say: as
    for GroupWrapper; FLOPs are those of the example.

    From construction on each chosen convolution has buffers `group` [num_groups, out_channels] and bool `mask` [out, in, 1, 1],
    so that a group-learned state dict loads before initialize(); one without masks resets them. Raises ValueError for settings
    that cannot work, and for a model that cannot be traced.
    """

    def __init__(
        self,
        model,
        num_groups,
        fp_every_nth_conv=None,
        fp_layer_indices=None,
        example_input=None,
        round_to=1,
        *,
        exclude=None,
        say=print,
    ):
        if not (num_groups >= 1 and round_to >= 1):
            raise ValueError(f'num_groups and round_to must be 1 or more, got {num_groups} and {round_to}')
        example_input = default_example(model) if example_input is None else example_input
        self.model, self.round_to, self.say = model, round_to, say
        self.convs = group_convs(model, example_input, exclude, say)
        self.filters = filter_pruned(list(self.convs), fp_every_nth_conv, fp_layer_indices)
        self.graph = channel_graph(model, example_input)
        macs = {name: dense for name, (dense, _) in count_macs(model, example_input).items()}
        self.kernel_macs = {name: macs[name] / (conv.out_channels * conv.in_channels) for name, conv in self.convs.items()}
        self.macs, self.all_macs = sum(macs[name] for name in self.convs), sum(macs.values())
        self.handles, self.dead, self.seen = [], [], None
        for name, conv in self.convs.items():
            fresh = torch.zeros_like(conv.weight[:, 0, 0, 0].expand(num_groups, -1))
            group = getattr(conv, 'group', fresh).detach()
            if len(group) != num_groups:
                raise ValueError(f'{name} has {len(group)} groups, not {num_groups}')
            set_group(conv, group)
            if not hasattr(conv, 'mask'):
                conv.register_buffer('mask', torch.ones_like(conv.weight[:, :, :1, :1], dtype=torch.bool))
            self.handles.append(conv.register_load_state_dict_pre_hook(without_mask))

    def masks(self):
        """{name: bool [out, in, 1, 1]} of the chosen convolutions."""
        return {name: conv.mask for name, conv in self.convs.items()}

    def initialize(self, pruning_rate):
        """Prune a share of the chosen convolutions' FLOPs, in [0, 1) -> (FLOPs, weights) pruned, in percent.

        The masks come from the present weights and groups, and are applied. The pruned share is the request or little
        more; where it is off by more than a percentage point, a message says why. Raises ValueError for another pruning_rate.
        """
        if not 0 <= pruning_rate < 1:
            raise ValueError(f'the pruning rate is the share of FLOPs to prune, from 0 and below 1, got {pruning_rate}')
        rankings = {
            name: ranking(conv.weight, conv.group, name in self.filters, self.round_to) for name, conv in self.convs.items()
        }
        beta, masks = self.search(rankings, pruning_rate)
        for name, mask in masks.items():
            self.convs[name].mask.copy_(mask[:, :, None, None])
        self.after_step()
        flops, weights = 100 * self.flops_pruned(masks), 100 * self.weights_pruned(masks)
        whole = flops * self.macs / self.all_macs
        self.say(
            f'pruned {flops:.2f} % of the FLOPs and {weights:.2f} % of the weights of these convolutions, '
            f'{whole:.2f} % of the FLOPs of the whole network (beta {beta:.6f})'
        )
        if abs(flops - 100 * pruning_rate) > 1:
            self.say(self.why(rankings, flops, pruning_rate))
        return flops, weights

    def search(self, rankings, rate):
        """(beta, live masks): of the finitely many beta at which anything changes, the first that reaches the rate.

        Or the one before, where that one goes more than a percentage point too far and this one is nearer.
        """
        parts = [part for r in rankings.values() for part in (r.channels, r.filters) if part is not None]
        betas = [0.0, *torch.cat([part[part > 0] for part in parts]).unique().tolist()]
        above = bisect.bisect_left(betas, rate, key=lambda beta: self.flops_pruned(self.masks_at(beta, rankings)))
        below, above = (
            (beta, self.masks_at(beta, rankings)) for beta in (betas[max(above - 1, 0)], betas[min(above, len(betas) - 1)])
        )
        short, over = rate - self.flops_pruned(below[1]), self.flops_pruned(above[1]) - rate
        return below if over > max(short, 0.01) else above

    def masks_at(self, beta, rankings):
        """{name: bool [out, in]}: False for what is under beta, and dead by it. Pruned FLOPs never fall with beta."""
        return live_masks(self.graph, {name: mask_at(beta, r, self.round_to) for name, r in rankings.items()})

    def why(self, rankings, flops, rate):
        """One sentence for a request that was not met."""
        least, most = (100 * self.flops_pruned(self.masks_at(beta, rankings)) for beta in (0.0, 1.0))
        if least >= flops:
            reason = 'so much is zero already, or is dead without the rest'
        elif most < 100 * rate:
            reason = f'no more goes: at least {self.round_to} of the channels of each group stay'
        else:
            reason = 'the neighbouring setting is further from it, as channels that die go together'
        return f'asked for {100 * rate:.2f} %, pruned {flops:.2f} %: {reason}'

    def flops_pruned(self, masks):
        """The share of the chosen convolutions' FLOPs that kernels of zeros make; masks [out, in]."""
        return sum(int((~mask).sum()) * self.kernel_macs[name] for name, mask in masks.items()) / self.macs

    def weights_pruned(self, masks):
        sizes = {name: self.convs[name].weight[0, 0].numel() for name in masks}
        total = sum(mask.numel() * sizes[name] for name, mask in masks.items())
        return sum(int((~mask).sum()) * sizes[name] for name, mask in masks.items()) / total

    def find_dead(self):
        """Which channels of which batch norms are dead; done again when a mask has changed, as by loading a state dict."""
        seen = [(id(conv.mask), conv.mask._version) for conv in self.convs.values()]
        if seen != self.seen:
            norms, dead = dict(self.model.named_modules()), dead_norms(self.graph, self.masks())
            self.dead = [(norms[name], channels) for name, channels in dead.items() if channels.any() and norms[name].affine]
            self.seen = seen

    @torch.no_grad()
    def after_step(self, optimizer=None):
        """Hold what is pruned at zero: weights, biases of dead filters, scale and shift of dead batch norm channels.

        optimizer: given one, it clears its momentum of these, too.
        """
        self.find_dead()
        state = {} if optimizer is None else optimizer.state
        for conv in self.convs.values():
            for tensor in like(conv.weight, state):
                tensor.mul_(conv.mask)
            if conv.bias is not None:
                for tensor in like(conv.bias, state):
                    tensor.mul_(conv.mask.flatten(1).any(1))
        for norm, dead in self.dead:
            for tensor in [*like(norm.weight, state), *like(norm.bias, state)]:
                tensor.masked_fill_(dead, 0)

    def remove(self):
        """Leave the plain model, with its zeros; returns it."""
        for handle in self.handles:
            handle.remove()
        return strip(self.model)


def like(parameter, state):
    """The parameter, and what an optimizer keeps of its shape for it."""
    kept = state[parameter].values() if parameter in state else ()
    return [parameter, *(value for value in kept if torch.is_tensor(value) and value.shape == parameter.shape)]


def without_mask(conv, state, prefix, *_):
    """A group-learned state dict has no masks yet: nothing is pruned."""
    state.setdefault(f'{prefix}mask', torch.ones_like(conv.mask))


def filter_pruned(names, every_nth, indices):
    """The names of the convolutions whose whole filters are pruned, as PruneWrapper's arguments say."""
    if indices is None and every_nth is None:
        raise ValueError('give fp_every_nth_conv or fp_layer_indices; -1 prunes no whole filters')
    if indices is None:
        if every_nth == -1:
            return []
        if every_nth < 1:
            raise ValueError(f'fp_every_nth_conv must be 1 or more, or -1 for none, got {every_nth}')
        return names[every_nth - 1 :: every_nth]
    indices = [indices] if isinstance(indices, int) else list(indices)
    indices = [] if indices == [-1] else indices
    if wrong := [index for index in indices if not 0 <= index < len(names)]:
        raise ValueError(f'fp_layer_indices holds {wrong[0]}, but the {len(names)} convolutions have indices from 0')
    return [names[index] for index in indices]

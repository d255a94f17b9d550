"""Dynamic Structure Pruning, the second half: prune the input channels of each group of filters, down to a share of the FLOPs.

"Dynamic Structure Pruning for Compressing CNNs", Park, Kim, Kim, Choi and Lee, AAAI 2023, arXiv 2303.09736. The groups come
from group_learning.py.

    pruner = PruneWrapper(model, num_groups, fp_every_nth_conv)
    flops, params = pruner.initialize(pruning_rate)      # once, with the group-learned weights
    ...                                                  # each step: forward, backward, optimizer.step(),
    pruner.after_step()                                  # and this

Each filter belongs to the group of its largest logit. The importance of input channel c in group k is its squared weight,
sum_o (W[o,c])^2 over the filters o of the group. Inside a group the channels are sorted by it, and those go whose cumulated
share of the group's importance, up to and with themselves, is below a threshold beta, which is one for the whole network. In
some convolutions whole filters go in the same way. Deviations from the authors' released code:
- beta is searched exactly, over the finitely many values at which anything changes; a small beta prunes little, where the
  authors' prunes everything;
- what is dead follows from the masks and the network's graph alone: nothing runs, and batch norm's statistics stay.
"""

import bisect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from deploy.live import dead_norms, live_masks
from deploy.ties import read_channels
from sparse_utils import count_macs

from .group_learning import default_example, group_convs, hard_groups, remove_groups, set_group
from .momentum import momenta


class Ranking(NamedTuple):
    """How one convolution is pruned at any beta: shares of squared weight, cumulated from the least important on."""

    group: torch.Tensor  # [out]
    channels: torch.Tensor  # [groups, in], ascending
    channel_rank: torch.Tensor  # [groups, in]: the place of each input channel in that order
    filters: torch.Tensor | None  # [out], ascending; None where whole filters are not pruned
    filter_rank: torch.Tensor | None  # [out]: the place of each filter in the order of its own group


def cumulated(energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, n] -> (cumulated shares of each row in ascending order, up to exactly 1, -1 for zeros; ranks)."""
    values, order = energy.sort(dim=1, stable=True)
    total = values.cumsum(1)
    return torch.where(total > 0, total / total[:, -1:], -1), order.argsort(1)


def ranking(weight: torch.Tensor, logits: torch.Tensor, whole_filters: bool, round_to: int = 1) -> Ranking:
    """The Ranking of a weight [out, in, h, w], in double precision on the CPU."""
    energy = weight.detach().cpu().double().square().sum((2, 3))
    if not torch.isfinite(energy).all():
        raise ValueError('the weights hold NaN or infinity')
    group = hard_groups(logits.detach().cpu(), round_to)
    by_group = energy.new_zeros(len(logits), weight.shape[1]).index_add_(0, group, energy)
    if not whole_filters:
        return Ranking(group, *cumulated(by_group), None, None)
    shares, ranks = cumulated(energy.sum(1)[None])
    shares = shares[0]
    rank = ranks[0]
    same_group = group[:, None] == group
    rank_in_group = (same_group & (rank < rank[:, None])).sum(1)
    return Ranking(group, *cumulated(by_group), shares[rank], rank_in_group)


def pruned_counts(total: int | torch.Tensor, pruned: torch.Tensor, round_to: int) -> torch.Tensor:
    """How many of `total` to prune so that what is kept of them, at least total - pruned, is a multiple or all."""
    kept = total - pruned
    rounded_up = -(-kept // round_to) * round_to
    return (total - rounded_up).clamp(min=0)


def mask_at(beta: float, r: Ranking, round_to: int = 1) -> torch.Tensor:
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
    that cannot work, and for a model that cannot be traced. Between optimizer.step() and after_step() momentum and weight decay
    may have moved pruned weights, as in the authors' code.
    """

    def __init__(
        self,
        model: nn.Module,
        num_groups: int,
        fp_every_nth_conv: int | None = None,
        fp_layer_indices: list[int] | int | None = None,
        example_input: torch.Tensor | None = None,
        round_to: int = 1,
        *,
        exclude: list[str] | None = None,
        say: Callable = print,
    ):
        if not (num_groups >= 1 and round_to >= 1):
            raise ValueError(f'num_groups and round_to must be 1 or more, got {num_groups} and {round_to}')
        example_input = default_example(model) if example_input is None else example_input
        self.model = model
        self.round_to = round_to
        self.say = say
        self.convs = group_convs(model, example_input, exclude, say)
        self.filters = convs_that_lose_filters(list(self.convs), fp_every_nth_conv, fp_layer_indices)
        self.channels = read_channels(model, example_input)
        macs = {name: dense for name, (dense, _) in count_macs(model, example_input).items()}
        self.kernel_macs = {name: macs[name] / (conv.out_channels * conv.in_channels) for name, conv in self.convs.items()}
        self.macs = sum(macs[name] for name in self.convs)
        self.all_macs = sum(macs.values())
        self.handles = []
        self.dead = []  # (batch norm, bool [channels])
        self.known_masks = None  # for which `dead` was found
        for name, conv in self.convs.items():
            zeros = torch.zeros_like(conv.weight[:, 0, 0, 0].expand(num_groups, -1))
            group = getattr(conv, 'group', zeros).detach()
            if len(group) != num_groups:
                raise ValueError(f'{name} has {len(group)} groups, not {num_groups}')
            set_group(conv, group)
            if not hasattr(conv, 'mask'):
                conv.register_buffer('mask', torch.ones_like(conv.weight[:, :, :1, :1], dtype=torch.bool))
            self.handles.append(conv.register_load_state_dict_pre_hook(add_full_mask))

    def masks(self) -> dict[str, torch.Tensor]:
        """{name: bool [out, in, 1, 1]} of the chosen convolutions."""
        return {name: conv.mask for name, conv in self.convs.items()}

    def initialize(self, pruning_rate: float) -> tuple[float, float]:
        """Prune a share of the chosen convolutions' FLOPs, in [0, 1) -> (FLOPs, weights) pruned, in percent.

        The masks come from the present weights and groups, and are applied. The pruned share is the request or little
        more; where it is off by more than a percentage point, a message says why. Raises ValueError for another pruning_rate.
        """
        if not 0 <= pruning_rate < 1:
            raise ValueError(f'the pruning rate is the share of FLOPs to prune, from 0 and below 1, got {pruning_rate}')
        rankings = {}
        for name, conv in self.convs.items():
            rankings[name] = ranking(conv.weight, conv.group, name in self.filters, self.round_to)
        beta, masks = self.search(rankings, pruning_rate)
        for name, mask in masks.items():
            self.convs[name].mask.copy_(mask[:, :, None, None])
        self.after_step()
        flops = 100 * self.flops_pruned(masks)
        weights = 100 * self.weights_pruned(masks)
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
        shares = [r.channels for r in rankings.values()] + [r.filters for r in rankings.values() if r.filters is not None]
        betas = [0.0, *torch.cat([share[share > 0] for share in shares]).unique().tolist()]
        place = bisect.bisect_left(betas, rate, key=lambda beta: self.flops_pruned(self.masks_at(beta, rankings)))
        above = betas[min(place, len(betas) - 1)]
        below = betas[max(place - 1, 0)]
        masks_above = self.masks_at(above, rankings)
        masks_below = self.masks_at(below, rankings)
        too_much = self.flops_pruned(masks_above) - rate
        too_little = rate - self.flops_pruned(masks_below)
        if too_much > max(too_little, 0.01):
            return below, masks_below
        return above, masks_above

    def masks_at(self, beta: float, rankings: dict[str, Ranking]) -> dict[str, torch.Tensor]:
        """{name: bool [out, in]}: False for what is under beta, and dead by it. Pruned FLOPs never fall with beta."""
        return live_masks(self.channels, {name: mask_at(beta, r, self.round_to) for name, r in rankings.items()})

    def why(self, rankings, flops, rate):
        """One sentence for a request that was not met."""
        fewest = 100 * self.flops_pruned(self.masks_at(0.0, rankings))
        most = 100 * self.flops_pruned(self.masks_at(1.0, rankings))
        if fewest >= flops:
            reason = 'so much is zero already, or is dead without the rest'
        elif most < 100 * rate:
            reason = f'no more goes: at least {self.round_to} of the channels of each group stay'
        else:
            reason = 'the neighbouring setting is further from it, as channels that die go together'
        return f'asked for {100 * rate:.2f} %, pruned {flops:.2f} %: {reason}'

    def flops_pruned(self, masks: dict[str, torch.Tensor]) -> float:
        """The share of the chosen convolutions' FLOPs that kernels of zeros make; masks [out, in]."""
        return sum(int((~mask).sum()) * self.kernel_macs[name] for name, mask in masks.items()) / self.macs

    def weights_pruned(self, masks: dict[str, torch.Tensor]) -> float:
        """The share of the chosen convolutions' weights in kernels of zeros; masks [out, in]."""
        sizes = {name: self.convs[name].weight[0, 0].numel() for name in masks}
        total = sum(mask.numel() * sizes[name] for name, mask in masks.items())
        return sum(int((~mask).sum()) * sizes[name] for name, mask in masks.items()) / total

    def find_dead(self):
        """Which channels of which batch norms are dead; done again when a mask has changed, as by loading a state dict."""
        masks = [(id(conv.mask), conv.mask._version) for conv in self.convs.values()]
        if masks == self.known_masks:
            return
        self.known_masks = masks
        self.dead = []
        for name, channels in dead_norms(self.channels, self.masks()).items():
            norm = self.model.get_submodule(name)
            if channels.any() and norm.affine:
                self.dead.append((norm, channels))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Hold what is pruned at zero: weights, biases of dead filters, scale and shift of dead batch norm channels.

        optimizer: given one, it clears its momentum of these, too.
        """
        self.find_dead()
        for conv in self.convs.values():
            for tensor in [conv.weight, *momenta(optimizer, conv.weight)]:
                tensor.mul_(conv.mask)
            if conv.bias is not None:
                for tensor in [conv.bias, *momenta(optimizer, conv.bias)]:
                    tensor.mul_(conv.mask.flatten(1).any(1))
        for norm, dead in self.dead:
            for parameter in (norm.weight, norm.bias):
                for tensor in [parameter, *momenta(optimizer, parameter)]:
                    tensor.masked_fill_(dead, 0)

    def remove(self) -> nn.Module:
        """Leave the plain model, with its zeros; returns it."""
        for handle in self.handles:
            handle.remove()
        return remove_groups(self.model)


def shares_pruned(convs: dict[str, nn.Conv2d], macs: dict[str, tuple[int, int]]) -> tuple[float, float]:
    """The shares of FLOPs and of weights of these convolutions that kernels of zeros make; macs: of count_macs()."""
    flops = 0.0
    weights = 0
    for name, conv in convs.items():
        zeros = (conv.weight == 0).flatten(2).all(2)
        flops += macs[name][0] * zeros.double().mean().item()
        weights += int(zeros.sum()) * conv.weight[0, 0].numel()
    return flops / sum(macs[name][0] for name in convs), weights / sum(conv.weight.numel() for conv in convs.values())


def add_full_mask(conv, state, prefix, *_):
    """A group-learned state dict has no masks yet: nothing is pruned."""
    state.setdefault(f'{prefix}mask', torch.ones_like(conv.mask))


def convs_that_lose_filters(names: list[str], every_nth: int | None, indices: list[int] | int | None) -> list[str]:
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

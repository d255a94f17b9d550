"""Group-norm pruning: the importance and the push of Fang et al., by hand, against loops, and against Torch-Pruning's."""

import pytest
import torch
from helpers import Residual, run_main
from torch import nn

import archs
from methods.group_norm import GroupNorm, Members, strengths


def by_hand():
    """Two channels: filters (1) and (2), scales 3 and 1, columns (1, 2) and (0, 2) of a linear layer."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    net[0].weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    net[1].weight.data = torch.tensor([3.0, 1.0])
    net[5].weight.data = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    return net.eval()


def test_the_strength_of_the_push_by_hand():
    """Sums 4, 1 and 9: roots 2, 1 and 3, so exponents 4 (3 - 2) / 2, 4 and 0."""
    assert strengths(torch.tensor([4.0, 1.0, 9.0])).tolist() == [4, 16, 1]
    assert strengths(torch.tensor([4.0, 1.0, 9.0]) / 9).tolist() == pytest.approx([4, 16, 1], rel=1e-5)
    assert strengths(torch.full((3,), 5.0)).tolist() == [1, 1, 1] and strengths(torch.zeros(1)).tolist() == [1]


def test_importance_by_hand():
    """(1 + 9 + 1 + 4) / 3 = 5 and (4 + 1 + 0 + 4) / 3 = 3; without biases, which are random."""
    net = by_hand()
    members = Members(net, torch.zeros(1, 1, 4, 4))
    classes = members.filters['0']
    assert members.importance(net)[classes].tolist() == pytest.approx([5, 3])
    assert members.importance(net)[members.filters['5']].tolist() == pytest.approx([1, 8])
    dead = torch.zeros(members.number, dtype=torch.bool)
    dead[classes[0]] = True  # its columns no longer count for the rows of the linear layer
    assert members.importance(net, dead)[members.filters['5']].tolist() == pytest.approx([0, 4])
    pruner = GroupNorm(net, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], members=members)
    assert pruner.importance()['0'].tolist() == pytest.approx([5 / 4, 3 / 4])
    pruner.compress()
    assert net[0].weight.flatten().tolist() == [1, 0] and net[1].weight.tolist() == [3, 0] and net[1].bias[1] == 0


def test_the_push_by_hand():
    net = by_hand()
    members = Members(net, torch.zeros(1, 1, 4, 4))
    factors = torch.zeros(members.number)
    factors[members.filters['0']] = torch.tensor([0.5, 2.0])
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    members.push(net, factors)
    assert net[0].weight.grad.flatten().tolist() == [1.5, 5]
    assert net[1].weight.grad.tolist() == [2.5, 3]
    assert net[5].weight.grad.tolist() == [[1.5, 1], [2, 5]]
    assert net[0].bias.grad.tolist() == net[1].bias.grad.tolist() == net[5].bias.grad.tolist() == [1, 1]


def test_columns_behind_a_flattened_map_are_one_members():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 3)).eval()
    members = Members(net, torch.zeros(1, 1, 2, 2))
    columns = net[2].weight.square().sum(0)
    expected = (net[0].weight.flatten().square() + torch.stack([columns[:4].sum(), columns[4:].sum()])) / 2
    assert torch.allclose(members.importance(net)[members.filters['0']], expected)


class Kinds(nn.Module):
    """A depthwise, a grouped and a transposed convolution behind one another."""

    def __init__(self):
        super().__init__()
        self.a, self.deep, self.norm = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)
        self.up, self.b = nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 4, 1, groups=2)

    def forward(self, x):
        return self.b(self.up(self.norm(self.deep(self.a(x))))).mean((2, 3))


def test_kinds_of_convolutions_against_loops():
    torch.manual_seed(0)
    net = Kinds().eval()
    net.norm.weight.data = torch.rand(4)
    members = Members(net, torch.zeros(1, 2, 6, 6))
    found = members.importance(net)
    first = [
        sum(t.square().sum() for t in (net.a.weight[k], net.deep.weight[k], net.norm.weight[k], net.up.weight[k])) / 4
        for k in range(4)
    ]
    assert torch.equal(members.filters['a'], members.filters['deep'])
    assert torch.allclose(found[members.filters['a']], torch.stack(first))
    second = []
    for k in range(6):
        group, place = divmod(k, 3)
        rows = net.up.weight[:, k]
        columns = net.b.weight[2 * group : 2 * group + 2, place]
        second.append((rows.square().sum() + columns.square().sum()) / 2)
    assert torch.allclose(found[members.filters['up']], torch.stack(second))
    factors = torch.rand(members.number)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    members.push(net, factors)
    ups, ins, outs = (factors[members.filters[name]] for name in ('up', 'deep', 'b'))
    assert torch.allclose(net.up.weight.grad, (ins[:, None] + ups)[..., None, None] * net.up.weight)
    for i in range(4):
        for place in range(3):
            assert torch.allclose(net.b.weight.grad[i, place], (outs[i] + ups[3 * (i // 2) + place]) * net.b.weight[i, place])


def test_importance_is_torch_prunings():
    torch_pruning = pytest.importorskip('torch_pruning')
    torch.manual_seed(0)
    net = Residual().eval()
    net.norm.weight.data = torch.rand(6)
    example = torch.zeros(1, 2, 8, 8)
    pruner = GroupNorm(net, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], members=Members(net, example))
    graph = torch_pruning.DependencyGraph().build_dependency(net, example)
    for name, layer in (('stem', net.stem), ('front', net.front)):
        group = graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, list(range(layer.out_channels)))
        theirs = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction='mean', normalizer='mean')(group)
        assert torch.allclose(pruner.importance()[name], theirs, rtol=1e-4)


SHORT = ['--method=group_norm', '--epochs=1', '--sparse-epochs=2', '--finetune-epochs=1', '--ptarget=0.5', '--prune-steps=4']


def test_sparse_learning_shrinks_the_weakest_and_pruning_is_in_steps(tmp_path, trained):
    result, state = run_main(tmp_path / 'run', *SHORT, '--reg=20', '--sparse-lr=5e-4')
    assert trained == ['pretrain', 'sparse', 'sparse', 'finetune'] and result['small_parameters'] < result['dense_parameters']
    ends = [torch.load(tmp_path / 'run' / f'stage-{name}.pt', weights_only=True)['model'] for name in ('pretrain', 'sparse')]
    before, after = (end['stage2.0.conv1.weight'].flatten(1).norm(dim=1) for end in ends)
    net = archs.build('resnet20', 10, width=4, in_channels=1)
    net.load_state_dict(ends[0])
    members = Members(net, torch.zeros(1, 1, 8, 8))
    importance = members.importance(net)[members.filters['stage2.0.conv1']]
    shrunk = after / before
    assert (shrunk < 1).all() and shrunk[importance.argmin()] < shrunk[importance.argmax()] - 0.1


def test_a_layer_whose_channels_cannot_be_followed():
    net = by_hand()
    members = Members(net, torch.zeros(1, 1, 4, 4))
    net.spare = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match='the channels of spare cannot be followed'):
        GroupNorm(net, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], members=members)

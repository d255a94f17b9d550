"""Packing: outputs equal to the masked network's, sizes spelled out for hand-made masks, and the choice by measurement."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import archs
from deploy import load, outputs, packing, read, save, write_pt2, write_torchscript
from deploy.packing import fold, pack
from deploy.ways import MULTIPLES
from deploy.writing import write

WAYS = ['whole', 'gathered', 'branches']


def randomise(model):
    """Batch norms as if trained: what a dead filter emits is not zero, and no layer keeps its scale."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)
            nn.init.normal_(layer.running_mean, 0, 0.3)
    return model.eval()


def mask_by_groups(model, groups, kept=0.6, dead=0.2):
    """A `mask` on each convolution: filters in groups, a set of live inputs for each group, some filters dead."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            group = torch.randint(groups, (layer.out_channels,))
            live = torch.rand(groups, layer.in_channels // layer.groups) < kept
            alive = torch.rand(layer.out_channels) >= dead
            layer.register_buffer('mask', (live[group] & alive[:, None])[:, :, None, None])
    return model


def masked(model):
    """The reference: the same network with pruned kernels set to zero, run by its own code."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and hasattr(layer, 'mask'):
            layer.weight.data *= layer.mask
    return model


def assert_same(model, packed, size=16, channels=3):
    reference = masked(model)
    for batch in (1, 5):
        x = torch.randn(batch, channels, size, size)
        with torch.no_grad():
            expected, found = reference(x), packed(x)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def in_all_ways(model, example):
    """What pack() makes of a model in each way; the model is read once."""
    base, network, _ = packing.prepared(model, example)
    for how in WAYS:
        packed = write(network, packing.always(how))
        packing.check(base, packed, example)
        yield packed


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def shapes(packed):
    """{name: [filters, inputs]} of the convolutions."""
    return {n: list(layer.weight.shape[:2]) for n, layer in packed.named_modules() if isinstance(layer, nn.Conv2d)}


def calls(packed, function):
    return sum(node.target in (function, getattr(function, '__name__', None)) for node in packed.graph.nodes)


def set_mask(layer, *rows):
    mask = torch.tensor([[character == '1' for character in row] for row in rows])
    layer.register_buffer('mask', mask[:, :, None, None])


# --------------------------------------------------------------------------------------------------------- every network


NETWORKS = ['resnet20', 'densenet', 'mobilenet_v1', 'wrn10_1', 'lenet300_100', 'vgg16']


@pytest.mark.parametrize('name', NETWORKS)
def test_every_network_packs_with_the_same_outputs(name):
    torch.manual_seed(0)
    size = 32 if name in ('vgg16', 'lenet300_100') else 16
    model = mask_by_groups(randomise(archs.build(name, 10, image_size=size)), groups=3)
    for packed in in_all_ways(model, torch.randn(2, 3, size, size)):
        assert_same(model, packed, size)
        assert not any(isinstance(layer, nn.Identity) for layer in packed.modules())
        if name == 'lenet300_100':
            assert parameters(packed) == parameters(model)
        else:
            assert parameters(packed) < 0.95 * parameters(model)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_torchvision_resnets_pack_with_the_same_outputs(name):
    torch.manual_seed(0)
    model = mask_by_groups(randomise(archs.build(name, 10)), groups=2)
    packed = pack(model, torch.randn(1, 3, 32, 32), 'branches')
    assert_same(model, packed, 32)
    assert parameters(packed) < 0.7 * parameters(model)


@pytest.mark.parametrize('groups', [1, 2, 5])
def test_any_number_of_branches(groups):
    torch.manual_seed(0)
    model = mask_by_groups(randomise(archs.build('resnet20', 10, width=16)), groups, dead=0)
    packed = pack(model, torch.randn(1, 3, 16, 16), 'branches')
    assert_same(model, packed)
    branches = [name for name in shapes(packed) if name.startswith('stage3.1.conv1')]
    assert len(branches) == groups


def test_unpruned_and_zeroed_weights_without_a_mask_buffer():
    torch.manual_seed(0)
    model = randomise(archs.build('resnet20', 10, width=8))
    assert_same(model, pack(model, torch.randn(1, 3, 16, 16), 'branches'))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= torch.rand(layer.weight.shape[:2])[:, :, None, None] > 0.5
    assert_same(model, pack(model, torch.randn(1, 3, 16, 16), 'whole'))
    assert_same(model, pack(model, torch.randn(1, 3, 16, 16), 'branches'))


# ------------------------------------------------------------------------------------------------------ masks made by hand


def chain(*convs):
    """conv, batch norm, ReLU for each; the batch norms of dead filters emit nothing."""
    model = nn.Sequential(*[layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())])
    return model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(convs[-1].out_channels, 2)).eval()


def silence(model):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.zeros_(layer.bias)
            nn.init.zeros_(layer.running_mean)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


def two_groups():
    """Filters 0, 1 of '3' read channels 0, 1, 2 and filters 2, 3 channels 2, 3; nobody reads channels 4 and 5."""
    torch.manual_seed(0)
    model = silence(chain(nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)))
    set_mask(model[3], '111000', '111000', '001100', '001100')
    return model


def test_whole_drops_dead_inputs_and_outputs():
    packed = pack(two_groups(), torch.randn(1, 2, 8, 8), 'whole')
    assert shapes(packed) == {'0': [4, 2], '3': [4, 4]}
    assert packed.meta['layers'] == ['0: whole 2 -> 4', '3: whole 4 -> 4']
    assert_same(two_groups(), packed, channels=2)


def test_branches_have_the_sizes_of_the_groups():
    packed = pack(two_groups(), torch.randn(1, 2, 8, 8), 'branches')
    assert shapes(packed) == {'0': [4, 2], '3.0': [2, 3], '3.1': [2, 2]}
    assert packed.meta['layers'][1] == '3: branches 3 -> 2, 2 -> 2'
    assert_same(two_groups(), packed, channels=2)


def test_two_branches_read_neighbours_and_copy_nothing():
    """The convolution in front puts its filters in an order in which both branches read a view."""
    model = two_groups()
    set_mask(model[3], '101010', '101010', '010110', '010110')
    packed = pack(model, torch.randn(1, 2, 8, 8), 'branches')
    assert calls(packed, torch.narrow) == 2 and calls(packed, torch.index_select) == 0
    assert_same(model, packed, channels=2)


def test_gathered_takes_what_is_read_out_of_a_wider_tensor():
    model = two_groups()
    model[0] = nn.Conv2d(2, 6, 3, padding=1, bias=False)
    set_mask(model[0], '10', '10', '10', '10', '10', '10')
    packed = pack(model, torch.randn(1, 2, 8, 8), 'gathered')
    assert shapes(packed) == {'0': [4, 1], '3': [4, 4]}
    assert_same(model, packed, channels=2)


def test_a_constant_goes_into_the_bias_of_a_reader_without_padding():
    model = chain(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 1))
    randomise(model)
    set_mask(model[0], '11', '00', '11')
    nn.init.constant_(model[1].bias, 2.0)  # filter 1 is dead, its batch norm emits a positive constant
    packed = pack(model, torch.randn(1, 2, 8, 8), 'whole')
    assert shapes(packed) == {'0': [2, 2], '3': [4, 2]}
    assert_same(model, packed, channels=2)


def test_a_constant_stays_where_zero_padding_makes_it_uneven():
    model = chain(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1))
    randomise(model)
    set_mask(model[0], '11', '00', '11')
    nn.init.constant_(model[1].bias, 2.0)
    packed = pack(model, torch.randn(1, 2, 8, 8), 'whole')
    assert shapes(packed) == {'0': [3, 2], '3': [4, 3]}
    assert packed.get_submodule('0').weight[1].eq(0).all() and packed.get_submodule('0').bias[1] != 0
    assert_same(model, packed, channels=2)
    nn.init.constant_(model[1].bias, -20.0)  # behind the ReLU it is zero, and goes
    assert shapes(pack(model, torch.randn(1, 2, 8, 8), 'whole')) == {'0': [2, 2], '3': [4, 2]}


def test_a_batch_norm_with_zero_scale_makes_a_filter_dead():
    model = silence(chain(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)))
    model[1].weight.data[2] = 0
    assert shapes(pack(model, torch.randn(1, 2, 8, 8), 'whole')) == {'0': [2, 2], '3': [4, 2]}


# ---------------------------------------------------------------------------------------------------------- residual blocks


class Block(nn.Module):
    """stem -> (conv1 -> conv2) + shortcut -> last, in 4 channels."""

    def __init__(self, shortcut=None):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, stride=2 if shortcut else 1, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut, self.last = shortcut or nn.Identity(), nn.Conv2d(4, 3, 3)

    def forward(self, x):
        x = F.relu(self.stem_bn(self.stem(x)))
        out = F.relu(self.bn1(self.conv1(x)))
        return self.last(F.relu(self.bn2(self.conv2(out)) + self.shortcut(x)))


def test_live_filters_are_added_into_the_shortcut():
    torch.manual_seed(0)
    model = silence(Block()).eval()
    set_mask(model.conv2, '1100', '0000', '0011', '0000')
    packed = pack(model, torch.randn(1, 2, 8, 8), 'branches')
    assert shapes(packed)['conv2.0'] == [1, 2] and shapes(packed)['conv2.1'] == [1, 2]
    assert packed.meta['layers'][2] == 'conv2: branches 2 -> 1, 2 -> 1 added'
    assert_same(model, packed, channels=2)
    assert shapes(pack(model, torch.randn(1, 2, 8, 8), 'whole'))['conv2'] == [4, 4]


@pytest.mark.parametrize('dead', ['conv1', 'conv2'])
@pytest.mark.parametrize('constants', [False, True])
def test_a_dead_block_is_its_shortcut(dead, constants):
    torch.manual_seed(0)
    model = randomise(Block()) if constants else silence(Block()).eval()
    set_mask(getattr(model, dead), '0000', '0000', '0000', '0000')
    for packed in in_all_ways(model, torch.randn(1, 2, 8, 8)):
        assert_same(model, packed, channels=2)
        if not constants:
            assert set(shapes(packed)) == {'stem', 'last'}
            assert packed.meta['layers'][1:3] == ['conv1: dead', 'conv2: dead']


def test_strides_and_a_shortcut_of_its_own():
    torch.manual_seed(0)
    model = randomise(Block(nn.Sequential(nn.Conv2d(4, 4, 1, stride=2), nn.BatchNorm2d(4))))
    mask_by_groups(model, 2, kept=0.7)
    for packed in in_all_ways(model, torch.randn(1, 2, 9, 9)):
        assert_same(model, packed, 9, channels=2)


def test_a_dead_network_still_gives_its_constant_output():
    model = randomise(chain(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)))
    set_mask(model[0], '00', '00', '00')
    packed = pack(model, torch.randn(1, 2, 8, 8), 'branches')
    assert_same(model, packed, 8, channels=2)
    assert parameters(packed) < parameters(model) / 2


# ------------------------------------------------------------------------------------------------------- all sorts of layers


def sorts_of_layers():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.down, self.up = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

        def forward(self, x):
            x = F.silu(self.conv(x))
            return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))

    class OptionA(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 12, 3, stride=2, padding=1)

        def forward(self, x):
            return F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8 * 64, 3)

        def forward(self, x):
            x = self.conv(x)
            scale = x.mean((2, 3)).view(-1, 8, 1, 1)
            return self.fc((x * scale).view(x.size(0), -1))

    conv = nn.Conv2d
    return {
        'dilated': [conv(8, 8, 3, dilation=2, padding=2)],
        'same': [conv(8, 8, 3, padding='same')],
        'reflected': [conv(8, 8, 3, padding=1, padding_mode='reflect')],
        'depthwise': [conv(8, 8, 3, padding=1, groups=8)],
        'depth multiplier': [conv(8, 16, 3, padding=1, groups=8), nn.ReLU(), conv(16, 8, 1)],
        'grouped': [conv(8, 8, 3, padding=1, groups=2)],
        'group norm': [nn.GroupNorm(2, 8)],
        'pooled with zeros': [nn.AvgPool2d(3, stride=1, padding=1)],
        'prelu': [nn.PReLU(8)],
        'transposed': [nn.ConvTranspose2d(8, 8, 3)],
        'softplus': [nn.Softplus()],
        'gate': [Gate()],
        'option A': [OptionA(), conv(12, 8, 1)],
        'views': [Views()],
        'log softmax': [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.LogSoftmax(1)],
        'large linear': [nn.Flatten(), nn.Linear(8 * 64, 3)],
    }


@pytest.mark.parametrize('sort', sorts_of_layers())
def test_all_sorts_of_layers(sort):
    torch.manual_seed(0)
    layers = sorts_of_layers()[sort]
    ending = [] if sort in ('views', 'log softmax', 'large linear') else [nn.Conv2d(8, 3, 3)]
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *layers, *ending)
    mask_by_groups(randomise(model), 2, kept=0.7, dead=0.3)
    for packed in in_all_ways(model, torch.randn(1, 2, 8, 8)):
        assert_same(model, packed, 8, channels=2)


# -------------------------------------------------------------------------------------------------------------- refusals


class Odd(nn.Module):
    """Two convolutions of 4 channels, three of them alive in the first, and something between them."""

    def __init__(self, between, channels=4, **layers):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last, self.fc = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(4, 3)
        self.between = between
        for name, layer in layers.items():
            setattr(self, name, layer)

    def body(self, x):
        return self.last(self.between(self, F.relu(self.norm(self.first(x)))))

    def forward(self, x):
        return self.fc(F.relu(self.body(x)).mean((2, 3)))


def odd(between, kind=Odd, channels=4, **layers):
    torch.manual_seed(0)
    model = silence(kind(between, channels, **layers)).eval()
    set_mask(model.first, '11', '00', '10', '11')
    set_mask(model.last, *[row[:channels] for row in ('1100', '1100', '0011', '0011')])
    return model


def test_a_layer_that_is_used_twice_stays_dense():
    model = odd(lambda net, x: net.twice(net.twice(x)), twice=nn.Conv2d(4, 4, 1))
    packed = pack(model, torch.randn(1, 2, 8, 8), 'branches')
    assert packed.meta['layers'][1] == 'twice: whole 4 -> 4, dense as it is used more than once'
    assert_same(model, packed, 8, channels=2)


def test_a_norm_without_statistics_stays():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)).eval()
    x = torch.randn(3, 2, 8, 8)
    assert outputs.compare(model, pack(model, x, 'whole'), x) < 1e-5


def test_what_cannot_be_read_is_refused_with_the_line():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    x = torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match='cannot trace Branching.*torch.where'):
        pack(Branching(), x)
    with pytest.raises(ValueError, match="how must be .* not 'fast'"):
        pack(two_groups(), x, 'fast')


def test_a_weight_that_is_computed_stays_dense():
    class Standardised(nn.Conv2d):  # does not compute with its weight as it is
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(Standardised(2, 2, 3)).eval()
    packed = pack(model, torch.randn(1, 2, 8, 8), 'whole')
    assert_same(model, packed, 8, channels=2)
    assert packed.meta['layers'][0].startswith('0: dense, as conv2d in 0 (test_packing.py, line ')
    assert packed.meta['layers'][0].endswith(') computes its weight')


def test_different_outputs_are_refused():
    class Noisy(nn.Module):  # computes something else each time
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3)

        def forward(self, x):
            return self.conv(x) * torch.rand(())

    with pytest.raises(ValueError, match='Noisy cannot be packed: outputs would differ'):
        pack(Noisy().eval(), torch.randn(1, 2, 8, 8), 'whole')


def test_what_stays_is_named_with_its_reason():
    model = odd(lambda net, x: net.group(x), group=nn.GroupNorm(2, 4))
    packed = pack(model, torch.randn(1, 2, 8, 8), 'whole')
    assert packed.meta['layers'][-1].startswith('first: 1 dead filter stays: group_norm in group (test_packing.py, line ')
    assert_same(model, packed, 8, channels=2)


# ------------------------------------------------------------------------------------------------- networks of every kind


class Nested(Odd):
    def forward(self, x):
        x = self.body(x)
        return {'maps': [x, (x.flatten(1), None)], 'out': self.fc(x.mean((2, 3))), 'number': 3}


class Keywords(Odd):
    def forward(self, x, mask=None, *, scale=None, more=()):
        x = self.first(x) if mask is None else self.first(x) * mask
        x = x if scale is None else x * scale
        return self.fc(self.last(F.relu(self.norm(x + sum(more)))).mean((2, 3)))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 4, stride=4), nn.LayerNorm(8)
        self.attend, self.place = nn.MultiheadAttention(8, 2, batch_first=True), nn.Parameter(torch.randn(1, 4, 8))
        self.conv, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x).flatten(2).transpose(1, 2) + self.place
        y = self.norm(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        x = x.transpose(1, 2).unflatten(2, (2, 2))
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def attending():
    torch.manual_seed(0)
    model = Attending().eval()
    set_mask(model.conv, '11110000', '11110000', '00001111', '00000000', '00001111', '00001111')
    nn.init.zeros_(model.conv.bias)
    return model


def images():
    return torch.randn(2, 2, 8, 8)


def squeeze(net, x):
    return x * torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))


def shuffled(net, x):
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


KINDS = {
    'nested outputs': lambda: (odd(lambda net, x: x, Nested), images()),
    'several inputs': lambda: (odd(None, Keywords), (images(), torch.rand(2, 4, 1, 1))),
    'inputs by name': lambda: (odd(None, Keywords), {'x': images(), 'mask': None, 'scale': torch.rand(2, 4, 1, 1)}),
    'nested inputs': lambda: (odd(None, Keywords), {'x': images(), 'more': [torch.rand(2, 4, 8, 8)] * 2}),
    'layer norm': lambda: (odd(lambda net, x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)), images()),
    'squeeze and excite': lambda: (odd(squeeze, down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1)), images()),
    'chunk': lambda: (odd(lambda net, x: torch.mul(*x.chunk(2, 1)), channels=2), images()),
    'split': lambda: (
        odd(lambda net, x: torch.cat([x.split(2, 1)[1], net.one(x.split(2, 1)[0])], 1), one=nn.Conv2d(2, 2, 1)),
        images(),
    ),
    'shuffle': lambda: (odd(shuffled), images()),
    'in place': lambda: (odd(lambda net, x: F.relu_(net.one(x).add_(x)).mul_(2), one=nn.Conv2d(4, 4, 1)), images()),
    'grouped': lambda: (odd(lambda net, x: net.two(x), two=nn.Conv2d(4, 4, 3, padding=1, groups=2)), images()),
    'pooled': lambda: (odd(lambda net, x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2)), images()),
    'attention': lambda: (attending(), images()),
    'one dimension': lambda: (nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3)), torch.randn(2, 2, 9)),
}


@pytest.mark.parametrize('kind', KINDS)
def test_networks_of_every_kind_pack_save_and_load(kind, tmp_path):
    """Other batch sizes than the example's, and a file that holds no code."""
    model, example = KINDS[kind]()
    fresh = outputs.change_tensors(lambda tensor: torch.rand(5, *tensor.shape[1:]), example)
    for packed in in_all_ways(model, example):
        assert outputs.compare(masked(model), packed, fresh) < 1e-5
    save(packed, tmp_path / 'packed', example)
    assert outputs.compare(packed, load(tmp_path / 'packed'), fresh) == 0
    assert kind == 'one dimension' or parameters(packed) < parameters(model)


def test_outputs_keep_their_nesting_and_inputs_their_names():
    model, x = KINDS['nested outputs']()
    expected, found = masked(model)(x), pack(model, x, 'whole')(x)
    assert list(found) == ['maps', 'out', 'number'] and found['number'] == 3 and found['maps'][1][1] is None
    torch.testing.assert_close(found['maps'][0], expected['maps'][0], rtol=1e-4, atol=1e-5)
    model, example = KINDS['inputs by name']()
    packed = pack(model, example, 'whole')
    assert torch.equal(packed(x=example['x'], scale=example['scale']), packed(**example))  # what was None may be left out


@pytest.mark.parametrize('wrap', [nn.DataParallel, lambda model: torch.compile(model, backend='eager')])
def test_wrapped_networks_pack_from_the_network_inside(wrap):
    model = two_groups()
    with pytest.warns(UserWarning, match='is taken off'):
        packed = pack(wrap(model), torch.randn(1, 2, 8, 8), 'branches')
    assert_same(model, packed, 8, channels=2)


def test_a_fixed_batch_size_is_warned_of():
    model = odd(lambda net, x: x.view(2, -1, 8, 8))
    with pytest.warns(UserWarning, match='Odd fixes its batch size: the packed one takes 2 at a time'):
        packed = pack(model, images(), 'branches')
    x = images()
    assert outputs.compare(masked(model), packed, x) < 1e-5


def torchvision_network(name):
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig

    if name == 'resnet':
        return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    if name == 'convnext':
        return models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5)
    return models.ShuffleNetV2([1, 1, 1], [8, 16, 16, 32, 32], num_classes=5)


@pytest.mark.parametrize('name', ['resnet', 'convnext', 'shufflenet'])
def test_torchvision_networks_go_into_files_of_every_format(name, tmp_path):
    torch.manual_seed(0)
    model, example = mask_by_groups(randomise(torchvision_network(name)), 2), torch.randn(2, 3, 32, 32)
    *_, packed = in_all_ways(model, example)
    assert_same(model, packed, 32)
    save(packed, tmp_path / 'packed', example)
    write_pt2(packed, example, tmp_path / 'packed.pt2')
    write_torchscript(packed, example, tmp_path / 'packed.ts')
    fresh = torch.randn(3, 3, 32, 32)
    for file in ('packed.json', 'packed.pt2', 'packed.ts'):
        torch.testing.assert_close(read(tmp_path / file, trust=True)(fresh), packed(fresh), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ the packed network


def test_the_model_stays_as_it_is():
    torch.manual_seed(0)
    model = mask_by_groups(archs.build('resnet20', 10, width=4), 2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack(model, torch.randn(2, 3, 16, 16), 'branches')
    assert model.training and not packed.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    ours, theirs = ({tensor.data_ptr() for tensor in m.state_dict().values()} for m in (packed, model))
    assert not ours & theirs


def test_it_is_made_of_plain_layers_and_can_be_trained():
    torch.manual_seed(0)
    model = mask_by_groups(randomise(archs.build('resnet20', 10, width=4)), 2)
    packed = pack(model, torch.randn(2, 3, 16, 16), 'branches')
    for node in packed.graph.nodes:
        if node.op == 'call_module':
            assert type(packed.get_submodule(node.target)).__module__.startswith('torch.nn.')
        if node.op == 'get_attr':
            assert node.target in dict(packed.named_buffers())
    packed(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in packed.parameters())
    torch.fx.symbolic_trace(packed)


def test_folding_leaves_the_size_and_no_batch_norm():
    torch.manual_seed(0)
    model = mask_by_groups(randomise(archs.build('resnet20', 10, width=8)), 2)
    folded = fold(model, torch.randn(1, 3, 16, 16))
    assert_same(model, folded)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    sizes = {name: list(layer.weight.shape[:2]) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    assert shapes(folded) == sizes


# ------------------------------------------------------------------------------------------------ choosing by measurement


def test_a_simpler_way_wins_within_the_margin():
    assert packing.simplest([1.0, 0.99, 0.985]) == 0
    assert packing.simplest([1.0, 0.9, 0.95]) == 1
    assert packing.simplest([1.0, 0.9, 0.5]) == 2


def test_measured_packing_keeps_outputs_and_says_what_it_chose():
    torch.manual_seed(0)
    model = mask_by_groups(randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), Block8())), 2)
    packed = pack(model, torch.randn(2, 3, 16, 16))
    assert_same(model, packed)
    assert [line.split(':')[0] for line in packed.meta['layers']] == ['0', '2.conv1', '2.conv2', '2.last']


def made_up_times(monkeypatch, ways, networks):
    """Measuring a layer's ways gives ways(number); measuring the last networks, the last one dense, gives `networks`."""

    def measure(functions, device, seconds=None, most=None):
        if seconds is None:
            return ways(len(functions))
        return networks if len(functions) == len(networks) else [1.0] * len(functions)

    monkeypatch.setattr(packing, 'measure', measure)


@pytest.mark.parametrize('last', [False, True])
def test_the_way_that_measures_fastest_is_taken(monkeypatch, last):
    """Along the list of ways, the first is whole and the last has branches."""
    made_up_times(monkeypatch, lambda n: [1.1**k for k in range(n)][:: -1 if last else 1], [3.0, 1.0, 2.0, 9.0])
    packed = pack(two_groups(), torch.randn(1, 2, 8, 8))
    assert packed.meta['layers'][1].startswith('3: branches' if last else '3: whole')


def test_the_network_that_measures_fastest_is_taken(monkeypatch):
    made_up_times(monkeypatch, lambda n: [1.1**-k for k in range(n)], [1.0, 3.0, 2.0, 9.0])
    assert shapes(pack(two_groups(), torch.randn(1, 2, 8, 8))) == {'0': [4, 2], '3': [4, 4]}


def test_a_packed_network_that_measures_slower_gives_way_to_the_folded_dense_one(monkeypatch):
    made_up_times(monkeypatch, lambda n: [1.1**-k for k in range(n)], [1.5, 1.3, 1.4, 1.0])
    assert shapes(pack(two_groups(), torch.randn(1, 2, 8, 8))) == {'0': [6, 2], '3': [4, 6]}


def test_counts_are_rounded_up_with_zeros():
    torch.manual_seed(0)
    model = randomise(chain(nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)))
    nn.init.zeros_(model[1].bias)
    nn.init.zeros_(model[1].running_mean)
    nn.init.zeros_(model[0].bias)
    mask = torch.ones(24, 24, dtype=torch.bool)
    mask[:, 10:] = False
    model[3].register_buffer('mask', mask[:, :, None, None])
    network = packing.prepared(model, torch.randn(1, 3, 8, 8))[1]
    expected = {1: [10, 3], 8: [16, 3], 16: [16, 3]}
    for multiple in MULTIPLES:
        packed = write(network, packing.always('whole', multiple))
        assert shapes(packed)['0'] == expected[multiple]
        assert_same(model, packed, 8)


def test_layouts_change_nothing_but_the_time():
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), Block8())
    model = mask_by_groups(randomise(pooled), 2, kept=0.7)
    network = packing.prepared(model, torch.randn(2, 3, 16, 16))[1]
    for layout in packing.layouts(network):
        for how in ('whole', 'gathered', 'branches'):
            packed = write(layout, packing.always(how))
            assert_same(model, packed)
    assert calls(write(packing.layouts(network)[0], packing.always('whole')), 'contiguous') == 1


class Block8(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(F.relu(x + self.conv2(F.relu(self.conv1(x)))))


class Sums(nn.Module):
    """c(x) plus something of another shape, or that is no result of a layer."""

    def __init__(self, what):
        super().__init__()
        self.stem, self.c, self.f = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)
        self.what, self.row, self.map = what, nn.Parameter(torch.randn(1, 16, 1, 1)), nn.Parameter(torch.randn(1, 16, 8, 8))

    def forward(self, x):
        x = F.relu(self.stem(x))
        if self.what == 'pooled':
            return self.f((self.c(x) + F.adaptive_avg_pool2d(x, 1)).mean((2, 3)))
        if self.what == 'square':
            return self.f((x + self.c(x * x)).mean((2, 3)))
        return self.f((self.c(x) + (self.row if self.what == 'row' else self.map)).mean((2, 3)))


@pytest.mark.parametrize('what', ['pooled', 'row', 'map', 'square'])
def test_sums_that_broadcast_and_products_that_nobody_reads(what):
    model = randomise(Sums(what)).eval()
    if what == 'square':
        model.c.weight.data.zero_(), model.c.bias.data.zero_()  # a dead block, whose factors live
    else:
        mask_by_groups(model, 2)
    for packed in in_all_ways(model, torch.randn(2, 3, 8, 8)):
        assert_same(model, packed, size=8)

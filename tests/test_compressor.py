"""What NNI's pruners share: config lists and their errors, counts, batch norms found, masks that hold, and what is exported."""

import copy
import gc
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import methods
from methods import AGP_Pruner, L1FilterPruner, L2FilterPruner, LevelPruner, SlimPruner
from methods._algorithms import algorithm
from methods.random_filter import RandomFilterPruner
from pruners import holding
from pruners.batch_norms import batch_norms
from pruners.config_list import select_layers
from pruners.selection import keep_by_layer, keep_globally, num_pruned


class Net(nn.Module):
    def __init__(self, bias=True, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, groups=groups, bias=bias)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3, bias=bias)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def net(**options):
    torch.manual_seed(0)
    model = Net(**options)
    for norm in (model.bn1, model.bn2):  # fresh ones hide faults
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return model


def train(model, optimizer, steps=1):
    model.train()
    for _ in range(steps):
        loss = F.cross_entropy(model(torch.randn(6, 2, 6, 6)), torch.randint(0, 3, (6,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def half(*names, **more):
    return [{'sparsity': 0.5, 'op_names': list(names), **more}]


# -------------------------------------------------------------------------------------------------------- the config list


def names_of(config_list, **options):
    layers, entries = select_layers(net(), config_list, **options)
    return {name: entry.get('sparsity') for name, entry in entries.items()}


def test_the_last_matching_entry_decides():
    convs, one = {'sparsity': 0.6, 'op_types': ['Conv2d']}, {'sparsity': 0.2, 'op_names': ['conv2']}
    assert names_of([convs, one]) == {'conv1': 0.6, 'conv2': 0.2}
    assert names_of([one, convs]) == {'conv1': 0.6, 'conv2': 0.6}
    assert names_of([{'sparsity': 0.6, 'op_types': ['default']}]) == {'conv1': 0.6, 'conv2': 0.6, 'fc': 0.6}  # no batch norm
    assert names_of([convs | {'op_names': ['conv2']}]) == {'conv2': 0.6}


def test_exclude():
    convs = {'sparsity': 0.6, 'op_types': ['Conv2d']}
    without = {'exclude': True, 'op_names': ['conv1']}
    assert names_of([convs, without]) == {'conv2': 0.6}
    assert names_of([without, convs]) == {'conv1': 0.6, 'conv2': 0.6}  # the last one decides
    assert names_of([convs | {'exclude': False}]) == {'conv1': 0.6, 'conv2': 0.6}
    everything = {'sparsity': 0.6, 'op_types': ['default']}
    assert names_of([everything, {'exclude': True, 'op_types': ['Linear']}]) == {'conv1': 0.6, 'conv2': 0.6}
    with pytest.raises(ValueError, match='excludes every layer'):
        names_of([convs, {'exclude': True, 'op_types': ['Conv2d']}])


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        ({'sparsity': '0.5', 'op_types': ['Conv2d']}, r"sparsity must be a number in \[0, 1\), got '0.5'"),
        ({'sparsity': 1.6, 'op_types': ['Conv2d']}, r'sparsity must be a number in \[0, 1\), got 1.6'),
        ({'sparsity': 1, 'op_types': ['Conv2d']}, 'sparsity must be'),
        ({'sparsity': -0.1, 'op_types': ['Conv2d']}, 'sparsity must be'),
        ({'sparsity': True, 'op_types': ['Conv2d']}, 'sparsity must be'),
        ({'sparsity': float('nan'), 'op_types': ['Conv2d']}, 'sparsity must be'),
        ({'sparsity': 0.5, 'op_types': 'Conv2d'}, "op_types must be a list of names, got 'Conv2d'"),
        ({'sparsity': 0.5, 'op_names': 'conv1'}, "op_names must be a list of names, got 'conv1'"),
        ({'sparsity': 0.5, 'op_types': []}, 'op_types must be a list of names'),
        ({'sparsity': 0.5}, 'expected op_types or op_names'),
        ({'op_types': ['Conv2d']}, 'expected sparsity'),
        ({'sparsty': 0.5, 'op_types': ['Conv2d']}, r"unknown key 'sparsty' \(did you mean 'sparsity'\?\); expected op_types"),
        ({'sparsity': 0.5, 'op_type': ['Conv2d']}, r"unknown key 'op_type' \(did you mean 'op_types'\?\)"),
        ({'sparsity': 0.5, 'op_types': ['Conv2D']}, r"unknown op_type 'Conv2D' \(did you mean 'Conv2d'\?\)"),
        (
            {'sparsity': 0.5, 'op_types': ['Conv1d']},
            'no layer of the model has these op_types|this pruner takes Conv1d, Conv2d, .* only',
        ),
        ({'sparsity': 0.5, 'op_names': ['conv3']}, r"no layer 'conv3' \(did you mean 'conv[12]'\?\)"),
        ({'sparsity': 0.5, 'op_names': ['conv1', 'nothing']}, "no layer 'nothing'"),
        ({'sparsity': 0.5, 'op_names': ['fc'], 'op_types': ['Conv2d']}, 'contradicts itself: fc is a Linear'),
        ({'sparsity': 0.5, 'exclude': True, 'op_names': ['conv1']}, 'contradicts itself: exclude is True and sparsity'),
        ({'sparsity': 0.5, 'exclude': 'yes', 'op_names': ['conv1']}, 'exclude must be True or False'),
    ],
)
@pytest.mark.parametrize('pruner', [LevelPruner, L1FilterPruner])
def test_a_faulty_entry_is_named_with_what_was_expected(pruner, entry, message):
    good = {'sparsity': 0.5, 'op_types': ['Conv2d']}
    with pytest.raises(ValueError, match=message) as caught:
        pruner(net(), [good, entry])
    assert f'config_list[1] = {entry}: ' in str(caught.value)


@pytest.mark.parametrize('config_list', [None, [], {'sparsity': 0.5, 'op_types': ['Conv2d']}, ['Conv2d']])
def test_a_config_list_is_a_list_of_dicts(config_list):
    with pytest.raises(ValueError, match='config_list must be a list of dicts'):
        LevelPruner(net(), config_list)


def test_each_pruner_takes_its_types():
    with pytest.raises(ValueError, match="op_type 'Linear': this pruner takes Conv1d, Conv2d, .* only"):
        L1FilterPruner(net(), [{'sparsity': 0.5, 'op_types': ['Conv2d', 'Linear']}])
    with pytest.raises(ValueError, match='fc is a Linear; this pruner takes Conv1d, Conv2d, .* only'):
        L2FilterPruner(net(), half('fc'))
    with pytest.raises(ValueError, match="op_type 'default': this pruner takes BatchNorm1d, .* and SyncBatchNorm only"):
        SlimPruner(net(), [{'sparsity': 0.5, 'op_types': ['default']}])
    with pytest.raises(ValueError, match='conv1 is a Conv2d; this pruner takes BatchNorm1d, .* and SyncBatchNorm only'):
        SlimPruner(net(), half('conv1'))
    with pytest.raises(ValueError, match='no weight to prune'):
        LevelPruner(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), half('1'))
    assert list(LevelPruner(net(), half('bn1', 'fc')).masks) == ['bn1', 'fc']


def test_sparsity_0_prunes_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    for sparsity in (0, 0.0):
        pruner = L1FilterPruner(model, [{'sparsity': sparsity, 'op_types': ['Conv2d']}])
        assert pruner.compress() is model and all(mask['weight'].all() for mask in pruner.masks.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_matrices_that_default_does_not_mean_are_named():
    model = nn.ModuleDict({'attention': nn.MultiheadAttention(8, 2), 'lstm': nn.LSTM(8, 4), 'fc': nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match='LevelPruner: .*stay dense: ') as caught:
        LevelPruner(model, [{'sparsity': 0.5, 'op_types': ['default']}])
    said = str(caught[0].message)
    assert '1 x MultiheadAttention.in_proj_weight (as attention.in_proj_weight)' in said
    assert '1 x LSTM.weight_ih_l0 (as lstm.weight_ih_l0)' in said and 'fc' not in said
    assert caught[0].filename == __file__  # the line to change


@pytest.mark.parametrize('types', [['default'], ['Linear']])
def test_nothing_is_said_where_all_is_meant_or_some_are_chosen(types, recwarn):
    model = net() if types == ['default'] else nn.ModuleDict({'attention': nn.MultiheadAttention(8, 2)})
    LevelPruner(model, [{'sparsity': 0.5, 'op_types': types}])
    assert not recwarn


def test_algorithms_by_name():
    for name in ('level', 'slim', 'l1', 'l2', 'fpgm', 'taylorfo', 'apoz', 'mean_activation'):
        assert algorithm(name).__name__ in methods.PRUNERS
    with pytest.raises(ValueError, match=r"no pruning algorithm 'taylor' \(did you mean 'taylorfo'\?\)"):
        algorithm('taylor')
    with pytest.raises(ImportError):
        from methods import NoPruner  # noqa: F401


# --------------------------------------------------------------------------------------------------------------- selection


def test_counts_are_rounded_down_but_not_by_float_error():
    assert 100 * 0.29 < 29 and num_pruned(100, 0.29) == 29  # 28.999999999999996
    assert [num_pruned(10, s) for s in (0, 0.2, 0.59, 0.6, 0.99)] == [0, 2, 5, 6, 9]


def test_among_equals_the_first_go_and_the_count_is_exact():
    scores = {'a': torch.ones(10), 'b': torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0])}
    keep = keep_by_layer(scores, {'a': 0.5, 'b': 0.4})
    assert keep['a'].tolist() == [False] * 5 + [True] * 5
    assert keep['b'].tolist() == [True, False, False, True, True]
    assert keep_by_layer(scores, {'a': 0.99, 'b': 0.99})['a'].sum() == 1  # never all
    assert keep_by_layer({'a': torch.ones(1)}, {'a': 0.99})['a'].all()


def test_what_is_pruned_stays_pruned():
    scores = {'a': torch.tensor([9.0, 1.0, 2.0, 3.0])}
    previous = {'a': torch.tensor([False, True, True, True])}
    assert keep_by_layer(scores, {'a': 0.5}, previous)['a'].tolist() == [False, False, True, True]
    assert keep_globally(scores, 0.5, previous)['a'].tolist() == [False, False, True, True]


def test_one_ranking_of_all_layers_by_hand():
    scores = {'a': torch.tensor([1.0, 2.0, 3.0]), 'b': torch.tensor([4.0, 5.0, 6.0, 7.0, 7.0])}
    keep = keep_globally(scores, 0.5)  # 4 of 8: a keeps its largest, though 4 and 5 are larger
    assert keep['a'].tolist() == [False, False, True] and keep['b'].tolist() == [False, False, True, True, True]
    keep = keep_globally(scores, 0.99)
    assert keep['a'].tolist() == [False, False, True] and keep['b'].tolist() == [False] * 4 + [True]
    # filters of 1 and of 10 weights: 53 weights, of which a half is 26; 1 + 1 + 10 + 10 fit, another 10 do not
    keep = keep_globally(scores, 0.5, sizes={'a': 1, 'b': 10})
    assert keep['a'].tolist() == [False, False, True] and keep['b'].tolist() == [False, False, True, True, True]
    assert keep_globally(scores, 0.4, sizes={'a': 1, 'b': 10})['b'].tolist() == [False, True, True, True, True]


def test_scores_that_are_not_numbers_are_refused():
    model = net()
    model.conv1.weight.data[0, 0, 0, 0] = float('nan')
    with pytest.raises(ValueError, match='importance of conv1 is not a number'):
        LevelPruner(model, half('conv1')).compress()


# ------------------------------------------------------------------------------------------------------------- batch norms


class Odd(nn.Module):
    """Modules in an order that is not that of the computation; a conv used twice; one whose output two layers take."""

    def __init__(self, traceable=True):
        super().__init__()
        self.a, self.b, self.norm_b, self.norm_a = (
            nn.Conv2d(2, 2, 1),
            nn.Conv2d(2, 2, 1),
            nn.BatchNorm2d(2),
            nn.BatchNorm2d(2),
        )
        self.twice, self.norm_twice = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.fork, self.norm_fork = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.traceable = traceable

    def forward(self, x):
        if not self.traceable and x.sum() > 0:
            x = x + 1
        x = self.norm_b(self.b(self.norm_a(self.a(x))))
        x = self.norm_twice(self.twice(self.twice(x)))
        y = self.fork(x)
        return y + self.norm_fork(y)


def test_batch_norms_are_found_in_the_graph():
    assert batch_norms(net()) == {'conv1': 'bn1', 'conv2': 'bn2'}
    assert batch_norms(Odd()) == {'a': 'norm_a', 'b': 'norm_b'}
    by_order = batch_norms(Odd(traceable=False))
    assert by_order == {'b': 'norm_b', 'twice': 'norm_twice', 'fork': 'norm_fork'}
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, affine=False))
    assert batch_norms(model) == {} and L1FilterPruner(model, half('0')).compress() is model


def test_with_a_filter_go_its_bias_and_batch_norm():
    for bias in (True, False):
        model = net(bias=bias)
        pruner = L1FilterPruner(model, half('conv1', 'conv2'))
        pruner.compress()
        for conv, norm in ((model.conv1, model.bn1), (model.conv2, model.bn2)):
            gone = conv.weight.flatten(1).abs().sum(1) == 0
            assert int(gone.sum()) == len(gone) / 2
            assert torch.equal(norm.weight == 0, gone) and torch.equal(norm.bias == 0, gone)
            assert not bias or torch.equal(conv.bias == 0, gone)
            model.train()
            output = norm(conv(torch.randn(5, conv.in_channels, 8, 8)))
            assert output[:, gone].abs().max() == 0 and output[:, ~gone].abs().amin((0, 2, 3)).max() > 0
        assert (pruner.masks['conv1']['bias'] is None) == (not bias)


@pytest.mark.parametrize('groups', [2, 4])
def test_grouped_and_depthwise_convolutions(groups):
    model = net(groups=groups)  # 4 is depthwise with two filters a channel
    L2FilterPruner(model, half('conv2')).compress()
    assert int((model.conv2.weight.flatten(1) == 0).all(1).sum()) == 4 and int((model.bn2.weight == 0).sum()) == 4
    assert int((model.conv1.weight == 0).sum()) == 0


# ----------------------------------------------------------------------------------------------------------- masks that hold

OPTIMIZERS = {
    'momentum': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    'nesterov': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    'adam': lambda p: torch.optim.Adam(p, 0.01),
    'adamw': lambda p: torch.optim.AdamW(p, 0.01),
}
PRUNERS = {
    'level': lambda model, optimizer: LevelPruner(model, half('conv1', 'conv2', 'fc'), optimizer),
    'l1': lambda model, optimizer: L1FilterPruner(model, half('conv1', 'conv2'), optimizer),
    'slim': lambda model, optimizer: SlimPruner(model, half('bn1', 'bn2'), optimizer),
}


def zeros(model):
    return {name: p == 0 for name, p in model.named_parameters()}


@pytest.mark.parametrize('kind', OPTIMIZERS)
@pytest.mark.parametrize('name', PRUNERS)
def test_a_pruned_weight_is_zero_after_every_step(name, kind):
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 3)  # momentum, which would move a pruned weight
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    pruner = PRUNERS[name](model, optimizer)
    pruner.compress()
    gone = zeros(model)
    assert sum(int(zero.sum()) for zero in gone.values()) > 50
    for _ in range(4):
        train(model, optimizer)
        assert all(torch.equal(zero, gone[name]) for name, zero in zeros(model).items())
        for parameter, zero in zip(model.parameters(), gone.values(), strict=True):
            for key in ('momentum_buffer', 'exp_avg'):
                if key in optimizer.state[parameter]:
                    assert not optimizer.state[parameter][key][zero].any()
    assert list(model.state_dict()) == keys and [type(module) for module in model.modules()] == kinds


def test_without_the_masks_momentum_brings_them_back():
    model = net()
    optimizer = OPTIMIZERS['momentum'](model.parameters())
    train(model, optimizer, 3)
    pruner = PRUNERS['level'](model, optimizer)
    pruner.compress()
    gone = zeros(model)['fc.weight']
    pruner.unhook()
    train(model, optimizer)
    assert model.fc.weight[gone].abs().min() > 0  # so the tests above can fail
    pruner.step()  # by hand it works too
    assert not model.fc.weight[gone].any()


def test_they_hold_with_an_optimizer_the_pruner_does_not_know():
    model = net()
    pruner = PRUNERS['level'](model, None)
    pruner.compress()
    gone, optimizer = zeros(model), OPTIMIZERS['momentum'](model.parameters())
    for _ in range(3):
        train(model, optimizer)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 2, 6, 6))
        assert all(torch.equal(zero, gone[name]) for name, zero in zeros(model).items())
    pruner.bind(optimizer)
    train(model, optimizer)
    assert torch.equal(model.fc.weight == 0, gone['fc.weight'])


def test_a_forward_pass_leaves_weights_alone_that_a_graph_needs():
    model = net()
    PRUNERS['level'](model, None).compress()
    x = torch.randn(6, 2, 6, 6)
    (model(x).sum() + model(2 * x).sum()).backward()  # a weight changed in between would be an error


def test_a_compiled_model_is_one_graph_and_keeps_its_zeros():
    model = net()
    optimizer = OPTIMIZERS['momentum'](model.parameters())
    train(model, optimizer, 2)
    PRUNERS['l1'](model, optimizer).compress()
    gone = zeros(model)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    for _ in range(2):
        train(compiled, optimizer)
        assert all(torch.equal(zero, gone[name]) for name, zero in zeros(model).items())


def test_gradients_of_what_is_pruned_do_not_count():
    model = net()
    pruner = PRUNERS['level'](model, None)
    pruner.compress()
    gone = zeros(model)
    F.cross_entropy(model.train()(torch.randn(6, 2, 6, 6)), torch.zeros(6, dtype=torch.int64)).backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert before['fc.weight'][gone['fc.weight']].all()  # the loss would have them back
    pruner.mask_gradients()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name] * ~gone[name])


def test_a_loaded_state_is_masked(tmp_path):
    model = net()
    dense = copy.deepcopy(model.state_dict())
    pruner = PRUNERS['l1'](model, None)
    pruner.compress()
    gone = zeros(model)
    pruner.load_model_state_dict(dense)
    assert all(torch.equal(zero, gone[name]) for name, zero in zeros(model).items())
    other = net()
    again = PRUNERS['l1'](other, None)
    again.load_masks(pruner.plain_masks())
    assert all(torch.equal(zero, gone[name]) for name, zero in zeros(other).items())
    for name, masks in again.masks.items():
        assert all(torch.equal(mask, pruner.masks[name][key]) for key, mask in masks.items())
    with pytest.raises(ValueError, match='the masks are of fc; this pruner has conv1, conv2'):
        again.load_masks({'fc': {}})


def test_a_copied_model_keeps_its_own_zeros():
    model = net()
    optimizer = OPTIMIZERS['momentum'](model.parameters())
    pruner = PRUNERS['level'](model, optimizer)
    pruner.compress()
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, b, n: 0.9 * a + 0.1 * b)
    with torch.no_grad():
        average.module.fc.weight.add_(1)
    gone, x = zeros(model)['fc.weight'], torch.zeros(1, 2, 6, 6)
    before = model.fc.weight.detach().clone()
    average(x)
    assert torch.equal(average.module.fc.weight == 0, gone) and torch.equal(model.fc.weight, before)
    assert pruner.optimizer is optimizer


def test_masks_survive_a_move_to_another_dtype():
    model = net()
    pruner = PRUNERS['l1'](model, None)
    pruner.compress()
    model.double()
    with torch.no_grad():
        model.conv1.weight.add_(1)
    model(torch.zeros(2, 2, 6, 6, dtype=torch.float64))
    assert int((model.conv1.weight.flatten(1) == 0).all(1).sum()) == 2
    assert pruner.plain_masks()['conv1']['weight'].dtype == torch.float64


# ------------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', PRUNERS)
def test_export(name, bias, tmp_path):
    model = net(bias=bias)
    optimizer = OPTIMIZERS['adam'](model.parameters())
    pruner = PRUNERS[name](model, optimizer)
    pruner.compress()
    train(model, optimizer, 2)
    pruner.export_model(tmp_path / 'model.pt', tmp_path / 'mask.pt')
    state, masks = (torch.load(tmp_path / file, weights_only=True) for file in ('model.pt', 'mask.pt'))
    plain = Net(bias=bias)
    plain.load_state_dict(state)  # plain names
    assert list(state) == list(plain.state_dict()) and list(masks) == list(pruner.layers)
    for layer, both in masks.items():
        assert torch.equal(state[f'{layer}.weight'] == 0, both['weight'] == 0)
        assert name == 'slim' or int((both['weight'] == 0).sum()) == both['weight'].numel() // 2
        whole = name != 'level' and f'{layer}.bias' in state
        assert (both['bias'] is not None) == whole
        if whole:
            assert torch.equal(state[f'{layer}.bias'] == 0, both['bias'] == 0)
    x = torch.randn(3, 2, 6, 6)
    assert torch.equal(plain.eval()(x), model.eval()(x))


def test_export_without_compress_prunes():
    # one need not call compress() to have what one asked for
    model = net()
    PRUNERS['level'](model, None).export_model('/dev/null')
    assert int((model.fc.weight == 0).sum()) == 12


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ('onnx', 'onnxscript', 'onnxruntime'))), reason='needs ONNX')
def test_export_as_onnx(tmp_path):
    import onnxruntime

    model = net()
    optimizer = OPTIMIZERS['adam'](model.parameters())
    pruner = PRUNERS['l1'](model, optimizer)
    pruner.compress()
    train(model, optimizer)
    pruner.export_model(tmp_path / 'model.pt', None, tmp_path / 'model.onnx', (2, 2, 6, 6))
    x = torch.randn(2, 2, 6, 6)
    (found,) = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx')).run(None, {'x': x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.eval()(x).detach(), rtol=1e-4, atol=1e-5)
    gone = zeros(model)
    train(model, optimizer)  # the masks go on holding
    assert all(torch.equal(zero, gone[name]) for name, zero in zeros(model).items())
    with pytest.raises(ValueError, match='needs input_shape'):
        pruner.export_model(tmp_path / 'other.pt', onnx_path=tmp_path / 'model.onnx')
    assert not (tmp_path / 'other.pt').exists()


def test_onnx_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='needs onnx and onnxscript: pip install onnx onnxscript'):
        PRUNERS['level'](net(), None).export_model(tmp_path / 'model.pt', onnx_path='x', input_shape=(1, 2, 6, 6))


@pytest.mark.gpu
def test_masks_follow_the_model_to_the_gpu():
    model = net()
    pruner = PRUNERS['l1'](model, None)
    pruner.compress()
    model.cuda()
    with torch.no_grad():
        model.conv1.weight.add_(1)
    model(torch.zeros(2, 2, 6, 6, device='cuda'))
    assert int((model.conv1.weight.flatten(1) == 0).all(1).sum()) == 2
    AGP_Pruner(model, [{'final_sparsity': 0.5, 'end_epoch': 1, 'op_types': ['Conv2d']}], None, 'fpgm').compress()
    RandomFilterPruner(model, half('conv2')).compress()
    assert int((model.conv2.weight.flatten(1) == 0).all(1).sum()) >= 4


# ------------------------------------------------------------------------------------- zeros wherever one looks, in other loops


class Parts(nn.Module):
    """A body and a head that a user calls one after the other, never the whole."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(24, 3))

    def forward(self, x):
        return self.head(self.body(x))


def parts(prune=True, optimizer=None):
    torch.manual_seed(0)
    model = Parts()
    pruner = LevelPruner(model, [{'sparsity': 0.5, 'op_types': ['default']}], optimizer)
    if prune:
        pruner.compress()
    return model, pruner, pruned_places(pruner)


def pruned_places(pruner):
    """{layer name: bool tensor, True where a weight is pruned}"""
    return {name: ~masks['weight'] for name, masks in pruner.masks.items()}


def all_zero(model, places):
    return not any(bool(model.get_submodule(name).weight[gone].any()) for name, gone in places.items())


def loss_of(model, x=None):
    return F.cross_entropy(model(torch.randn(4, 2, 6, 6) if x is None else x), torch.tensor([0, 1, 2, 0]))


def revive(model, how='counted'):
    """Add one to all parameters, in a way that autograd counts, or not."""
    with torch.no_grad():
        for parameter in model.parameters():
            if how == 'counted':
                parameter.add_(1)
            else:
                parameter.data = parameter.data + 1


@pytest.mark.parametrize('how', ['counted', 'behind its back'])
@pytest.mark.parametrize('training', [True, False])
def test_parts_that_are_called_alone_compute_with_zeros(how, training):
    model, pruner, places = parts()
    assert sum(int(gone.sum()) for gone in places.values()) == 36 + 108 + 36
    model.train(training)
    revive(model, how)
    x = torch.randn(4, 2, 6, 6)
    found = model.head(model.body(x))
    expected = copy.deepcopy(model)
    for name, gone in places.items():
        expected.get_submodule(name).weight.data[gone] = 0
    assert all_zero(model, places) and torch.equal(found, expected.head(expected.body(x)))


def test_a_state_dict_holds_the_zeros_though_nothing_has_run():
    for how in ('counted', 'behind its back'):
        model, pruner, places = parts()
        revive(model, how)
        state = model.state_dict()
        assert not any(bool(state[f'{name}.weight'][gone].any()) for name, gone in places.items())
        revive(model, how)
        assert not bool(model.head.state_dict()['1.weight'][places['head.1']].any())  # of a part alone
        assert not bool(dict(model.body[3].state_dict())['weight'][places['body.3']].any())


@pytest.mark.parametrize('named', [True, False])
def test_two_optimizers_train_one_model(named):
    model, pruner, places = parts(prune=False)
    body = torch.optim.SGD(model.body.parameters(), 0.1, momentum=0.9)
    head = torch.optim.Adam(model.head.parameters(), 0.01)
    for _ in range(2):  # momentum
        loss_of(model).backward()
        body.step()
        head.step()
    if named:
        pruner.bind(body)
    pruner.compress()
    places = pruned_places(pruner)
    for _ in range(3):
        loss_of(model).backward()
        body.step()
        head.step()
        assert all_zero(model, places)
    assert not body.state[model.body[3].weight]['momentum_buffer'][places['body.3']].any()
    assert not head.state[model.head[1].weight]['exp_avg'][places['head.1']].any()


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as people copy it: a step up the gradient, a second backward pass, and the step itself."""

    def __init__(self, params, lr):
        super().__init__(params, {'lr': lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for parameter in group['params']:
                self.state[parameter]['old'] = parameter.data.clone()
                parameter.add_(0.5 * parameter.grad)

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for parameter in group['params']:
                parameter.data = self.state[parameter]['old']
        self.base_optimizer.step()


@pytest.mark.parametrize('named', [True, False])
def test_sharpness_aware_minimization(named):
    model, pruner, places = parts(prune=False)
    optimizer = SAM(model.parameters(), 0.1)
    if named:
        pruner.optimizer = optimizer
    pruner.compress()
    places = pruned_places(pruner)
    for _ in range(3):
        x = torch.randn(4, 2, 6, 6)
        loss_of(model, x).backward()
        optimizer.first_step()
        optimizer.zero_grad()
        loss_of(model, x).backward()
        assert all_zero(model, places)  # the second pass sees the pruned network
        optimizer.second_step()
        optimizer.zero_grad()
        assert all_zero(model, places)


class Wrapper(torch.optim.Optimizer):
    """What accelerate makes of an optimizer: it has the type, and no hooks of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        if name == 'optimizer':
            raise AttributeError(name)
        if name.startswith(('_optimizer', 'register')):
            raise AttributeError(f'a wrapper has no {name}')
        return getattr(self.optimizer, name)

    def register_step_pre_hook(self, hook):
        raise AttributeError('a wrapper has no hooks')

    register_step_post_hook = register_step_pre_hook

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self):
        self.optimizer.zero_grad()


@pytest.mark.parametrize('times', [1, 2])
def test_wrapped_optimizers(times):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    wrapped = optimizer
    for _ in range(times):
        wrapped = Wrapper(wrapped)
    train(model, wrapped, 2)
    pruner = LevelPruner(model, half('conv1', 'conv2', 'fc'), wrapped)
    assert pruner.optimizer is optimizer
    pruner.compress()
    gone = ~pruner.masks['fc']['weight']
    assert not optimizer.state[model.fc.weight]['momentum_buffer'][gone].any()  # at once
    train(model, wrapped, 2)
    assert not model.fc.weight[gone].any()
    pruner = methods.TaylorFOWeightFilterPruner(model, half('conv1', 'conv2'), wrapped)
    pruner.compress()
    train(model, wrapped)
    assert [int((~pruner.masks[name]['weight']).flatten(1).all(1).sum()) for name in ('conv1', 'conv2')] == [2, 4]


def test_a_copy_that_somebody_trains_and_one_from_a_file(tmp_path):
    model, pruner, places = parts()
    torch.save(model, tmp_path / 'whole.pt')
    for copied in (copy.deepcopy(model), torch.load(tmp_path / 'whole.pt', weights_only=False)):
        optimizer = torch.optim.SGD(copied.parameters(), 0.1, momentum=0.9)
        before = copy.deepcopy(model.state_dict())
        for _ in range(2):
            loss_of(copied).backward()
            optimizer.step()
            assert all_zero(copied, places)  # right after the step
        revive(copied, 'behind its back')
        copied.eval().head(copied.body(torch.randn(1, 2, 6, 6)))
        assert all_zero(copied, places)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    layer = copy.deepcopy(model.body[3])  # of one layer alone
    revive(layer)
    layer(torch.randn(1, 4, 4, 4))
    assert not layer.weight[places['body.3']].any() and model.body[3].weight.abs().max() < 1
    pruner.unhook()
    assert not any(module._forward_pre_hooks or module._state_dict_pre_hooks for module in model.modules())
    revive(model)
    assert not all_zero(model, places) and copied.body[3]._forward_pre_hooks


def test_masks_hold_when_the_pruner_is_gone_and_leave_with_the_model():
    model, _, places = parts()
    del _
    gc.collect()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model).backward()
    optimizer.step()
    assert all_zero(model, places)
    before = len(holding.HOLDS)
    del model, optimizer
    gc.collect()
    assert len(holding.HOLDS) == before - 3


def test_functional_calls_leave_what_they_are_given():
    model, _, _ = parts()
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    kept = copy.deepcopy(state)
    x = torch.randn(2, 2, 6, 6)
    torch.func.functional_call(model.eval(), state, (x,))
    assert all(torch.equal(state[name], kept[name]) for name in state)


def test_evaluation_between_forward_and_backward_disturbs_no_graph():
    model, _, places = parts()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # before and after an optimizer is known
        loss = loss_of(model) + loss_of(model)
        with torch.inference_mode():
            model.eval()(torch.randn(1, 2, 6, 6))
        model.train().state_dict()
        loss.backward()
        optimizer.step()
    assert all_zero(model, places)


def test_a_compiled_model_with_an_optimizer_nobody_named():
    model, _, places = parts()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    optimizer = torch.optim.Adam(compiled.parameters(), 0.01)
    for training in (True, False):
        compiled.train(training)
        loss_of(compiled).backward()
        optimizer.step()
        assert all_zero(model, places)
    assert torch._dynamo.utils.counters['graph_break'] == {}


def test_layers_that_were_cut_are_named_by_their_shapes():
    model, pruner, _ = parts()
    model.head[1].weight = nn.Parameter(torch.ones(2, 24))
    model.head[1].bias = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r'pruned weight has the shape \(2, 24\) now, its mask \(3, 24\): call unhook'):
        model.eval()(torch.randn(1, 2, 6, 6))
    pruner.unhook()
    model(torch.randn(1, 2, 6, 6))


def test_loaded_masks_stay_and_only_grow():
    model, pruner, places = parts()
    masks = pruner.plain_masks()
    for share in (0.2, 0.7):  # less than is pruned already, and more
        other = LevelPruner(Parts(), [{'sparsity': share, 'op_types': ['default']}])
        other.load_masks(masks)
        other.compress()
        for name, gone in places.items():
            now = ~other.masks[name]['weight']
            assert int(now.sum()) == max(int(gone.sum()), int(share * gone.numel())) and bool((now | ~gone).all())
            assert torch.equal(other.layers[name].weight == 0, now)
    alone = LevelPruner(Parts(), [{'sparsity': 0.2, 'op_types': ['default']}])
    alone.load_masks(masks)  # no compress()
    optimizer = torch.optim.SGD(alone.model.parameters(), 0.1)
    loss_of(alone.model).backward()
    optimizer.step()
    assert all_zero(alone.model, places)


def test_loaded_masks_stay_where_all_layers_are_ranked_together():
    model = net()
    pruner = LevelPruner(model, half('conv1', 'conv2', 'fc'), global_sort=True)
    masks = {name: {'weight': torch.ones_like(layer.weight), 'bias': None} for name, layer in pruner.layers.items()}
    masks['conv2']['weight'][:7] = 0  # 252 of 384 weights, more than half
    pruner.load_masks(masks)
    pruner.compress()
    assert {name: int((~both['weight']).sum()) for name, both in pruner.masks.items()} == {'conv1': 0, 'conv2': 252, 'fc': 0}


def test_masks_of_parts_of_filters_are_refused():
    pruner = L1FilterPruner(net(), half('conv1'))
    mask = torch.ones(4, 2, 3, 3)
    mask[0, 0] = 0
    before = copy.deepcopy(pruner.model.state_dict())
    with pytest.raises(ValueError, match='the mask of conv1 prunes parts of filters; L1FilterPruner prunes whole ones'):
        pruner.load_masks({'conv1': {'weight': mask, 'bias': None}})
    assert all(torch.equal(before[name], tensor) for name, tensor in pruner.model.state_dict().items())

"""ADMM and AutoCompress: projections by hand, penalties that act, networks that are really smaller, and runs that resume."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import Digits, batches, evaluator, of_target, residual, run_main, run_with_copies, same_state
from torch import nn

import archs
from deploy import files, network_file
from methods import ADMMPruner, AutoCompressPruner, L1FilterPruner, L2FilterPruner, LevelPruner
from methods._algorithms import ALGORITHMS, algorithm
from methods.admm import Splitting, penalized


def linear(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return nn.Sequential(layer)


def half(*names, sparsity=0.5):
    return [{'sparsity': sparsity, 'op_names': list(names)}]


def trainer(model, criterion, optimizer, epoch, callback):
    model.train()
    for data, target in batches():
        optimizer.zero_grad()
        loss = criterion(model(data), target)
        loss.backward()
        if callback:
            callback()
        optimizer.step()


def idle(model, **others):
    """Trains nothing, as in NNI's own tests."""


# ------------------------------------------------------------------------------------------------------- Z, U and W by hand


def test_one_turn_by_hand():
    model = linear([[1.0, -4.0], [3.0, -2.0]])
    splitting = Splitting(LevelPruner(model, half('0')), row=0.5)
    weight = model[0].weight.data
    weight.add_(1)  # training: W = [[2, -3], [4, -1]]
    splitting.penalize()  # W -= 0.5 (W - Z + U), Z the weights before, U zero
    assert weight.tolist() == [[1.5, -3.5], [3.5, -1.5]]
    splitting.update()  # the two largest are kept; U is what was not
    assert splitting.Z['0'].tolist() == [[0, -3.5], [3.5, 0]] and splitting.U['0'].tolist() == [[1.5, 0], [0, -1.5]]
    assert splitting.distances == [pytest.approx(4.5**0.5)]
    splitting.penalize()  # W - Z + U = [[3, 0], [0, -3]]
    assert weight.tolist() == [[0, -3.5], [3.5, 0]]
    splitting.update()  # W + U = [[1.5, -3.5], [3.5, -1.5]]
    assert splitting.U['0'].tolist() == [[1.5, 0], [0, -1.5]] and splitting.distances[1] == 0


def test_the_penalty_of_all_layers_at_once_is_that_of_each():
    torch.manual_seed(0)
    splitting = Splitting(LevelPruner(residual(), [{'sparsity': 0.5, 'op_types': ['default']}]), row=0.3)
    for tensors in (splitting.Z, splitting.U):
        for tensor in tensors.values():
            tensor.normal_()
    expected = {name: penalized(w, splitting.Z[name], splitting.U[name], 0.3) for name, w in splitting.W.items()}
    splitting.penalize()
    assert len(expected) == 4
    for name, weight in splitting.W.items():
        torch.testing.assert_close(weight, expected[name])


def test_z_is_a_copy_so_that_the_first_turn_has_a_penalty():
    model = linear([[1.0, 2.0]])
    splitting = Splitting(LevelPruner(model, half('0')), row=0.1)
    before = splitting.Z['0'].clone()
    model[0].weight.data.mul_(2)
    assert torch.equal(splitting.Z['0'], before)
    splitting.penalize()
    assert model[0].weight.tolist() == [[pytest.approx(1.9), pytest.approx(3.8)]]


def conv(filters):
    """A 1x1 convolution with these filters."""
    layer = nn.Conv2d(len(filters[0]), len(filters), 1)
    layer.weight.data = torch.tensor(filters)[..., None, None]
    return nn.Sequential(layer)


def test_each_criterion_projects_by_itself():
    # the first filter has the larger sum of magnitudes, the second the larger norm
    rows = [[3.0, 3.0, 3.0], [0.0, 8.0, 0.0]]
    for kind, kept in ((L1FilterPruner, 0), (L2FilterPruner, 1)):
        splitting = Splitting(kind(conv(rows), half('0')))
        splitting.update()
        assert splitting.Z['0'][kept].flatten().tolist() == rows[kept] and not splitting.Z['0'][1 - kept].any()


def test_what_is_projected_is_w_plus_u():
    model = conv([[3.0], [2.0]])
    splitting = Splitting(L1FilterPruner(model, half('0')))
    splitting.U['0'][1] = 5.0
    splitting.update()
    assert splitting.Z['0'].flatten().tolist() == [0, 7]


def test_layers_of_a_group_keep_the_same_filters():
    base = L1FilterPruner(residual(), of_target(0.5))
    base.decide_together([['back', 'stem']])
    splitting = Splitting(base)
    splitting.update()
    kept = {name: z.flatten(1).any(1) for name, z in splitting.Z.items()}
    assert torch.equal(kept['back'], kept['stem']) and kept['back'].sum() == 3


def test_the_distance_falls_and_row_says_how_fast():
    start = [[1.0, -40.0], [30.0, -2.0]]

    def trainer(model, optimizer, criterion, epoch, callback):  # the loss draws each weight back to where it was
        for _ in range(20):
            optimizer.zero_grad()
            (0.5 * (model[0].weight - torch.tensor(start)).square().sum()).backward()
            callback()
            optimizer.step()

    found = {}
    for row in (1e-3, 3e-3, 3e-2):
        model = linear(start)
        adam = torch.optim.Adam(model.parameters(), 1e-4)
        pruner = ADMMPruner(model, half('0'), trainer, 8, 1, row, 'level', optimizer=adam)
        pruner.compress()
        assert len(pruner.distances) == 8 and pruner.distances[0] == pytest.approx(5**0.5)  # 1 and 2 are pruned
        assert pruner.distances[1] < pruner.distances[0] and pruner.distances[-1] < 0.5 * pruner.distances[0]
        found[row] = pruner.distances[2]
        assert (model[0].weight == 0).tolist() == [[True, False], [False, True]]
    assert found[3e-3] < 1.7 < found[1e-3] < 2.1 and found[3e-2] < found[3e-3]


def test_each_layer_has_its_own_sparsity():
    model = Digits()
    config_list = [{'sparsity': 0.25, 'op_names': ['conv1']}, {'sparsity': 0.75, 'op_names': ['conv2']}]
    pruner = ADMMPruner(model, config_list, trainer, num_iterations=1, training_epochs=1)
    assert pruner.compress() is model
    zeros = [int((layer.weight.flatten(1) == 0).all(1).sum()) for layer in (model.conv1, model.conv2)]
    assert zeros == [2, 6]
    assert [int((~mask['weight']).sum()) for mask in pruner.masks.values()] == [18, 48]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner.bind(optimizer)
    trainer(model, F.cross_entropy, optimizer, 0, None)
    assert int((model.conv1.weight.flatten(1) == 0).all(1).sum()) == 2


# -------------------------------------------------------------------------------------------------------------- trainers


def test_the_trainer_is_called_as_the_document_says():
    calls = []

    def recording(model, optimizer, criterion, epoch, callback):
        calls.append((type(optimizer).__name__, type(criterion).__name__, epoch, callable(callback)))

    ADMMPruner(Digits(), of_target(0.5), recording, iterations=2, training_epochs=3).compress()
    assert calls == [('Adam', 'CrossEntropyLoss', epoch, True) for _ in range(2) for epoch in range(3)]


def test_a_trainer_without_callback_gets_the_penalty_all_the_same():
    def without(model, optimizer, criterion, epoch):
        trainer(model, criterion, optimizer, epoch, None)

    states = []
    for function in (trainer, without):
        torch.manual_seed(0)
        model = Digits()
        ADMMPruner(model, of_target(0.5), function, num_iterations=2, epochs=1, rho=0.1).compress()
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_trainer_that_forgets_its_callback_is_told():
    def forgets(model, optimizer, criterion, epoch, callback):
        trainer(model, criterion, optimizer, epoch, None)

    with pytest.raises(ValueError, match=r'does not call callback\(\) between loss.backward\(\) and optimizer.step'):
        ADMMPruner(Digits(), of_target(0.5), forgets, num_iterations=2, epochs=1).compress()


@pytest.mark.parametrize('name', ALGORITHMS)
def test_every_criterion(name):
    model = Digits()
    kind = {'slim': 'BatchNorm2d', 'level': 'default'}.get(name, 'Conv2d')
    pruner = ADMMPruner(model, [{'sparsity': 0.5, 'op_types': [kind]}], trainer, 2, 1, base_algo=name)
    pruner.compress()
    assert len(pruner.distances) == 2 and isinstance(pruner.base, algorithm(name))
    for layer in pruner.layers:
        n = model.get_submodule(layer).weight
        zeros = int((n == 0).sum()) if n.dim() == 1 or name == 'level' else int((n.flatten(1) == 0).all(1).sum())
        assert zeros == (n.numel() if name == 'level' else len(n)) // 2


def test_two_names_for_one_argument():
    model = Digits()
    pruner = ADMMPruner(model, of_target(0.5), idle, iterations=7, epochs=2, rho=0.5)
    assert (pruner.num_iterations, pruner.training_epochs, pruner.row) == (7, 2, 0.5)
    assert ADMMPruner(model, of_target(0.5), idle, epochs_per_iteration=4).training_epochs == 4
    with pytest.raises(ValueError, match='training_epochs and epochs are two names for one argument, but 3 and 2'):
        ADMMPruner(model, of_target(0.5), idle, training_epochs=3, epochs=2)
    for options in ({'trainer': None}, {'epochs': 0}, {'iterations': 0}, {'row': 0}, {'base_algo': 'l7'}):
        with pytest.raises(ValueError, match='trainer must be|must be 1 or more|no pruning algorithm'):
            ADMMPruner(model, of_target(0.5), **({'trainer': idle} | options))


# ---------------------------------------------------------------------------------------------------------- AutoCompress

FAST = {'cool_down_rate': 0.5, 'search_steps': 2, 'admm_num_iterations': 1, 'admm_training_epochs': 1}


def compress(model, folder, target=0.5, evaluator=lambda model: 0.9, trainer=idle, **options):
    x = torch.zeros(2, 1 if isinstance(model, Digits) else 2, 12, 12)
    options = FAST | {'experiment_data_dir': folder} | options
    config_list = options.pop('config_list', of_target(target))
    return AutoCompressPruner(model, config_list, trainer, evaluator, x, **options)


def conv_weights(state):
    return {name: tensor.numel() for name, tensor in state.items() if tensor.dim() == 4}


@pytest.mark.parametrize('target', [0.3, 0.5, 0.8])
def test_the_network_is_smaller_by_the_target(target, tmp_path):
    model = residual()
    whole = sum(conv_weights(model.state_dict()).values())
    pruner = compress(model, tmp_path, target, num_iterations=2)
    assert pruner.compress() is model
    pruner.export_model(tmp_path / 'model.pt', tmp_path / 'no mask.pt')
    state = torch.load(tmp_path / 'model.pt', weights_only=True)
    (stream, inputs), inner = state['stem.weight'].shape[:2], len(state['front.weight'])
    assert inputs == 2 and state['front.weight'].shape == (inner, stream, 3, 3)
    assert state['back.weight'].shape == (stream, inner, 3, 3) and state['norm.running_mean'].shape == (stream,)
    assert state['fc.weight'].shape == (3, stream)
    left = whole * (1 - target) - sum(conv_weights(state).values())
    assert 0 <= left < 9 * (2 + 2 * inner) + 9 * 2 * stream  # one filter of the stream, or of front, and what reads it
    assert pruner.result['sparsity'] == 1 - sum(conv_weights(state).values()) / whole
    assert all(layer.weight.flatten(1).any(1).all() for layer in (model.front, model.stem))  # no zeros are left
    assert model(torch.zeros(2, 2, 9, 9)).shape == (2, 3) and not model._forward_pre_hooks
    assert not (tmp_path / 'no mask.pt').exists()


def test_each_round_removes_its_share(tmp_path):
    sizes = []

    def trainer(model, optimizer, criterion, epoch, callback):
        assert {id(p) for group in optimizer.param_groups for p in group['params']} == {id(p) for p in model.parameters()}
        sizes.append(sum(conv_weights(model.state_dict()).values()))

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(4096, 2)
    )
    pruner = compress(model, tmp_path, 0.5, trainer=trainer, iterations=3)
    pruner.compress()
    sizes.append(sum(conv_weights(model.state_dict()).values()))
    assert sizes[0] == 9 * 64 * 33
    for number, size in enumerate(sizes):  # 1, 0.794, 0.63, 0.5
        assert 0 <= sizes[0] * 0.5 ** (number / 3) - size < 9 * 66
    assert model[5].in_features == model[5].weight.shape[1] == 64 * model[3].out_channels
    assert all((tmp_path / f'round{number}' / 'search_history.csv').exists() for number in (1, 2, 3))


def test_a_round_that_has_ended_is_not_run_again(tmp_path):
    calls = []

    def noisy(model, optimizer, criterion, epoch, callback):
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        callback()

    def run(folder):
        calls[:] = []
        model = residual()
        torch.manual_seed(3)
        compress(model, folder, trainer=noisy, num_iterations=3).compress()
        return model.state_dict()

    limit = -1
    expected = run(tmp_path / 'whole')
    assert len(calls) == 3
    for number in (2, 3):
        limit = number
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(number))
        limit = -1
        state = run(tmp_path / str(number))
        assert len(calls) == 3 - (number - 1)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_until_it_ends_the_model_is_as_it_was(tmp_path):
    def fails(model, **others):
        raise RuntimeError('no data')

    model = residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match='no data'):
        compress(model, tmp_path, trainer=fails).compress()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match='compress'):
        compress(model, tmp_path).export_model(tmp_path / 'model.pt')


@pytest.mark.parametrize('name', ALGORITHMS)
def test_autocompress_with_every_criterion(name, tmp_path):
    kind = {'slim': 'BatchNorm2d', 'level': 'default'}.get(name, 'Conv2d')
    model = Digits()
    config_list = [{'sparsity': 0.5, 'op_types': [kind]}]
    pruner = compress(model, tmp_path, base_algo=name, config_list=config_list, trainer=trainer, num_iterations=2)
    pruner.compress()
    assert pruner.result['sparsity'] >= 0.5
    assert name == 'level' or len(model.conv1.weight) < 8
    model(torch.zeros(1, 1, 12, 12))


def test_faulty_arguments_of_autocompress(tmp_path):
    for options in ({'trainer': None}, {'evaluator': 3}, {'num_iterations': 0}, {'row': -1}, {'optimize_mode': 'up'}):
        with pytest.raises(ValueError, match='must be'):
            compress(residual(), tmp_path, **options)
    with pytest.raises(ValueError, match='dummy_input must be a batch'):
        AutoCompressPruner(residual(), of_target(0.5), idle, evaluator, (1, 2, 9, 9))
    with pytest.raises(ValueError, match='no layer'):
        compress(residual(), tmp_path, config_list=half('conv9'))


# ----------------------------------------------------------------------------------------------- the document's examples


class TwoConvs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 10, 3), nn.Conv2d(10, 25, 3), nn.Linear(25, 2)

    def forward(self, x):
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


def test_the_documents_example_of_admm(tmp_path):
    model = TwoConvs()
    # fmt: off
    config_list = [{
                'sparsity': 0.8,
                'op_types': ['Conv2d'],
                'op_names': ['conv1']
            }, {
                'sparsity': 0.92,
                'op_types': ['Conv2d'],
                'op_names': ['conv2']
            }]
    pruner = ADMMPruner(model, config_list, trainer=trainer, num_iterations=30, epochs=5)
    # fmt: on
    pruner.compress()
    pruner.export_model(tmp_path / 'model.pt', tmp_path / 'mask.pt')
    state = torch.load(tmp_path / 'model.pt', weights_only=True)
    zeros = [int((state[name].flatten(1) == 0).all(1).sum()) for name in ('conv1.weight', 'conv2.weight')]
    assert zeros == [8, 23] and len(pruner.distances) == 30


def test_the_documents_example_of_autocompress(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, dummy_input = Digits(), torch.randn(1, 1, 12, 12)
    # fmt: off
    config_list = [{
            'sparsity': 0.5,
            'op_types': ['Conv2d']
        }]
    pruner = AutoCompressPruner(
                model, config_list, trainer=trainer, evaluator=evaluator,
                dummy_input=dummy_input, num_iterations=3, optimize_mode='maximize', base_algo='l1',
                cool_down_rate=0.9, admm_num_iterations=30, admm_training_epochs=5, experiment_data_dir='./')
    # fmt: on
    pruner.admm_num_iterations = 2  # fewer, to be quick
    pruner.training_epochs = 1
    pruner.compress()
    pruner.export_model('model.pth')
    state = torch.load('model.pth', weights_only=True)
    assert sum(conv_weights(state).values()) <= 0.5 * sum(conv_weights(Digits().state_dict()).values())


def test_export_as_onnx(tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    pruner = compress(residual(), tmp_path, num_iterations=1)
    model = pruner.compress().eval()
    pruner.export_model(tmp_path / 'model.pt', None, tmp_path / 'model.onnx', (2, 2, 9, 9))
    x = torch.randn(2, 2, 9, 9)
    (found,) = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx')).run(None, {'x': x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the command line


def test_admm_on_the_command_line(tmp_path):
    words = ['--method=admm', '--epochs=1', '--admm-iterations=2', '--admm-epochs=2', '--finetune-epochs=1', '--rho=0.1']
    words += ['--admm-lr=1e-4', '--ptarget=0.5']
    result, state = run_main(tmp_path, *words, '--base-algo=level')
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [line['stage'] for line in lines] == ['pretrain', *['admm'] * 4, 'finetune']
    assert 'distance' not in lines[1] and lines[4]['distance'] < 0.7 * lines[2]['distance'] == 0.7 * lines[3]['distance']
    assert lines[0]['sparsity'] == lines[4]['sparsity'] == 0
    assert abs(result['sparsity'] - 0.5) < 1e-3 and lines[5]['sparsity'] == result['sparsity']


def test_autocompress_on_the_command_line(tmp_path):
    words = ['--method=autocompress', '--epochs=1', '--val-size=64', '--num-iterations=2', '--admm-iterations=1']
    words += ['--admm-epochs=1', '--finetune-epochs=1', '--search-steps=1', '--cool-down-rate=0.1', '--ptarget=0.5']
    result, state, copies = run_with_copies(tmp_path / 'whole', words)
    assert result['gives'] == 'a smaller network'
    whole = sum(conv_weights(archs.build('resnet20', 10, width=4, in_channels=1).state_dict()).values())
    assert 0.45 * whole < sum(conv_weights(state).values()) <= 0.5 * whole
    small = network_file.load(tmp_path / 'whole' / 'small')
    saved = torch.load(tmp_path / 'whole' / 'small.pt', weights_only=True)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items() if name in saved)
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert files.read_json(tmp_path / 'whole' / 'round1' / 'search_result.json')['met']
    # writes: arguments, two of the rehearsal, two of pretraining, three of each round, two of fine-tuning
    for number in (10, 12, 13):  # killed in round 2, at its end, and after it
        assert same_state(run_main(copies[number - 1], *words)[1], state)


class Untraceable(Digits):
    def forward(self, x):
        if x.sum() > 1e9:  # decided by what flows, which no tracer follows
            return x
        return super().forward(x)


class Undefined(Digits):
    """Its graph can be read, but its outputs cannot be compared."""

    def forward(self, x):
        return super().forward(x) * math.nan


@pytest.mark.parametrize('network, reason', [(Untraceable, 'cannot trace Untraceable'), (Undefined, 'would differ by nan')])
@pytest.mark.parametrize('name', ['l1', 'level'])
def test_a_network_that_cannot_be_made_smaller_is_refused_before_training(name, network, reason, tmp_path):
    def never(model, *arguments, **others):
        raise AssertionError('it was trained or evaluated')

    model = network()
    before = copy.deepcopy(model.state_dict())
    pruner = compress(model, tmp_path, trainer=never, evaluator=never, base_algo=name, config_list=half('conv1'))
    with pytest.raises(ValueError, match=reason):
        pruner.compress()
    assert same_state(model.state_dict(), before) and not list(tmp_path.iterdir()) and not model._forward_pre_hooks


def test_the_command_line_tries_to_save_a_small_network_before_training(tmp_path, monkeypatch, trained):
    def refuse(*arguments, **others):
        raise ValueError('it cannot be saved')

    monkeypatch.setattr('methods.autocompress.save', refuse)
    with pytest.raises(SystemExit, match='it cannot be saved'):
        run_main(tmp_path, '--method=autocompress', '--epochs=1', '--val-size=64')
    assert trained == []


@pytest.mark.parametrize('name', ALGORITHMS)
def test_a_rehearsal_removes_a_filter_of_each_layer(name, tmp_path):
    kind = {'slim': 'BatchNorm2d', 'level': 'default'}.get(name, 'Conv2d')
    model = Digits()
    before = copy.deepcopy(model.state_dict())
    pruner = compress(model, tmp_path, base_algo=name, config_list=[{'sparsity': 0.5, 'op_types': [kind]}])
    small = pruner.rehearse(model)
    assert small.conv1.out_channels == small.conv2.in_channels == 7 and same_state(model.state_dict(), before)
    assert small.conv2.out_channels == (8 if name == 'slim' else 7)  # no batch norm follows it


def test_a_network_that_an_earlier_pruner_holds(tmp_path):
    model = Digits()
    L1FilterPruner(model, half('conv1')).compress()
    compress(model, tmp_path, num_iterations=1).compress()
    assert len(model.conv1.weight) <= 4 and model(torch.zeros(2, 1, 12, 12)).shape == (2, 2)
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_the_layers_of_the_smaller_network_are_the_same_objects(tmp_path):
    """So that what holds them, as a list that is no ModuleList, goes on with the smaller ones."""

    class Listed(Digits):
        def __init__(self):
            super().__init__()
            self.calls = [self.conv1, self.bn1]

        def forward(self, x):
            for layer in self.calls:
                x = layer(x)
            return self.fc(self.conv2(self.pool(F.relu(x))).flatten(1))

    torch.manual_seed(0)
    model = Listed()
    layers = dict(model.named_modules())
    compress(model, tmp_path, num_iterations=1).compress()
    assert layers.keys() == dict(model.named_modules()).keys()
    assert all(layer is layers[name] for name, layer in model.named_modules())
    assert model.calls[0].out_channels == len(model.conv1.weight) == model.bn1.num_features == len(model.bn1.running_var) < 8
    assert model.conv2.in_channels == len(model.conv1.weight) and model(torch.zeros(2, 1, 12, 12)).shape == (2, 2)


def test_the_command_line_leaves_no_dead_filter_in_the_small_network(tmp_path):
    """Layers that end in one residual stream are pruned together, unless --no-dependency-aware says otherwise."""
    words = ['--method=autocompress', '--epochs=1', '--val-size=64', '--num-iterations=1', '--admm-iterations=1']
    words += ['--admm-epochs=1', '--finetune-epochs=0', '--search-steps=1', '--cool-down-rate=0.1', '--ptarget=0.5']
    dead = {}
    for flag in ('--dependency-aware', '--no-dependency-aware'):
        state = run_main(tmp_path / flag, *words, flag)[1]
        filters = [tensor.flatten(1) for tensor in state.values() if tensor.dim() == 4]
        dead[flag] = sum(int((~rows.any(1)).sum()) for rows in filters)
    assert dead['--dependency-aware'] == 0 < dead['--no-dependency-aware']


def test_layers_of_a_group_with_other_shares_keep_the_union():
    """Also where their shares differ: then the union, as with the one-shot pruners."""
    model = nn.Sequential(*[module for _ in range(3) for module in (nn.Conv2d(10, 10, 3, padding=1), nn.ReLU())])
    config_list = [{'sparsity': 0.2, 'op_names': ['2']}, {'sparsity': 0.5, 'op_names': ['4']}]
    pruner = ADMMPruner(model, config_list, lambda model, **more: None, 1, 1, groups=[['2', '4']])
    pruner.compress()
    masks = [pruner.masks[name]['weight'].flatten(1).any(1) for name in ('2', '4')]
    assert torch.equal(*masks) and int(masks[0].sum()) == 8


@pytest.mark.parametrize('takes', [True, False])
@pytest.mark.parametrize('base', ['taylorfo', 'apoz'])
def test_autocompress_gives_statistics_with_any_documented_trainer(base, takes, tmp_path):
    def train(model, optimizer, criterion, callback=None):
        loss = criterion(model.train()(torch.randn(8, 1, 8, 8)), torch.randint(0, 10, (8,)))
        optimizer.zero_grad()
        loss.backward()
        if takes:
            callback()
        optimizer.step()

    def trainer(model, optimizer, criterion, epoch, callback):
        train(model, optimizer, criterion, callback)

    def plain(model, optimizer, criterion, epoch):
        train(model, optimizer, criterion)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    config_list, more = [{'sparsity': 0.5, 'op_types': ['Conv2d']}], {'base_algo': base, 'experiment_data_dir': str(tmp_path)}
    more |= {'num_iterations': 1, 'admm_num_iterations': 1, 'admm_training_epochs': 1}
    chosen = trainer if takes else plain
    AutoCompressPruner(model, config_list, chosen, lambda model: 0.5, torch.randn(1, 1, 8, 8), **more).compress()

"""sparse_utils.py in other people's loops: copies, wrappers, tied and computed weights, names, compilers, what is said."""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from sparse_utils import (
    Pruner,
    adaptive_formula,
    adaptive_layers,
    adaptive_loss,
    count_macs,
    count_zeros,
    dense_state_dict,
    feather,
    iter_desparsify,
    iter_sparsify,
    load_dense_state_dict,
    sparsity,
    weights_to_prune,
)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))


WEIGHTS = 36 + 320


def exact(n, rate):
    return math.floor((n - 1) * rate) + 1


def zeros_of(model, **options):
    return sum(zeros for zeros, _ in count_zeros(model, **options).values())


def images(n=4):
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def train(model, pruner, steps=3, forward=None, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        if pruner is not None:
            pruner.update_thresh()
        loss = (forward or model)(images()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if pruner is not None:
        pruner.update_thresh(end_of_batch=True)


def quiet(model, **settings):
    return Pruner(model, say=None, **settings)


def ends_alike(model, pruner, x, n, rate, finish=None):
    """Outputs are the same before and after desparsify(), the count is exact, and a fresh model loads the result strictly."""
    model.eval()
    pruner.update_thresh(end_of_batch=True)
    before = model(x)
    plain = (finish or pruner.desparsify)()
    assert torch.equal(model(x), before)
    assert zeros_of(model) == exact(n, rate)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    return plain


# ----------------------------------------------------------------------------------------------------------- tied weights


class Language(nn.Module):
    """An embedding tied to the output layer, as in BERT and GPT-2, and a layer between them."""

    def __init__(self, words=11, width=6):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embed(tokens))))


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 10]])


@pytest.mark.parametrize('method', ['feather', 'asl'])
def test_a_weight_tied_to_an_embedding_is_left_out_and_named(method):
    torch.manual_seed(0)
    model, lines = Language(), []
    dense = model.embed.weight.detach().clone()
    if method == 'feather':
        pruner = Pruner(model, final_rate=0.5, say=lines.append)
        pruner.update_thresh()
        finish = pruner.desparsify
    else:
        iter_sparsify(model, 0.6, pthres=1, say=lines.append)
        finish = lambda: iter_desparsify(model)  # noqa: E731
    assert lines == [
        '36 of 108 parameters are pruned, those of 1 weights; left out: 1 x head tied to embed (66); '
        'include= prunes matrices by name'
    ]
    model.eval()
    before = model(TOKENS)
    finish()
    assert torch.equal(model(TOKENS), before)
    assert model.head.weight is model.embed.weight and torch.equal(model.embed.weight, dense)
    assert (model.body.weight == 0).any()


@pytest.mark.parametrize('name', ['head', 'embed', 'head.weight', '*e*d'])
def test_a_named_tied_weight_is_thresholded_for_all_its_owners(name):
    torch.manual_seed(0)
    model = Language()
    pruner = quiet(model, final_rate=0.5, include=name)
    pruner.update_thresh()
    assert torch.equal(model.embed.weight, model.head.weight) and (model.embed.weight == 0).any()
    model.eval()
    before = model(TOKENS)
    pruner.desparsify()
    assert torch.equal(model(TOKENS), before) and model.head.weight is model.embed.weight
    zeros = int((model.head.weight == 0).sum()) + int((model.body.weight == 0).sum())
    assert zeros == exact(66 + 36, 0.5)
    assert list(model.state_dict()) == list(Language().state_dict())


def test_a_bare_parameter_tied_to_a_layer_is_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.table = self.fc.weight

        def forward(self, x):
            return self.other(self.fc(x)) @ self.table

    chosen, left_out = weights_to_prune(Net())
    assert list(chosen) == ['other'] and left_out == {'fc': ('fc tied to table', 16)}


# ------------------------------------------------------------------------------------------------- copies and averages


@pytest.mark.parametrize('first', ['copy', 'original'])
@pytest.mark.parametrize('method', ['global', 'layerwise', 'asl'])
def test_a_copy_and_its_original_live_on_without_each_other(first, method):
    model = small_net()
    pruner = quiet(model, final_rate=0.5, backbone=method)
    train(model, pruner)
    twin = copy.deepcopy(model)
    x = images()
    expected = model.eval()(x), twin.eval()(x)
    assert torch.equal(*expected)
    finish = {'copy': lambda: pruner.bake(twin), 'original': pruner.desparsify}
    finish[first]()
    assert torch.equal(model(x), expected[0]) and torch.equal(twin(x), expected[1])
    other = twin if first == 'original' else model
    assert parametrize.is_parametrized(other[0])
    other(x).sum().backward()
    assert other[0].parametrizations.weight.original.grad is not None  # it could go on
    finish['copy' if first == 'original' else 'original']()
    assert torch.equal(model(x), expected[0]) and torch.equal(twin(x), expected[1])
    assert list(model.state_dict()) == list(twin.state_dict()) == list(small_net().state_dict())
    assert type(model[0]) is type(twin[0]) is nn.Conv2d


def averaged(model):
    return AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))


@pytest.mark.parametrize('backbone', ['global', 'layerwise'])
def test_an_averaged_network_is_baked_with_thresholds_of_its_own(backbone):
    model = small_net()
    pruner = quiet(model, final_rate=0.8, backbone=backbone)
    pruner.update_thresh()
    average = averaged(model)
    for _ in range(3):
        train(model, pruner, 1, lr=1.0)
        average.update_parameters(model)
    dense = dense_state_dict(average.module)
    pruner.bake(average)
    groups = [WEIGHTS] if backbone == 'global' else [36, 320]
    assert zeros_of(average) == sum(exact(n, 0.8) for n in groups)
    for name in ('0.weight', '4.weight'):  # the largest weights of the average are what is left
        kept = average.module.state_dict()[name] != 0
        if backbone == 'layerwise':
            assert dense[name].abs()[kept].min() > dense[name].abs()[~kept].max()
    small_net().load_state_dict(average.module.state_dict())
    assert parametrize.is_parametrized(model[0])
    pruner.desparsify()
    assert zeros_of(model) == zeros_of(average)


def test_an_average_made_before_the_pruner_is_baked_by_name():
    model = small_net()
    average = averaged(model)  # plain layers
    pruner = quiet(model, final_rate=0.7)
    train(model, pruner, 2)
    load_dense_state_dict(average.module, dense_state_dict(model))
    pruner.desparsify()
    pruner.bake(average)  # after the model itself
    assert all(
        torch.equal(a, b) for a, b in zip(average.module.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert zeros_of(average) == exact(WEIGHTS, 0.7)
    with pytest.raises(ValueError, match='no copy of the model'):
        pruner.bake(nn.Linear(3, 3))


def test_the_same_copy_under_another_wrapper_and_during_the_ramp():
    model = small_net()
    pruner = quiet(model, final_rate=0.8, nbatches=4, epochs=1, ramp_end=1.0)
    train(model, pruner, 3)  # the ratio of the third step is 0.8 (1 - (1 - 2/4)^3) = 0.7
    twin = nn.ModuleDict({'x': copy.deepcopy(model)})
    pruner.bake(twin['x'])
    assert zeros_of(twin) == exact(WEIGHTS, 0.7)


# ------------------------------------------------------------------------------------------------------- one process group


@pytest.fixture(scope='module')
def process_group(tmp_path_factory):
    """A group of one process: the bookkeeping of DistributedDataParallel without other processes."""
    store = tmp_path_factory.mktemp('group') / 'store'
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def without_buffers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))


@pytest.mark.parametrize('make', [small_net, without_buffers])
@pytest.mark.parametrize('method', ['feather', 'asl', 'frozen asl'])
def test_evaluation_through_the_wrapper_after_desparsify(make, method, process_group):
    model = make()
    if method == 'feather':
        pruner = quiet(model, final_rate=0.5)
    else:
        iter_sparsify(model, 0.7, method == 'asl', pthres=1, say=None)
    wrapped = DistributedDataParallel(model)
    train(model, pruner if method == 'feather' else None, forward=wrapped)
    wrapped.eval()
    before = wrapped(images())
    pruner.desparsify() if method == 'feather' else iter_desparsify(model)
    assert torch.equal(wrapped(images()), before)
    assert not hasattr(model, '_ddp_params_and_buffers_to_ignore')
    with torch.no_grad():
        wrapped.train()(images())  # which sends buffers


@pytest.mark.parametrize('attach', ['to the module', 'to the wrapper'])
@pytest.mark.parametrize('method', ['feather', 'asl'])
def test_attached_after_the_wrapper_gradients_still_pass_through_it(attach, method, process_group):
    """The reducer's hook sees each gradient: here it doubles them."""
    model = small_net()
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, doubling)
    target = model if attach == 'to the module' else wrapped
    if method == 'feather':
        quiet(target, final_rate=0.5).update_thresh()
    else:
        iter_sparsify(target, 0.7, False, pthres=1, say=None)
    alone = copy.deepcopy(model)
    wrapped(images()).square().sum().backward()
    alone(images()).square().sum().backward()
    for one, two in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, 2 * two.grad)


def doubling(state, bucket):
    future = torch.futures.Future()
    future.set_result(2 * bucket.buffer())
    return future


def test_sharded_weights_are_refused_in_a_sentence(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = init_device_mesh('cpu', (1,))
    model = small_net()
    fully_shard(model, mesh=mesh)
    for attach in (quiet, lambda net: iter_sparsify(net, 1.0, pthres=1, say=None)):
        with pytest.raises(ValueError, match='sharded .* DistributedDataParallel'):
            attach(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    model = small_net()
    pruner = quiet(model, final_rate=0.5)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match='sharded'):
        pruner.update_thresh()
    model = small_net()
    pruner = quiet(model, final_rate=0.5)
    FullyShardedDataParallel(model, device_id=torch.device('cpu'))  # one flat parameter, of which the weights are views
    with pytest.raises(ValueError, match='sharded'):
        pruner.update_thresh()
    with pytest.raises(ValueError, match='no convolution or linear layer'):
        quiet(FullyShardedDataParallel(small_net(), device_id=torch.device('cpu')))


def test_a_part_of_a_weight_is_refused():
    """FSDP with use_orig_params on several processes: parameters stay, with a share of their elements."""
    model = small_net()
    pruner = quiet(model, final_rate=0.5)
    model[4].parametrizations.weight.original.data = torch.zeros(160)
    with pytest.raises(ValueError, match='the weight of 4 is sharded'):
        pruner.update_thresh()

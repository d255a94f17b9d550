"""sparse_utils.py in other people's loops: copies, wrappers, tied and computed weights, names, compilers, what is said."""

import copy
import math
import pickle
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
from torch.utils.flop_counter import FlopCounterMode

from sparse_utils import (
    Pruner,
    adaptive_formula,
    adaptive_layers,
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
    assert not any('_ddp_params_and_buffers_to_ignore' in vars(module) for module in average.modules())
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


# ------------------------------------------------------------------------- adaptive thresholds: nothing in place in forward


def two_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    for layer in (net[0], net[2]):
        layer.weight.data += 0.05  # a mean to be moved
    return iter_sparsify(net, 0.8, pthres=1, say=None)


def gradients(net, loss):
    net.zero_grad()
    loss(net).backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def formula_gradients(loss):
    """What autograd gives for the formula on centred weights, in the names of the attached network."""
    net = two_layers()
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in net.named_parameters()}

    def forward(x):
        for number in (0, 2):
            inside = f'{number}.parametrizations.weight'
            weight = leaves[f'{inside}.original']
            sparse = adaptive_formula(weight - weight.detach().mean(), leaves[f'{inside}.0.r'])
            x = F.linear(x, sparse, leaves[f'{number}.bias'])
            x = torch.tanh(x) if number == 0 else x
        return x

    loss(forward).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def siamese(net):
    a, b = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    return (net(a) - net(b)).square().sum()


def accumulated(net):
    return sum(net(torch.full((2, 8), float(i))).square().sum() for i in range(3))


def checkpointed(net):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    return checkpoint(net, x, use_reentrant=True).square().sum()


@pytest.mark.parametrize(
    'loss, compiled',
    [(siamese, False), (accumulated, False), (checkpointed, False), (siamese, True), (checkpointed, True)],
)
def test_adaptive_gradients_are_those_of_the_formula(loss, compiled):
    net = two_layers()
    dense = net[0].parametrizations.weight.original.detach().clone()
    forward = torch.compile(net, backend='aot_eager') if compiled else net
    found = gradients(net, lambda _: loss(forward))
    expected = formula_gradients(loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    moved = net[0].parametrizations.weight.original
    torch.testing.assert_close(moved, dense - dense.mean())  # once the gradient is there


def test_a_copy_moves_its_weights_too_and_a_frozen_weight_is_never_moved():
    net = copy.deepcopy(two_layers())
    net[2].parametrizations.weight.original.requires_grad_(False)
    before = net[2].parametrizations.weight.original.detach().clone()
    net(torch.ones(2, 8)).sum().backward()
    assert net[0].parametrizations.weight.original.mean().abs() < 1e-7
    assert torch.equal(net[2].parametrizations.weight.original, before)


def test_backward_in_evaluation_mode_moves_nothing_and_plain_layers_have_no_hooks():
    net = two_layers().eval()
    before = net[0].parametrizations.weight.original.detach().clone()
    net(torch.ones(2, 8)).sum().backward()
    assert torch.equal(net[0].parametrizations.weight.original, before)
    iter_desparsify(net)
    assert not net[0].weight._post_accumulate_grad_hooks and not net[0]._load_state_dict_pre_hooks


# --------------------------------------------------------------------------------- torch.func, export, compile, meta device


@pytest.mark.parametrize('backbone', ['global', 'asl'])
def test_torch_func_gives_what_backward_gives(backbone):
    nets = []
    for scale in (1.0, 2.0, 3.0):
        net = without_buffers()
        net[0].weight.data.mul_(scale)
        quiet(net, final_rate=0.5, theta=0.5, backbone=backbone).update_thresh()
        nets.append(net)
    x = images()

    def loss(parameters, buffers, x):
        return torch.func.functional_call(nets[0], (parameters, buffers), (x,)).square().mean()

    stacked = torch.func.stack_module_state(nets)
    found = torch.func.vmap(torch.func.grad(loss), (0, 0, None))(*stacked, x)
    per_example = torch.func.vmap(torch.func.grad(loss), (None, None, 0))
    state = dict(nets[0].named_parameters()), dict(nets[0].named_buffers())
    mean = {name: gradient.mean(0) for name, gradient in per_example(*state, x[:, None]).items()}
    for number, net in enumerate(nets):
        net(x).square().mean().backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name][number], parameter.grad)
    for name, parameter in nets[0].named_parameters():
        torch.testing.assert_close(mean[name], parameter.grad)


def test_vmap_over_weights_or_thresholds_alone():
    weights = torch.randn(3, 5)
    thresholds = torch.tensor([0.1, 0.5, 1.0])
    each = torch.func.vmap(feather)(weights, thresholds)
    assert torch.equal(each, torch.stack([feather(w, t) for w, t in zip(weights, thresholds, strict=True)]))
    of_one = torch.func.vmap(lambda t: feather(weights, t))(thresholds)
    assert torch.equal(of_one, torch.stack([feather(weights, t) for t in thresholds]))
    across = torch.func.vmap(lambda w: feather(w, thresholds[1]), in_dims=1)(weights)
    assert torch.equal(across, feather(weights.T, thresholds[1]))


@pytest.mark.parametrize(
    'backbone, strict, p',
    [
        ('global', True, 3),
        ('asl', True, 3),
        ('global', False, 3),
        ('asl', False, 3),
        ('global', False, 2),
        ('global', False, 1),
        ('global', False, math.inf),
    ],
)
def test_export_of_an_attached_network(backbone, strict, p):
    net = small_net().eval()
    quiet(net, final_rate=0.5, backbone=backbone, p=p).update_thresh()
    program = torch.export.export(net, (images(),), strict=strict)
    torch.testing.assert_close(program.module()(images()), net(images()))


@pytest.mark.parametrize('backbone', ['global', 'layerwise', 'asl'])
def test_a_compiled_step_has_two_graphs_at_most_and_gives_what_eager_gives(backbone):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    def run(compiling):
        net = small_net()
        pruner = quiet(net, final_rate=0.8, nbatches=3, epochs=2, backbone=backbone, theta=0.5)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)

        def loss_of(x):
            pruner.update_thresh()
            return net(x).square().mean()

        loss_of = torch.compile(loss_of, backend=backend) if compiling else loss_of
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(images()).backward()
            optimizer.step()
        return pruner.desparsify().state_dict()

    torch._dynamo.reset()
    eager, compiled = run(False), run(True)
    assert 1 <= len(graphs) <= 2
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor)
    assert sum(int((t == 0).sum()) for t in compiled.values()) == sum(int((t == 0).sum()) for t in eager.values())


@pytest.mark.parametrize('plain', [False, True])
def test_a_network_on_the_meta_device_is_filled_by_assignment(plain):
    source = small_net()
    quiet(source, final_rate=0.5).update_thresh()
    with torch.device('meta'):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    pruner = quiet(model, final_rate=0.5)
    model.load_state_dict(dense_state_dict(source) if plain else source.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    pruner.update_thresh()
    assert torch.equal(model.eval()(images()), source.eval()(images()))
    pruner.desparsify()
    assert zeros_of(model) == exact(WEIGHTS, 0.5)


# ----------------------------------------------------------------------------------- weights that are computed from others


class Standardized(nn.Conv2d):
    """A convolution with weights of mean zero, as in timm's StdConv2d and ScaledStdConv2d."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Padded(nn.Conv2d):
    """A forward of its own with the weight itself, as in timm's Conv2dSame."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Doubled(nn.Linear):
    """Zeros of the weight are zeros of what is computed."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def masked(layer):
    return prune.random_unstructured(layer, 'weight', 0.5)


COMPUTED = {
    'weight_norm': parametrizations.weight_norm,
    'old weight_norm': lambda layer: torch.nn.utils.weight_norm(layer),
    'spectral_norm': parametrizations.spectral_norm,
    'old spectral_norm': lambda layer: torch.nn.utils.spectral_norm(layer),
    'prune': masked,
    'orthogonal': parametrizations.orthogonal,
    'standardized': lambda layer: Standardized(4, 4, 3),
}


def with_computed(kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the old ones are deprecated
        layer = COMPUTED[kind](nn.Conv2d(4, 4, 3))
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), layer, nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize('kind', COMPUTED)
def test_a_computed_weight_is_refused_before_anything_is_attached(kind):
    model = with_computed(kind)
    names, dense = list(model.state_dict()), model[0].weight.detach().clone()
    for attach in (quiet, lambda net: iter_sparsify(net, 1.0, pthres=1, say=None)):
        with pytest.raises(ValueError, match="the weight of layer 2 .*exclude='2'"):
            attach(model)
        assert list(model.state_dict()) == names and not parametrize.is_parametrized(model[0])
    pruner = quiet(model, final_rate=0.5, exclude='2')
    x = images()
    ends_alike_here = model.eval()(x)
    pruner.update_thresh()
    assert not torch.equal(model(x), ends_alike_here)
    pruner.desparsify()
    assert sum(int((layer.weight == 0).sum()) for layer in (model[0], model[4])) == exact(36 + 48, 0.5)
    assert list(model.state_dict()) == names and not torch.equal(model[0].weight, dense)


@pytest.mark.parametrize('kind', COMPUTED)
def test_zeros_and_macs_are_those_of_the_kernel_that_is_convolved(kind):
    model = with_computed(kind).eval()
    with torch.no_grad():
        layer = model[2]
        if kind == 'standardized':
            layer.weight[:, :2] = 0  # none of these is zero in the kernel
        elif kind == 'weight_norm':
            layer.parametrizations.weight.original1[:, :2] = 0
        elif kind == 'old weight_norm':
            layer.weight_v[:, :2] = 0
        elif kind == 'spectral_norm':
            layer.parametrizations.weight.original[:, :2] = 0
        elif kind == 'old spectral_norm':
            layer.weight_orig[:, :2] = 0
    expected = {'standardized': 0, 'orthogonal': 0}.get(kind, 72)
    assert count_zeros(model)['2'] == (expected, 144)
    assert count_macs(model, images())['2'] == (144 * 4, (144 - expected) * 4)


def test_a_forward_of_its_own_that_keeps_zeros_is_pruned_like_any_other():
    torch.manual_seed(0)
    model = nn.Sequential(Padded(1, 4, 3), nn.Flatten(), Doubled(4 * 36, 3))
    pruner = quiet(model, final_rate=0.5)
    pruner.update_thresh()
    ends_alike(model, pruner, images(), 36 + 432, 0.5)
    nonzero = sum(nonzero for _, nonzero in count_macs(model, images()).values())
    assert nonzero == 36 * int((model[0].weight != 0).sum()) + int((model[2].weight != 0).sum())


# ------------------------------------------------------------------------------------------------------- names, both ways


class Order(nn.Module):
    """Parameters in an order of their own, in front of layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.ones(3))
        self.table = nn.Parameter(torch.randn(3, 3))
        self.last = nn.Parameter(torch.ones(3))
        self.attention = nn.MultiheadAttention(4, 2)
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x * self.first) @ self.table + self.last


@pytest.mark.parametrize('include', [(), ['table'], ['table', '*.in_proj_weight'], ['*in_proj_weight']])
def test_plain_names_in_plain_order_both_ways(include):
    torch.manual_seed(0)
    model, other = Order(), Order()
    names = list(model.state_dict())
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner = quiet(model, final_rate=0.5, include=include)
    pruner.update_thresh()
    dense = dense_state_dict(model)
    assert list(dense) == names and all(torch.equal(dense[name], plain[name]) for name in names)
    other.load_state_dict(dense)  # strictly, into a plain one
    threshold = pruner.threshold
    model.load_state_dict(Order().state_dict())
    assert not torch.equal(dense_state_dict(model)['fc.weight'], plain['fc.weight'])
    model.load_state_dict(plain)  # and strictly back
    assert all(torch.equal(tensor, plain[name]) for name, tensor in dense_state_dict(model).items())
    assert pruner.threshold == threshold
    attached = model.state_dict()
    model.load_state_dict(attached)
    pruner.desparsify()
    assert list(model.state_dict()) == names
    assert list(dense_state_dict(model)) == names


def test_a_whole_checkpoint_of_an_attached_network_loads_and_keeps_its_threshold():
    model, other = small_net(), small_net()
    pruner, second = quiet(model, final_rate=0.5), quiet(other, final_rate=0.5)
    pruner.update_thresh()
    other.load_state_dict(model.state_dict())
    assert second.threshold == pruner.threshold > 0


def test_names_that_do_not_fit_are_an_error_and_not_silence():
    model = small_net()
    quiet(model, final_rate=0.5)
    renamed = {f'module.{name}': tensor for name, tensor in small_net().state_dict().items()}
    with pytest.raises(ValueError, match="none of the 9 names .* 'module.0.weight'.* '0.weight'"):
        load_dense_state_dict(model, renamed, strict=False)
    part = {'0.weight': torch.zeros(4, 1, 3, 3)}
    missing = load_dense_state_dict(model, part, strict=False).missing_keys
    assert model[0].parametrizations.weight.original.abs().sum() == 0 and '4.bias' in missing
    assert not any('0.parametrizations' in name for name in missing)


# ----------------------------------------------------------------------------------------------------- what is pruned


def named_net():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {'stem': nn.Conv2d(1, 4, 3), 'stage1': nn.Linear(4, 4), 'stage2': nn.Linear(4, 6), 'fc': nn.Linear(6, 3)}
    )


@pytest.mark.parametrize(
    'options, expected',
    [
        ({}, ['stem', 'stage1', 'stage2', 'fc']),
        ({'exclude': 'fc'}, ['stem', 'stage1', 'stage2']),
        ({'exclude': ['stem', 'fc.weight']}, ['stage1', 'stage2']),
        ({'exclude': 'stage*'}, ['stem', 'fc']),
        ({'exclude': '*', 'include': 'stage*'}, ['stage1', 'stage2']),
        ({'pthres': 20}, ['stem', 'stage2']),
        ({'pthres': 20, 'include': 'fc'}, ['stem', 'stage2', 'fc']),
        ({'pthres': 20, 'exclude': '*[12]'}, ['stem']),
    ],
)
def test_include_and_exclude(options, expected):
    pthres = {'pthres': 0} | options
    pruner = quiet(named_net(), **options)
    assert list(pruner.layers) == expected
    model = iter_sparsify(named_net(), 1.0, say=None, **pthres)
    assert list(adaptive_layers(model)) == expected


@pytest.mark.parametrize('options', [{'exclude': 'head'}, {'include': 'stage3'}, {'exclude': ['fc', 'stage9*']}])
def test_a_pattern_that_names_nothing_is_refused(options):
    model = named_net()
    with pytest.raises(ValueError, match='is the name of no layer'):
        quiet(model, **options)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    with pytest.raises(ValueError, match=r'no convolution or linear layer .* left out: 4 x excluded \(94\); include='):
        quiet(model, exclude='*')


def test_frozen_weights_are_left_alone_unless_named():
    model, lines = named_net(), []
    for name in ('stem', 'stage1'):
        model[name].weight.requires_grad_(False)
    pruner = Pruner(model, final_rate=0.5, say=lines.append)
    assert list(pruner.layers) == ['stage2', 'fc'] and '2 x frozen (52)' in lines[0]
    pruner.desparsify()
    pruner = quiet(model, final_rate=0.5, include=['stem'], exclude='fc')
    assert list(pruner.layers) == ['stem', 'stage2']
    pruner.update_thresh()
    pruner.desparsify()
    assert not model['stem'].weight.requires_grad and (model['stem'].weight == 0).any()


class Conv1D(nn.Module):
    """transformers' layer of GPT-2: a linear layer with its weight transposed, no subclass of nn.Linear."""

    def __init__(self, out, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Everything(nn.Module):
    """One of each that is not pruned by default."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.c_attn = Conv1D(4, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.fc = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.lstm(self.c_attn(x))[0]
        return self.norm(self.fc(torch.einsum('bij,njk->bik', x, self.experts)))


def test_one_line_says_what_is_pruned_and_what_is_not(capsys):
    torch.manual_seed(0)
    model = Everything()
    Pruner(model, final_rate=0.5).desparsify()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert capsys.readouterr().out == (
        f'32 of {total} parameters are pruned, those of 2 weights; left out: 1 x Everything.experts (32); '
        '1 x Embedding.weight (28); 1 x MultiheadAttention.in_proj_weight (48); 1 x Conv1D.weight (16); '
        '2 x LSTM, which cannot be pruned as it keeps its weights under other names too (128); '
        'include= prunes matrices by name\n'
    )
    quiet(model).desparsify()
    iter_sparsify(model, 1.0, pthres=1, say=None)
    assert capsys.readouterr().out == ''


MATRICES = ['*.in_proj_weight', 'c_attn', 'experts']


@pytest.mark.parametrize('method', ['feather', 'asl'])
def test_matrices_are_pruned_by_name(method):
    torch.manual_seed(0)
    model = Everything()
    names = list(model.state_dict())
    if method == 'feather':
        pruner = quiet(model, final_rate=0.3, include=MATRICES)
        assert list(pruner.layers) == ['experts', 'attention.in_proj_weight', 'attention.out_proj', 'c_attn', 'fc']
        pruner.update_thresh()
    else:
        iter_sparsify(model, 1.15, pthres=1, include=MATRICES, say=None)
        counted = sparsity(model)
    (model(TOKENS % 7) * torch.arange(4.0)).sum().backward()
    assert model.parametrizations.experts.original.grad.abs().sum() > 0
    model.eval()
    before = model(TOKENS % 7)
    macs = count_macs(model, TOKENS % 7)
    zeros = count_zeros(model, include=MATRICES)
    pruner.desparsify() if method == 'feather' else iter_desparsify(model)
    assert torch.equal(model(TOKENS % 7), before) and list(model.state_dict()) == names
    assert count_macs(model, TOKENS % 7) == macs and count_zeros(model, include=MATRICES) == zeros
    assert sum(size for _, size in zeros.values()) == 32 + 48 + 16 + 16 + 16
    if method == 'feather':
        assert sum(count for count, _ in zeros.values()) == exact(128, 0.3)
    else:
        assert sparsity(model) == counted == (100 * sum(count for count, _ in zeros.values()) / 128, counted[1])
    fresh = Everything()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(TOKENS % 7), before)


def test_weights_of_a_recurrent_layer_cannot_be_named():
    chosen, left_out = weights_to_prune(Everything(), include='lstm.*')
    assert list(chosen) == ['attention.out_proj', 'fc'] and 'lstm.weight_hh_l0' in left_out


def test_weights_on_several_devices_have_no_common_threshold():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device='meta'))
    with pytest.raises(ValueError, match="lie on cpu, meta: one threshold needs one device, or 'layerwise'"):
        quiet(model)
    assert not parametrize.is_parametrized(model[0])


def test_a_lazy_layer_is_refused():
    with pytest.raises(ValueError, match='run the model once first'):
        quiet(nn.Sequential(nn.LazyLinear(3)))


# --------------------------------------------------------------------------------------------------- steps and exactness


@pytest.mark.parametrize(
    'called, reached', [(5, None), (2, '29.28 % of the 60 %'), (0, '0 % of the 60 %'), (20, '60 % of the 60 %')]
)
def test_steps_that_were_not_announced_are_named(called, reached):
    model = small_net()
    pruner = quiet(model, final_rate=0.6, nbatches=5, epochs=1, ramp_end=1.0)
    for _ in range(called):
        pruner.update_thresh()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        pruner.desparsify()
    if reached is None:
        assert caught == []
    else:
        (warning,) = caught
        text = str(warning.message)
        assert f'called {called} times' in text and 'announced 5' in text and reached.split()[0] in text
        assert warning.filename == __file__


def test_accumulation_announced_rightly_ends_exactly_and_quietly():
    model = small_net()
    pruner = quiet(model, final_rate=0.9, nbatches=8 // 4, epochs=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for number in range(3 * 8):
        if number % 4 == 0:
            pruner.update_thresh()
        model(images()).square().mean().backward()
        if number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pruner.desparsify()  # without update_thresh(end_of_batch=True)
    assert zeros_of(model) == exact(WEIGHTS, 0.9)


@pytest.mark.parametrize('backbone', ['global', 'layerwise'])
@pytest.mark.parametrize('calls', [1, 3, 6])
def test_desparsify_is_exact_at_the_ratio_it_ends_at(backbone, calls):
    model = small_net()
    pruner = quiet(model, final_rate=0.8, nbatches=6, epochs=1, backbone=backbone)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(calls):
        pruner.update_thresh()
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    ratio = 0.8 if calls >= 3 else pruner.ratio  # the ramp ends after three steps
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pruner.desparsify()
    groups = [WEIGHTS] if backbone == 'global' else [36, 320]
    assert zeros_of(model) == (sum(exact(n, ratio) for n in groups) if ratio else 0)


def test_thresholds_that_were_loaded_with_the_model_are_kept():
    """To evaluate a checkpoint of an attached network nobody needs the pruner's own state."""
    source = small_net()
    first = quiet(source, final_rate=0.9, nbatches=4, epochs=1)
    for _ in range(4):
        first.update_thresh()
    for bake in ('desparsify', 'bake'):
        model = small_net()
        pruner = quiet(model, final_rate=0.9, nbatches=4, epochs=1)
        model.load_state_dict(source.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            result = pruner.desparsify() if bake == 'desparsify' else pruner.bake(copy.deepcopy(model))
        assert zeros_of(result) == exact(WEIGHTS, 0.9)
        pickle.dumps(result)  # plain modules can be


def test_the_way_out_of_the_warning_prunes_to_the_final_rate():
    model = small_net()
    pruner = quiet(model, final_rate=0.9, nbatches=100, epochs=1)
    pruner.update_thresh()
    pruner.step = pruner.total_steps
    pruner.desparsify()
    assert zeros_of(model) == exact(WEIGHTS, 0.9)


# ---------------------------------------------------------------------------------------------------------- counting MACs


class Functional(nn.Module):
    """Layers whose weights the model hands to torch.nn.functional itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.fc = nn.Linear(4, 5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):  # [B, 1, 6, 6]
        x = F.conv2d(x, self.conv.weight)  # 4 x 4 x 4
        up = F.conv_transpose2d(x, self.up.weight, self.up.bias, stride=2)
        tokens = x.flatten(2).transpose(1, 2)  # 16 tokens of width 4
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return F.linear(tokens, self.fc.weight, self.fc.bias).sum() + up.sum()


@pytest.mark.parametrize('attached', [False, True])
def test_macs_of_weights_that_are_handed_to_functions(attached):
    torch.manual_seed(0)
    model = Functional()
    pruner = quiet(model, final_rate=0.5)
    pruner.update_thresh()
    if not attached:
        pruner.desparsify()
    zeros = count_zeros(model)
    kept = {name: size - zero for name, (zero, size) in zeros.items()}
    assert count_macs(model, images(3)) == {
        'conv': (36 * 16, kept['conv'] * 16),
        'up': (32 * 16, kept['up'] * 16),  # each weight once at each input position
        'attention.in_proj_weight': (48 * 16, 48 * 16),
        'attention.out_proj': (16 * 16, kept['attention.out_proj'] * 16),
        'fc': (20 * 16, kept['fc'] * 16),
    }


def test_macs_of_a_transformer_layer_and_of_several_inputs():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()  # its fast path is one operation
    x = torch.randn(2, 5, 8)
    dense = {'self_attn.in_proj_weight': 192 * 5, 'self_attn.out_proj': 64 * 5, 'linear1': 128 * 5, 'linear2': 128 * 5}
    assert count_macs(layer, x) == {name: (n, n) for name, n in dense.items()}
    assert count_macs(layer, {'src': x}) == count_macs(layer, (x,)) == count_macs(layer, x)
    assert torch.backends.mha.get_fastpath_enabled()


def test_macs_are_those_that_torch_counts():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16)
    x, memory = torch.randn(2, 1, 5, 8)  # one example: its axis is the second
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer.eval()(x[None, 0], memory[None, 0])
    counted = count_macs(layer, {'tgt': x[None, 0], 'memory': memory[None, 0]})
    products = {str(name): flops for name, flops in counter.get_flop_counts()['Global'].items()}
    assert sum(dense for dense, _ in counted.values()) == (products['aten.addmm'] + products.get('aten.mm', 0)) // 2
    assert {'self_attn.in_proj_weight', 'multihead_attn.in_proj_weight', 'self_attn.out_proj'} < counted.keys()


def test_macs_of_a_vector_of_tied_layers_and_of_activations_times_activations():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            y = self.b(self.a(x))
            return self.a(y[0, 0]) + (y @ y.transpose(1, 2)).sum()

    assert count_macs(Net(), torch.randn(2, 4, 3)) == {'a': (9 * 4 + 4, 9 * 4 + 4), 'b': (36, 36)}

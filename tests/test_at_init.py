"""SNIP, GraSP and SynFlow: the examples worked by hand, and the faults of released codes that ours must not have."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, Killed, kill_at, method_on, run_main, same_state, small
from torch import nn

import archs
import methods
from args import parse
from methods import grasp, snip, synflow
from methods._at_init import first_batches, gradients, training_mode
from methods._masks import keep_largest

SCORED = ['snip', 'grasp', 'synflow']


class Batches(list):
    """Batches of a training set: what methods use of job.train and job.test."""

    def set_epoch(self, epoch):
        self.epoch = epoch

    def size(self, index):
        return len(self[index][1])


def job_of(model, folder, sizes=(8, 8), classes=5):
    generator = torch.Generator().manual_seed(3)
    labels = [torch.randint(0, classes, (size,), generator=generator) for size in sizes]
    batches = Batches((torch.randn(size, 2, 6, 6, generator=generator), y) for size, y in zip(sizes, labels, strict=True))
    data = Namespace(num_classes=classes)
    return Namespace(model=model, train=batches, example=batches[0][0][:1], folder=folder, data=data)


def scored(name, model, tmp_path, *words):
    """(method, job) with a network that the method has pruned, and not trained."""
    method, _ = method_on(model, name, *words)
    job = job_of(model, tmp_path)
    job.args, job.fit = method.args, lambda method: None
    method.run(job)
    return method, job


# ------------------------------------------------------------------------------------------------------------- SNIP


def test_snip_by_hand():
    # y = w.x = -3, L = (y - 1)^2 / 2: dL/dy = -4, dL/dc = -4 w x = (-4, 16); of 20 in all .2 and .8
    weight, x = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([1.0, 2.0])
    loss = ((weight * x).sum() - 1).square() / 2
    (gradient,) = torch.autograd.grad(loss, weight)
    (score,) = snip.sensitivity([weight], [gradient])
    assert (gradient * weight).tolist() == [-4, 16] and score.tolist() == pytest.approx([0.2, 0.8])


def test_snip_ranks_all_layers_together_and_no_biases(tmp_path):
    """In one released code biases, which are 0, are ranked, go first and count; another ranks each layer by itself."""
    model = small()
    method, job = scored('snip', model, tmp_path, '--ptarget=0.9')
    plain = small()
    x, y = job.train[0]
    F.cross_entropy(plain(x), y).backward()
    scores = torch.cat([(layer.weight * layer.weight.grad).abs().flatten() for layer in (plain[0], plain[4])])
    mask = torch.cat([mask.flatten() for mask in method.masks().values()])
    assert (~mask).sum() == round(0.9 * 784) and scores[mask].min() > scores[~mask].max()
    shares = [float(mask.float().mean()) for mask in method.masks().values()]
    assert abs(shares[0] - shares[1]) > 0.02


@pytest.mark.parametrize('name', ['snip', 'grasp'])
def test_the_weights_that_are_ranked_are_trained(name, tmp_path):
    """SNIP's authors rank one draw of the weights and train another; GraSP's draw linear layers anew for ranking alone."""
    model, before = small(), small()
    method, _ = scored(name, model, tmp_path, '--ptarget=0.5')
    for layer, other, mask in zip((model[0], model[4]), (before[0], before[4]), method.masks().values(), strict=True):
        assert torch.equal(layer.weight, other.weight * mask)


# ------------------------------------------------------------------------------------------------------------ GraSP


def test_grasp_by_hand():
    # L = w'Aw / 2: g = Aw = (0, -1), Hg = A g = (-1, -1), S = -w Hg = (1, -2): w1 goes
    matrix, weight = torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.tensor([1.0, -2.0], requires_grad=True)

    def loss(w):
        return w @ matrix @ w / 2

    (gradient,) = torch.autograd.grad(loss(weight), weight)
    products = grasp.hessian_product(loss(weight), [weight], [gradient])
    (score,) = grasp.removal_scores([weight], products)
    assert gradient.tolist() == [0, -1] and products[0].tolist() == [-1, -1] and score.tolist() == [1, -2]
    # |g|^2 is 1, without w1 8, without w2 5: removing w1 raises it most
    for removed, norm in ((None, 1), (0, 8), (1, 5)):
        left = torch.tensor([1.0, -2.0])
        if removed is not None:
            left[removed] = 0
        assert (matrix @ left).square().sum() == norm


def test_grasp_removes_the_largest_scores_by_index(tmp_path):
    """The authors' code keeps S <= threshold, one weight too many, and all that tie with it."""
    scores = {'a': -torch.tensor([0.3, 0.1, 0.3, 0.2])}
    assert keep_largest(scores, 2)['a'].tolist() == [False, True, False, True]
    assert (-scores['a'] <= (-scores['a']).sort().values[2]).sum() == 4
    method, _ = scored('grasp', small(), tmp_path, '--ptarget=0.9')
    assert sum(int(mask.sum()) for mask in method.masks().values()) == 784 - round(0.9 * 784)


def test_grasp_is_one_mean_over_all_batches(tmp_path):
    """The authors' code sums the means of two halves, sorted by class."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5))
    job = job_of(model, tmp_path, sizes=(8, 4))
    method, _ = method_on(model, 'grasp', '--images-per-class=100', '--batch-size=8')
    job.args = method.args
    ours = -method.scores(job)['1']
    x, y = (torch.cat(column) for column in zip(*job.train, strict=True))
    # with equal weight for the two batches, as mean losses of a batch have in training
    weights = torch.cat([torch.full((8,), 1 / 16), torch.full((4,), 1 / 8)])

    def loss():
        return (F.cross_entropy(model(x) / 200, y, reduction='none') * weights).sum()

    parameter = [model[1].weight]
    expected = grasp.removal_scores(parameter, grasp.hessian_product(loss(), parameter, torch.autograd.grad(loss(), parameter)))
    assert torch.allclose(ours, expected[0], rtol=1e-4, atol=1e-10)


def test_grasp_sees_about_ten_images_of_each_class(tmp_path):
    model = small()
    method, _ = method_on(model, 'grasp', '--batch-size=32')
    job, seen = job_of(model, tmp_path, sizes=(32, 32, 32)), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    method.scores(job)
    assert seen == [32] * 4  # 50 images in two batches, for g and for Hg


# ---------------------------------------------------------------------------------------------------------- SynFlow


def two_linear():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    model[1].weight.data = torch.tensor([[2.0, -1.0]])
    return model


def test_synflow_by_hand():
    model = synflow.absolute(two_linear())
    ones = torch.ones(1, 2, dtype=torch.float64)
    assert model(ones).sum() == 9  # (1 + 2) 2 + 3 * 1
    one, two = synflow.flow(model, [model[0].weight, model[1].weight], ones)
    assert one.tolist() == [[2, 4], [3, 0]] and two.tolist() == [[6, 3]]
    assert one.sum() == two.sum() == 9
    assert synflow.kept_share(1, 0.1) == pytest.approx(0.977237, abs=1e-6)
    assert synflow.kept_share(50, 0.1) == pytest.approx(0.316228, abs=1e-6) and synflow.kept_share(100, 0.1) == 0.1


def test_synflow_keeps_half_by_index():
    """In one round the authors' code prunes 0, 2 and both scores of 3, four of six."""
    method, _ = method_on(two_linear(), 'synflow', '--ptarget=0.5', '--rounds=1')
    masks = method.iterate(two_linear(), torch.ones(1, 2, dtype=torch.float64))
    assert masks['0'][0].tolist() == [False, True] and not masks['0'][1, 1] and masks['1'][0, 0]
    assert int(masks['0'][1, 0]) + int(masks['1'][0, 1]) == 1 and sum(int(mask.sum()) for mask in masks.values()) == 3


def test_synflow_rounds_never_return_a_weight_and_end_exactly():
    for ptarget in (0.5, 0.9, 0.99):
        method, _ = method_on(small(), 'synflow', f'--ptarget={ptarget}', '--rounds=20')
        counts, kept = [], []

        def record(ranks, number, counts=counts, kept=kept):
            masks = keep_largest(ranks, number)
            kept.append(masks)
            counts.append(number)
            return masks

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synflow, 'keep_largest', record)
            method.iterate(small(), torch.ones(1, 2, 6, 6, dtype=torch.float64))
        final = 784 - round(ptarget * 784)
        density = 1 - ptarget
        assert counts == [max(round(density ** (k / 20) * 784), final) for k in range(1, 20)] + [final]
        assert all((new[name] <= old[name]).all() for old, new in zip(kept, kept[1:], strict=False) for name in new)


def test_synflow_does_not_overflow_in_deep_networks():
    """In float32, as in the authors' code, the flow of this network is infinite."""
    torch.manual_seed(0)
    model = archs.build('resnet110', 10, width=16, in_channels=1)
    twin = synflow.absolute(model)
    assert not twin.float()(torch.ones(1, 1, 8, 8)).isfinite().all()
    method, _ = method_on(model, 'synflow', '--ptarget=0.9', '--rounds=1')
    masks = method.iterate(model, torch.ones(1, 1, 8, 8, dtype=torch.float64))
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == total - round(0.9 * total)


def test_synflow_leaves_signs_statistics_and_precision(tmp_path):
    model, before = small(), small()
    method, _ = scored('synflow', model, tmp_path, '--ptarget=0.5')
    assert (model[0].weight < 0).any() and (model[4].bias < 0).any()
    for layer, other, mask in zip((model[0], model[4]), (before[0], before[4]), method.masks().values(), strict=True):
        assert torch.equal(layer.weight, other.weight * mask)
    assert torch.equal(model[4].bias, before[4].bias) and model[1].num_batches_tracked == 0
    assert method_on(small(), 'synflow')[0].args.rounds == 100


# ----------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize('name', SCORED)
def test_ranking_leaves_statistics_gradients_and_modes(name, tmp_path):
    model = small()
    method, job = scored(name, model, tmp_path, '--ptarget=0.9')
    assert model[1].num_batches_tracked == 0 and model[1].running_mean.count_nonzero() == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[0].weight.count_nonzero() + model[4].weight.count_nonzero() == 784 - round(0.9 * 784)


@pytest.mark.parametrize('name', SCORED)
def test_a_run_that_goes_on_does_not_rank_again(name, tmp_path, monkeypatch):
    words = [f'--method={name}', '--ptarget=0.9', '--epochs=2']
    whole = run_main(tmp_path / 'whole', *words)[1]
    with monkeypatch.context() as patch:
        kill_at(patch, 3)  # with the checkpoint of the first epoch written
        with pytest.raises(Killed):
            run_main(tmp_path / 'cut', *words)
    assert (tmp_path / 'cut' / 'checkpoint.pt').exists()
    monkeypatch.setattr(methods.load(name), 'choose_masks', lambda method, job: 1 / 0)
    assert same_state(run_main(tmp_path / 'cut', *words)[1], whole)


def test_gradients_are_means_over_batches_and_processes(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5))
    job = job_of(model, tmp_path, sizes=(8, 4))
    batches = first_batches(job, 9)
    assert [share for _, _, share in batches] == [0.5, 0.5] and job.train.epoch == 0
    (mean,) = gradients(model, [model[1].weight], batches)
    (sum(F.cross_entropy(model(x), y) for x, y in job.train) / 2).backward()
    assert torch.allclose(mean, model[1].weight.grad, atol=1e-7)
    # two processes, with 5 and 3 images of the first batch, 2 and 2 of the second: their gradients are averaged
    monkeypatch.setattr('pruners.processes.world', lambda: 2)
    monkeypatch.setattr('pruners.processes.average', lambda tensors: None)
    parts = []
    for cuts in ((slice(0, 5), slice(0, 2)), (slice(5, 8), slice(2, 4))):
        share = Batches((x[cut], y[cut]) for (x, y), cut in zip(job.train, cuts, strict=True))
        share.size = job.train.size
        view = Namespace(train=share)
        parts.append(gradients(model, [model[1].weight], first_batches(view, 9))[0])
    assert torch.allclose((parts[0] + parts[1]) / 2, mean, atol=1e-7)


def test_batch_norm_uses_the_batch_and_forgets_it():
    model = small()
    model.eval()
    x = 5 + torch.randn(8, 2, 6, 6)
    expected = small()(x)
    with training_mode(model):
        assert torch.equal(model(x), expected)
    assert model[1].running_mean.count_nonzero() == 0 and model[1].num_batches_tracked == 0


def test_a_layer_without_weights_is_named(tmp_path, capsys):
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Linear(5, 5))
    method, _ = method_on(model, 'snip', '--ptarget=0.95')
    method.scores = lambda job: {'1': torch.ones(5, 72), '2': torch.zeros(5, 5)}
    method.run(Namespace(model=model, args=method.args, folder=tmp_path, fit=lambda method: None))
    assert 'no weight is left in 2' in capsys.readouterr().out


def test_their_defaults():
    assert parse([*TINY, '--method=snip']).score_batches == 1 and parse([*TINY, '--method=grasp']).images_per_class == 10

"""ProbMask: schedules, projection and relaxation against hand-worked numbers, and the counts that must be exact."""

import contextlib
import copy
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, TINY, run_main, same_state
from torch import nn

import archs
import methods
from args import load_table, parse
from methods import probmask
from methods.probmask import Gate, keep_ratio, most_probable, noise_like, project, relaxed_mask, temperature
from sparse_utils import count_zeros, prunable_layers

EDGE = 1 - 2**-24  # the largest number below 1 that float32 can draw


def make(*words, model=None):
    """A method on a tiny ResNet-20, with optimizer and criterion, as the loop has it before the first of 6 steps."""
    method = probmask.Method(parse([*TINY, '--method=probmask', '--ptarget=0.8', *words]))
    torch.manual_seed(0)
    model = archs.build('resnet20', 10, width=4, in_channels=1) if model is None else model
    method.prepare(model, 6, method.args)
    return method, model, join(method, model)


def join(method, model, **settings):
    settings = {'lr': 0.05, 'momentum': 0.9, 'nesterov': True} | settings
    optimizer = torch.optim.SGD(method.param_groups(model, method.args), **settings)
    fit = Namespace(
        model=model, forward=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), autocast=contextlib.nullcontext()
    )
    method.attach(fit)
    return fit


def batch(size=6):
    return torch.randn(size, 1, 8, 8), torch.randint(0, 10, (size,))


def train(method, fit, steps=range(6)):
    for step in steps:
        x, y = batch()
        method.before_step(step)
        loss = fit.criterion(fit.model(x), y)
        fit.optimizer.zero_grad()
        loss.backward()
        method.after_backward(step, (x, y))
        fit.optimizer.step()
        method.after_step(step, (x, y))
        yield step
        if step % 2:
            method.after_epoch(step // 2)


# ------------------------------------------------------------------------------------------------ schedules, by hand


def test_temperature():
    assert temperature(0) == 1 and temperature(1) == pytest.approx(100 / 3)
    assert temperature(0.5) == pytest.approx(1 / 0.515)


def test_keep_ratio():
    assert keep_ratio(0, 0.1) == keep_ratio(0.16, 0.1) == 1
    assert keep_ratio(0.38, 0.1) == pytest.approx(0.1 + 0.9 / 8)  # half of the ramp
    assert keep_ratio(0.27, 0.1) == pytest.approx(0.1 + 0.9 * 27 / 64)  # a quarter
    assert keep_ratio(0.6, 0.1) == keep_ratio(1, 0.1) == 0.1
    assert keep_ratio(0.5, 0.2, 0, 1) == pytest.approx(0.3)


def test_schedules_of_a_run_change_once_an_epoch():
    method, _, _ = make('--epochs=3', '--ptarget=0.9')  # of 2 steps each, so the shares are 0, 1/3, 2/3
    seen = []
    for step in range(6):
        method.before_step(step)
        seen.append((method.keep, method.temperature.item(), method.adam.param_groups[0]['lr']))
    assert seen[::2] == seen[1::2]
    keeps, temperatures, rates = zip(*seen[::2], strict=True)
    assert keeps == pytest.approx((1, 0.1 + 0.9 * (1 - (1 / 3 - 0.16) / 0.44) ** 3, 0.1))
    assert temperatures == pytest.approx([temperature(t) for t in (0, 1 / 3, 2 / 3)])
    assert rates == pytest.approx((6e-3, 6e-3 * 0.75, 6e-3 * 0.25))


def test_a_ramp_that_cannot_be():
    with pytest.raises(ValueError, match='the ramp must lie in'):
        make('--ramp-start=0.7')


# ------------------------------------------------------------------------------------------------------- projection


def test_projection_worked_by_hand():
    scores = [torch.tensor([[1.0, 1.0]]), torch.tensor([0.4, 0.1])]
    v = project(scores, 2)
    assert v.item() == pytest.approx(0.4 / 3)
    assert scores[0].tolist() == [pytest.approx([1 - 0.4 / 3] * 2)]
    assert scores[1].tolist() == pytest.approx([0.4 - 0.4 / 3, 0])


def vectors():
    yield from (torch.ones(7), torch.zeros(5), torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.full((6,), 0.3))
    generator = torch.Generator().manual_seed(0)
    for size in (1, 3, 20):
        yield torch.rand(size, generator=generator)
        yield 1.4 * torch.rand(size, generator=generator) - 0.2  # as Adam leaves them: beyond both ends


@pytest.mark.parametrize('vector', list(vectors()), ids=lambda vector: f'{len(vector)}')
def test_projection_against_a_search(vector):
    grid = torch.linspace(0, 1.3, 1_300_001, dtype=torch.float64)
    total = vector.clamp(0, 1).sum().item()
    for budget in (0, 0.1 * total, 0.5 * total, 0.9 * total, total + 1e-5, total + 1, len(vector), len(vector) + 1):
        sums = torch.zeros_like(grid)
        for value in vector.double():
            sums += (value - grid).clamp(0, 1)
        best = grid[(sums <= budget + 1e-6).nonzero()[0]].item()
        parts = list(vector.clone().split(2))
        v = project(parts, budget).item()
        assert v == pytest.approx(best, abs=3e-6)
        assert torch.equal(torch.cat(parts), (vector - v).clamp(0, 1))
        assert torch.cat(parts).sum().item() <= budget + 1e-5
        if total <= budget:
            assert v == 0


def test_projection_of_a_million_stays_within_the_budget():
    scores = [torch.rand(1000, 700), torch.ones(300_000)]
    project(scores, 50_000)
    assert sum(score.double().sum() for score in scores).item() == pytest.approx(50_000, abs=1)


# -------------------------------------------------------------------------------------------------------- relaxation


def test_relaxation_against_the_formula(monkeypatch):
    score, u = torch.rand(2, 200, dtype=torch.float64) * 0.98 + 0.01
    monkeypatch.setattr(torch, 'rand_like', lambda tensor: u.clone())
    noise = noise_like(score)
    assert torch.allclose(noise, torch.log(u / (1 - u)))
    logit = torch.log(score / (1 - score)) + noise
    for temp in (1.0, 5.0, 33.0):
        assert torch.allclose(relaxed_mask(score, temp, noise), 1 / (1 + torch.exp(-temp * logit)))


def test_noise_is_that_of_the_authors():
    """Quantiles of 100,000 draws beside those of their formula."""
    torch.manual_seed(0)
    u0, u1 = torch.rand(2, 100_000)
    theirs = -torch.log(torch.log(u0) / torch.log(u1))
    shares = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
    assert (noise_like(theirs).quantile(shares) - theirs.quantile(shares)).abs().max() < 0.15


def test_relaxation_is_a_draw_with_probability_s():
    torch.manual_seed(0)
    for probability in (0.0, 0.1, 0.7, 1.0):
        score = torch.full((40_000,), probability)
        assert (relaxed_mask(score, 33.0, noise_like(score)) > 0.5).float().mean().item() == pytest.approx(
            probability, abs=0.01
        )


@pytest.mark.parametrize('u', [0.0, 0.5, EDGE])
def test_values_and_gradients_are_finite_at_both_ends(u, monkeypatch):
    monkeypatch.setattr(torch, 'rand_like', lambda tensor: torch.full_like(tensor, u))
    for temp in (1.0, 7.0, 100 / 3):
        score = torch.tensor([0.0, 1e-38, 1e-20, 1e-9, 0.5, EDGE, 1.0], requires_grad=True)
        mask = relaxed_mask(score, temp, noise_like(score))
        mask.sum().backward()
        assert mask.isfinite().all() and (mask >= 0).all() and (mask <= 1).all()
        assert score.grad.isfinite().all() and (score.grad >= 0).all()
        assert mask[-1] == 1 and score.grad[-1] == 0  # a sure weight is undisturbed: training starts dense


@pytest.mark.parametrize('temp', [1.0, 7.0, 100 / 3])
def test_gradients_are_those_of_autograd_to_the_bit(temp):
    weight = torch.randn(500, requires_grad=True)
    gate = Gate(weight.detach(), torch.tensor(temp))
    scores = torch.tensor([0.0, 1e-38, 1e-20, 1e-9, 0.5, EDGE, 1.0]).repeat(50)
    gate.score.data.copy_(torch.cat([scores, torch.rand(150)]))
    upstream = torch.randn(500)
    torch.manual_seed(1)
    out = gate(weight)
    torch.manual_seed(1)
    plain = weight * relaxed_mask(gate.score, gate.temperature, noise_like(gate.score))
    assert torch.equal(out, plain)
    ours = torch.autograd.grad(out, (weight, gate.score), upstream)
    assert (ours[0] != 0).any() and (ours[1] != 0).any()
    for gradient, expected in zip(ours, torch.autograd.grad(plain, (weight, gate.score), upstream), strict=True):
        assert torch.equal(gradient, expected)


def test_the_mask_alone_is_kept_for_the_gradients():
    weight = torch.randn(50, requires_grad=True)
    gate = Gate(weight.detach(), torch.tensor(2.0))
    gate.score.data.fill_(0.6)
    own = {tensor.data_ptr() for tensor in (weight, gate.score, gate.temperature)}
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gate(weight)
    assert len([tensor for tensor in kept if tensor.data_ptr() not in own]) == 1


# ------------------------------------------------------------------------------------------------------- the mask


def test_ties_go_to_the_larger_weight_and_the_count_is_exact():
    scores = [torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 0.5]])]
    weights = [torch.tensor([0.1, -0.3]), torch.tensor([[0.2, 9.0]])]
    one, two = most_probable(scores, weights, 2)
    assert one.tolist() == [False, True] and two.tolist() == [[True, False]]
    for kept in range(11):
        (mask,) = most_probable([torch.ones(10)], [torch.ones(10)], kept)
        assert mask.sum() == kept and mask[:kept].all()


def test_the_most_probable_against_two_sorts():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(shape, generator=generator).round(decimals=1) for shape in ((4, 3, 3, 3), (50,), (7, 9))]  # with ties
    weights = [torch.randn(score.shape, generator=generator).round(decimals=1) for score in scores]
    score, magnitude = (torch.cat([part.flatten() for part in parts]) for parts in (scores, [w.abs() for w in weights]))
    order = magnitude.argsort(descending=True, stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    for kept in range(len(score) + 1):
        expected = torch.zeros(len(score), dtype=torch.bool)
        expected[order[:kept]] = True
        assert torch.equal(torch.cat([mask.flatten() for mask in most_probable(scores, weights, kept)]), expected), kept


def test_evaluation_draws_nothing_and_is_hard():
    method, model, fit = make()
    list(train(method, fit))
    x, _ = batch()
    state = torch.get_rng_state()
    zeros = sum(zeros for zeros, _ in count_zeros(model).values())  # in training mode, as after each epoch
    model.eval()
    with_gradient = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), with_gradient)
    assert torch.equal(torch.get_rng_state(), state)
    assert zeros == method.total - round((1 - 0.8) * method.total)
    model.train()
    assert not torch.equal(model(x), model(x))


def test_registering_draws_nothing():
    torch.manual_seed(0)
    model = archs.build('resnet20', 10, width=4, in_channels=1)
    state = torch.get_rng_state()
    method = probmask.Method(parse([*TINY, '--method=probmask']))
    method.prepare(model, 6, method.args)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_may_lose_all_probability():
    method, model, fit = make()
    for step in train(method, fit):
        method.scores[5].data.zero_()
        assert all(p.isfinite().all() for p in model.parameters()), step
    assert not method.gates[5].mask.any()
    project([torch.zeros(3), torch.zeros(2)], 1)
    model.eval()
    before = model(batch()[0])
    assert before.isfinite().all()
    assert method.finalize(model) is model
    assert sum(zeros for zeros, _ in count_zeros(model).values()) == method.total - round((1 - 0.8) * method.total)


def test_layers_below_pthres_and_tied_weights():
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    tied[3].weight = tied[1].weight
    method, model, fit = make('--pthres=1000', model=tied)
    assert method.total == 64 * 64 and len(method.gates) == 1
    list(train(method, fit))
    method.finalize(model)
    assert model[1].weight is model[3].weight and model[5].weight.count_nonzero() == 640
    assert model[1].weight.count_nonzero() == round((1 - 0.8) * 4096)
    with pytest.raises(ValueError, match='no convolution or linear layer with at least 9999999'):
        make('--pthres=9999999')


# ---------------------------------------------------------------------------------------------------- the steps


def test_the_step_averages_the_gradients_of_its_draws():
    method, model, fit = make('--samples=3', '--epochs=1')
    for score in method.scores:
        score.data.fill_(0.5)
    twin = copy.deepcopy(model)
    x, y = batch()
    torch.manual_seed(3)
    for _ in range(3):
        (F.cross_entropy(twin(x), y) / 3).backward()
    torch.manual_seed(3)
    fit.criterion(model(x), y).backward()
    method.after_backward(0, (x, y))
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-6)
    assert all(score.grad.count_nonzero() > 0 for score in method.scores)
    assert model.bn1.num_batches_tracked == 3


def test_one_sample_is_one_forward():
    method, model, fit = make('--samples=1')
    list(train(method, fit, range(2)))
    assert model.bn1.num_batches_tracked == 2


def test_only_adam_moves_the_scores_and_they_stay_within_the_budget():
    method, model, fit = make('--wd=0.1')
    for score in method.scores:
        score.data.uniform_(0.1, 0.9)
    moved = []
    real_step = method.adam.step
    before = [score.clone() for score in method.scores]

    def step():
        moved.append([torch.equal(a, b) for a, b in zip(before, method.scores, strict=True)])
        real_step()

    method.adam.step = step
    steps = train(method, fit)
    next(steps)
    assert all(moved[0])  # the loop's optimizer has stepped, and no score has changed
    assert not any(torch.equal(a, b) for a, b in zip(before, method.scores, strict=True))
    for _ in steps:
        assert all((score >= 0).all() and (score <= 1).all() for score in method.scores)
        assert sum(score.sum().item() for score in method.scores) <= method.keep * method.total * (1 + 1e-6)


def test_preparing_again_keeps_layers_and_scores():
    method, model, fit = make()
    list(train(method, fit))
    before = list(map(id, model.parameters()))
    method.prepare(model, 100, method.args)
    assert before == list(map(id, model.parameters())) and method.batches == 2


def test_what_is_pruned_stays_zero_in_finetuning():
    method, model, fit = make('--wd-all')
    list(train(method, fit))
    method.fix_masks()
    assert not model._forward_pre_hooks
    names = list(model.state_dict())
    assert names == list(archs.build('resnet20', 10, width=4, in_channels=1).state_dict())
    method.prepare(model, 100, method.args)
    fit = join(method, model, weight_decay=0.1)
    masks = method.state_dict()['masks']
    assert sum(int(mask.sum()) for mask in masks) == round((1 - 0.8) * method.total)
    weights = [layer.weight for layer in prunable_layers(model).values()]
    start = [weight.clone() for weight in weights]
    for step in train(method, fit, range(4)):
        for weight, mask in zip(weights, masks, strict=True):
            buffer = fit.optimizer.state[weight]['momentum_buffer']
            assert weight[~mask].count_nonzero() == 0 and weight.grad[~mask].count_nonzero() == 0
            assert buffer[~mask].count_nonzero() == 0 and (not mask.any() or buffer[mask].count_nonzero() > 0)
            if step == 1:
                buffer.fill_(1.0)  # as if there had been momentum before: it must not bring weights back
    assert model.bn1.num_batches_tracked == 6 * 2 + 4  # one forward a step once the masks are fixed
    assert any(not torch.equal(a, b) for a, b in zip(start, weights, strict=True))


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    'words', [['--epochs=2'], ['--finetune-epochs=0'], ['--pthres=300', '--samples=1'], ['--optimizer=adam']]
)
def test_zeros_are_exact(words, tmp_path):
    result, state = run_main(
        tmp_path, '--method=probmask', '--ptarget=0.93', '--finetune-epochs=2', '--finetune-lr=0.1', '--wd=0.01', *words
    )
    total = sum(t.numel() for t in state.values() if t.dim() > 1 and (t.numel() >= 300 or '--pthres=300' not in words))
    assert result['weights'] == total and result['zeros'] == total - round((1 - 0.93) * total)
    assert result['epochs'] == {'--finetune-epochs=0': 3, '--epochs=2': 4}.get(words[0], 5)


def test_sample_masks_keeps_the_draw_of_lowest_loss():
    method, model, fit = make('--sample-masks=4')
    list(train(method, fit))
    for score in method.scores:
        score.data.uniform_()
    batches = [batch() for _ in range(3)]

    class Train(list):
        def set_epoch(self, epoch):
            self.epoch = epoch

    torch.manual_seed(5)
    drawn = [[torch.bernoulli(score.detach()) for score in method.scores] for _ in range(4)]
    model.eval()
    losses = []
    for masks in drawn:
        method.set_masks(masks)
        losses.append(sum(F.cross_entropy(model(x), y).item() for x, y in batches))
    torch.manual_seed(5)
    method.draw_masks(Namespace(train=Train(batches), model=model))
    chosen = drawn[losses.index(min(losses))]
    assert all(torch.equal(gate.mask, mask.bool()) for gate, mask in zip(method.gates, chosen, strict=True))
    assert len({round(loss, 6) for loss in losses}) == 4


def test_a_run_with_sample_masks_ends_near_the_target_and_resumes(tmp_path):
    words = ['--method=probmask', '--ptarget=0.8', '--sample-masks=2', '--finetune-epochs=1']
    result, state = run_main(tmp_path, *words)
    assert abs(result['zeros'] - 0.8 * result['weights']) < 5 * math.sqrt(0.2 * 0.8 * result['weights'])
    for name in ('result.json', 'model.pt', 'checkpoint.pt'):  # as if killed before the first epoch of fine-tuning had ended
        (tmp_path / name).unlink()
    assert (tmp_path / 'stage-train.pt').exists()
    assert same_state(run_main(tmp_path, *words)[1], state)


def test_the_table():
    path = ROOT / 'configs' / 'probmask' / 'cifar.yaml'
    table = load_table(path)
    assert table['rows'][0]['method'] == 'dense' and len(table['rows']) == 20 and len(table['seeds']) == 3
    assert (
        methods.load('probmask').DEFAULTS.items()
        <= {
            **{key.replace('-', '_'): value for key, value in table['defaults'].items()},
            'model': 'resnet32',
            'dataset': 'cifar10',
            'wd': 5e-4,
        }.items()
    )
    for row in table['rows']:
        args = parse([f'--config={path}', f'--row={row["id"]}'])
        assert (args.epochs, args.batch_size, args.lr, args.wd, args.wd_all, args.lr_update) == (
            300,
            256,
            0.1,
            5e-4,
            True,
            'epoch',
        )
        archs.build(args.model, 10, args.width)

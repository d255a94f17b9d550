"""The tables of RigL's protocol and of the comparison: every row can be run, and says what its comments say."""

import pytest
from helpers import ROOT

import archs
import methods
from args import load_table, parse


def rows(table, chosen):
    """{row id: (method, its arguments)} of the rows that are chosen."""
    path = ROOT / 'configs' / f'{table}.yaml'
    names = [row['id'] for row in load_table(path)['rows'] if chosen(row)]
    arguments = {name: parse([f'--config={path}', f'--row={name}']) for name in names}
    return {name: (methods.load(args.method)(args), args) for name, args in arguments.items()}


def test_rigls_protocol():
    table = load_table(ROOT / 'configs' / 'rigl' / 'cifar10.yaml')
    assert len(table['rows']) == 29 and table['rows'][0]['method'] == 'dense'
    for name, (_, args) in rows('rigl/cifar10', lambda row: row.get('ptarget', 0.8) == 0.8).items():
        steps = 391 * args.epochs  # batches of 128 of 50,000 images
        if '2x' not in name:
            assert [round(share * steps, -3) for share in args.lr_milestones] == [30_000, 60_000, 90_000]
        assert (args.batch_size, args.lr, args.lr_gamma, args.wd, args.dropout) == (128, 0.1, 0.2, 5e-4, 0.3)
        assert args.per_image and args.pad_mode == 'reflect' and args.pad == 4 and args.nesterov and args.val_size == 0
        if args.method == 'rigl':
            assert round(args.rewire_end * 391 * 250, -3) == 75_000 and (args.alpha, args.frequency) == (0.3, 100)
        if args.method != 'dense':
            network = archs.from_args(args, 10, 3, 32)
            assert sum(p.numel() for p in network.parameters()) == 1_079_642
            assert network.conv1.weight.numel() == args.pthres - 1  # which so stays dense


@pytest.mark.parametrize('network', ['resnet20', 'vgg16'])
def test_the_comparison_has_all_methods_that_prune_weights(network):
    table = load_table(ROOT / 'configs' / 'comparison' / f'{network}.yaml')
    weights = {name for name in methods.names() if methods.load(name).gives == 'zeros'}
    filters = {'slim', 'fpgm', 'l1_filter', 'l2_filter', 'apoz', 'mean_activation', 'taylor_fo', 'random_filter', 'dsp', 'admm'}
    filters |= {'group_norm', 'netadapt', 'simulated_annealing', 'autocompress'}  # the last are searches
    assert {row['method'] for row in table['rows']} == weights - filters - {'lottery_ticket'} | {'dense'}
    for target in (90, 95, 98, 99):
        assert len([row for row in table['rows'] if row['id'].endswith(f'-{target}')]) == 23
    for name, (_, args) in rows(f'comparison/{network}', lambda row: row['id'].endswith('-98')).items():
        assert args.ptarget == 0.98 and args.epochs == 160 and args.lr_schedule == 'multistep', name
        assert args.wd == 5e-4 and not args.wd_all and args.lr_update == 'step' and args.pad_mode == 'zeros'

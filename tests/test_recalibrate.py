"""--recalibrate: batch norms estimated again, as update_bn of PyTorch does, on so many training images."""

import pytest
import torch
from helpers import read_few_digits, run_main, same_state
from torch import nn

import main as program
from harness import data, recalibrate
from harness.data import Batches


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 10))


def loader(batch_size=4, number=20):
    images, labels = read_few_digits()[0]
    return Batches(images[:number], labels[:number], batch_size, 'cpu', [0.3], [0.4], train=True, pad=1, seed=5)


def test_by_hand():
    """Batches of values (0, 2) and (4, 10): means 1 and 7, unbiased variances 2 and 18; their averages are 4 and 10."""
    norm = nn.Sequential(nn.BatchNorm2d(1, momentum=0.3))

    class Two:
        whole = False

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            for values in ([0.0, 2.0], [4.0, 10.0], [99.0, 99.0]):
                yield torch.tensor(values).view(2, 1, 1, 1), None

    assert recalibrate.recalibrate(norm, Two(), 4, 0, 0) == 4
    assert (norm[0].running_mean.item(), norm[0].running_var.item(), norm[0].momentum) == (4, 10, 0.3)


def test_as_update_bn_of_pytorch():
    ours, theirs, batches = network().eval(), network(), loader()
    theirs[2].p = 0.0  # no effect on what is before it
    assert recalibrate.recalibrate(ours, batches, 20, 3, seed=0) == 20
    batches.set_epoch(3)
    torch.optim.swa_utils.update_bn(batches, theirs)
    assert same_state(ours.state_dict(), theirs.state_dict())
    assert not any(module.training for module in ours.modules()) and ours[1].momentum == 0.3 and not batches.whole


def test_number_of_images_and_the_draws_of_the_network():
    state = torch.get_rng_state()
    seen = [recalibrate.recalibrate(network(), loader(), number, 0, 0) for number in (6, 5, 4, 1000)]
    assert seen == [6, 4, 4, 20]  # of 5 the last batch would have one image, which a batch norm may refuse
    torch.set_rng_state(state)
    before, batches = torch.get_rng_state(), loader()
    model = network()
    state = torch.get_rng_state()
    recalibrate.recalibrate(model, batches, 8, 0, 0)
    assert torch.equal(torch.get_rng_state(), state) and before is not None


def test_every_process_sees_whole_batches(monkeypatch):
    whole = network()
    recalibrate.recalibrate(whole, loader(), 20, 1, 0)
    monkeypatch.setattr(data, 'world', lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(data, 'rank', lambda number=number: number)
        model, batches = network(), loader()
        recalibrate.recalibrate(model, batches, 20, 1, 0)
        assert same_state(model.state_dict(), whole.state_dict())
        assert [len(labels) for _, labels in batches] == [2] * 5  # and its share again in training


def test_a_run_records_it_and_resumes_to_the_bit(tmp_path):
    words = ['--method=l1_filter', '--epochs=1', '--finetune-epochs=1', '--ptarget=0.5', '--recalibrate=64']
    result, state = run_main(tmp_path / 'run', *words)
    plain, without = run_main(tmp_path / 'plain', *words[:-1])
    assert result['recalibrated_images'] == 64 and result['accuracy_before_recalibration'] == plain['accuracy']
    assert result['zeros'] == plain['zeros'] and 'recalibrated_images' not in plain
    changed = {name.rpartition('.')[2] for name in state if not torch.equal(state[name], without[name])}
    assert changed == {'running_mean', 'running_var', 'num_batches_tracked'}
    (tmp_path / 'run' / 'result.json').unlink()
    again, same = run_main(tmp_path / 'run', *words)
    assert same_state(same, state) and again['accuracy'] == result['accuracy']


def test_what_is_packed_is_recalibrated_before(tmp_path):
    short = ['--group-epochs=1', '--finetune-epochs=1', '--cycles=1', '--val-size=0', '--epochs=1', '--pack', '-g', '2']
    result, _ = run_main(tmp_path / 'run', '--method=dsp', '--recalibrate=32', *short)
    assert result['recalibrated_images'] == 32
    program.main([f'--evaluate={tmp_path}/run/packed.pt'])


def test_a_network_without_batch_norms_is_refused(tmp_path):
    words = ['--dataset=digits', '--model=lenet300_100', '--no-cuda', '--recalibrate=10', f'--out={tmp_path}/run']
    with pytest.raises(SystemExit, match='this network has none'):
        program.main(words)
    assert not (tmp_path / 'run').exists()

"""sparse_utils.py in the frameworks that people train with: networks from configs, nothing downloaded, a few steps each.

Each ends with the exact count of zeros, counted from a fresh network that loads the result strictly, and with equal outputs
before and after desparsify(). A test is skipped where its framework is not installed.
"""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from sparse_utils import Pruner, count_macs, count_zeros, dense_state_dict, dense_weight, prunable_layers

pytestmark = pytest.mark.frameworks
ROOT = Path(__file__).parent.parent


def exact(n, rate):
    return math.floor((n - 1) * rate) + 1


def count(model, include=()):
    zeros, sizes = zip(*count_zeros(model, include=include).values(), strict=True)
    return sum(zeros), sum(sizes)


@torch.no_grad()
def finish(model, pruner, forward, fresh):
    """desparsify(): equal outputs; exact zeros in a fresh network that loads the state dict strictly and computes the same."""
    model.eval()
    pruner.update_thresh(end_of_batch=True)
    before = forward(model)
    places = [places[0] for places in pruner._places.values()]
    magnitude = torch.cat([dense_weight(*place).flatten() for place in places]).abs()
    largest = magnitude.kthvalue(exact(len(magnitude), pruner.final_rate)).values  # of those that are pruned
    expected = int((magnitude <= largest).sum())  # of millions of weights some are equal
    pruner.desparsify()
    assert torch.equal(forward(model), before)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    fresh.load_state_dict(model.state_dict(), strict=True)
    names = list(pruner.layers)
    assert torch.equal(forward(fresh.eval()), before)
    counts = count_zeros(fresh, include=names)
    zeros = sum(counts[name][0] for name in names)
    weights = sum(counts[name][1] for name in names)
    assert zeros == expected < exact(weights, pruner.final_rate) + 4 and weights == len(magnitude)


# ------------------------------------------------------------------------------------------------------------------- timm

FAMILIES = [
    ('resnet18', 32),
    ('resnetv2_18', 32),
    ('resnext26ts', 64),
    ('convnext_atto', 32),
    ('convnextv2_atto', 32),
    ('efficientnet_b0', 32),
    ('mobilenetv3_small_050', 32),
    ('mobilenetv4_conv_small_035', 32),
    ('regnetx_002', 32),
    ('densenet121', 32),
    ('vit_tiny_patch16_224', 32),
    ('deit_tiny_patch16_224', 32),
    ('eva02_tiny_patch14_224', 28),
    ('swin_tiny_patch4_window7_224', 56),
    ('mixer_s32_224', 64),
    ('levit_128s', 224),
    ('repvgg_a0', 32),
    ('ghostnet_050', 32),
    ('mobilevit_xxs', 64),
    ('edgenext_xx_small', 64),
    ('poolformerv2_s12', 64),
    ('rexnet_100', 32),
    ('lcnet_035', 32),
    ('efficientvit_b0', 64),
]


@pytest.mark.parametrize('name, size', FAMILIES)
def test_timm_families(name, size):
    timm = pytest.importorskip('timm')

    def build():
        fixed = ('vit', 'deit', 'eva02', 'swin', 'mixer')
        options = {'img_size': size} if name.startswith(fixed) else {}
        return timm.create_model(name, num_classes=5, **options)

    torch.manual_seed(0)
    model = build()
    pruner = Pruner(model, final_rate=0.9, nbatches=2, epochs=1, say=None)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images, labels = torch.randn(2, 3, size, size), torch.tensor([0, 3])
    for _ in range(2):
        pruner.update_thresh()
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    finish(model, pruner, lambda net: net(images), build())


@pytest.mark.parametrize('name', ['nf_resnet26', 'dm_nfnet_f0', 'resnetv2_50x1_bit'])
def test_timm_families_with_standardized_convolutions_are_refused(name):
    timm = pytest.importorskip('timm')
    model = timm.create_model(name, num_classes=5)
    with pytest.raises(ValueError, match='StdConv2d(Same)?.forward: make it a plain layer first, or leave it out'):
        Pruner(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


@pytest.mark.parametrize(
    'name, size',
    [('swin_tiny_patch4_window7_224', 56), ('eva02_tiny_patch14_224', 28), ('beit_base_patch16_224', 32), ('nf_resnet26', 32)],
)
def test_macs_are_those_that_torch_counts(name, size):
    """These hand weights to torch.nn.functional themselves, or compute them; products of activations are left out."""
    timm = pytest.importorskip('timm')
    options = {} if name == 'nf_resnet26' else {'img_size': size}
    model = timm.create_model(name, num_classes=5, **options).eval()
    images = torch.randn(2, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    flops = {str(name): number for name, number in counter.get_flop_counts()['Global'].items()}
    expected = sum(
        number for name, number in flops.items() if name not in ('aten.bmm', 'aten._scaled_dot_product_flash_attention')
    )
    counted = count_macs(model, images)
    assert counted.keys() >= prunable_layers(model).keys()
    assert 2 * 2 * sum(dense for dense, _ in counted.values()) == expected


def test_timm_average():
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    model = timm.create_model('resnet10t', num_classes=5)
    pruner = Pruner(model, final_rate=0.8, nbatches=4, epochs=1, say=None)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    images = torch.randn(4, 3, 32, 32)
    for _ in range(4):
        pruner.update_thresh()
        loss = nn.functional.cross_entropy(model(images), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
    pruner.bake(average)
    zeros, weights = count(average.module)
    assert zeros == exact(weights, 0.8)
    fresh = timm.create_model('resnet10t', num_classes=5)
    fresh.load_state_dict(average.module.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(images), average.module.eval()(images))
    finish(model, pruner, lambda net: net(images), timm.create_model('resnet10t', num_classes=5))
    assert not torch.equal(model.conv1[0].weight, average.module.conv1[0].weight)


# ----------------------------------------------------------------------------------------------------------- transformers


def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return BertForMaskedLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    return GPT2LMHeadModel(config)


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    return ViTForImageClassification(config)


def texts(generator):
    tokens = torch.randint(2, 40, (10,), generator=generator)
    return {'input_ids': tokens, 'labels': tokens.clone()}


def pictures(generator):
    return {'pixel_values': torch.randn(1, 8, 8, generator=generator), 'labels': torch.randint(0, 2, (), generator=generator)}


CASES = {
    'bert': (bert, texts, {}),
    'gpt2': (gpt2, texts, {'include': 'transformer.h.*'}),
    'vit': (vit, pictures, {}),
}


def data_of(example):
    generator = torch.Generator().manual_seed(0)
    return [example(generator) for _ in range(24)]


def train_with_trainer(build, data, options, folder, accumulate=1, resume=None, **arguments):
    """HF Trainer with a callback: update_thresh() before each optimizer step; its state lies beside each checkpoint."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    model = build()
    pruner = Pruner(model, final_rate=0.8, nbatches=24 // 4 // accumulate, epochs=2, say=None, **options)

    class Sparse(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            pruner.update_thresh()

        def on_train_begin(self, args, state, control, model, **_):
            if (
                resume is not None and build is vit
            ):  # transformers 5 saves a ViT under older names, which its Trainer does not read again
                model.load_state_dict(torch.load(resume / 'names.pt'), strict=True)

        def on_train_end(self, args, state, control, **_):
            pruner.update_thresh(end_of_batch=True)

        def on_save(self, args, state, control, model, **_):
            folder = Path(args.output_dir) / f'checkpoint-{state.global_step}'
            torch.save(pruner.state_dict(), folder / 'pruner.pt')
            torch.save(model.state_dict(), folder / 'names.pt')

    if resume is not None:
        pruner.load_state_dict(torch.load(resume / 'pruner.pt'))
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy='no',
        dataloader_num_workers=0,
        learning_rate=1e-2,
        seed=5,
        **arguments,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=data, callbacks=[Sparse()])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, pruner


def output_of(data):
    batch = {name: torch.stack([example[name] for example in data[:4]]) for name in data[0] if name != 'labels'}
    return lambda model: model(**batch).logits


@pytest.mark.parametrize('name', CASES)
def test_trainer_with_checkpoints_and_resume(name, tmp_path):
    pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    build, example, options = CASES[name]
    data = data_of(example)
    whole, pruner = train_with_trainer(build, data, options, tmp_path / 'a', save_strategy='steps', save_steps=5)
    checkpoint = tmp_path / 'a' / 'checkpoint-5'
    assert (checkpoint / 'model.safetensors').exists()
    again, second = train_with_trainer(build, data, options, tmp_path / 'b', save_strategy='no', resume=checkpoint)
    assert second.step == pruner.step == 12 and second.threshold == pruner.threshold
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    finish(whole, pruner, output_of(data), build())
    whole.save_pretrained(tmp_path / 'sparse')
    loaded = type(whole).from_pretrained(tmp_path / 'sparse').eval()
    assert torch.equal(output_of(data)(loaded), output_of(data)(whole))
    assert count(loaded, list(pruner.layers)) == count(whole, list(pruner.layers))


@pytest.mark.parametrize('name', ['bert', 'gpt2'])
def test_a_tied_embedding_is_left_out_and_stays_tied(name, tmp_path):
    pytest.importorskip('transformers')
    build, example, options = CASES[name]
    model, lines = build(), []
    pruner = Pruner(model, final_rate=0.5, say=lines.append, **options)
    assert 'tied to' in lines[0]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    dense = embedding.weight.detach().clone()
    pruner.update_thresh()
    finish(model, pruner, output_of(data_of(example)), build())
    assert head.weight is embedding.weight and torch.equal(embedding.weight, dense)


def test_save_pretrained_of_an_attached_network(tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model = bert()
    pruner = Pruner(model, final_rate=0.5, say=None)
    pruner.update_thresh()
    model.save_pretrained(tmp_path / 'attached')
    saved = pytest.importorskip('safetensors.torch').load_file(tmp_path / 'attached' / 'model.safetensors')
    tied = {'cls.predictions.decoder.weight', 'cls.predictions.decoder.bias'}
    assert saved.keys() == model.state_dict().keys() - tied
    model.save_pretrained(tmp_path / 'dense', state_dict=dense_state_dict(model))
    dense = transformers.BertForMaskedLM.from_pretrained(tmp_path / 'dense')
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in dense_state_dict(model).items())


def test_trainer_with_accumulation(tmp_path):
    pytest.importorskip('accelerate')
    pytest.importorskip('transformers')
    data = data_of(pictures)
    model, pruner = train_with_trainer(vit, data, {}, tmp_path, accumulate=3, save_strategy='no')
    assert pruner.step == pruner.total_steps == 4
    finish(model, pruner, output_of(data), vit())


# --------------------------------------------------------------------------------------------------------- accelerate, peft


def images_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def images_data():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 1, 8, 8, generator=generator), torch.randint(0, 5, (16,), generator=generator)
    return torch.utils.data.TensorDataset(images, labels)


@pytest.mark.parametrize('attach_first', [True, False])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_accelerate(attach_first, accumulate):
    accelerate = pytest.importorskip('accelerate')
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = images_net()
    loader = torch.utils.data.DataLoader(images_data(), batch_size=4)
    settings = {'final_rate': 0.9, 'nbatches': 4 // accumulate, 'epochs': 2, 'say': None}
    if attach_first:
        pruner = Pruner(model, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if not attach_first:
        pruner = Pruner(accelerator.unwrap_model(model), **settings)
    for _ in range(2):
        for number, (images, labels) in enumerate(loader):
            if number % accumulate == 0:
                pruner.update_thresh()
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
    finish(accelerator.unwrap_model(model), pruner, lambda net: net(images_data().tensors[0]), images_net())


def test_lora():
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=['0', '2'], init_lora_weights=False))
    pruner = Pruner(model, final_rate=0.5, include='*.base_layer', exclude='*lora_*', say=None)
    assert [name.rpartition('.')[2] for name in pruner.layers] == ['base_layer', 'base_layer']
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    x = torch.randn(4, 8)
    for _ in range(3):
        pruner.update_thresh()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    before = model(x)
    pruner.desparsify()
    assert torch.equal(model(x), before)
    layers = [module.base_layer for module in model.modules() if hasattr(module, 'base_layer')]
    assert sum(int((layer.weight == 0).sum()) for layer in layers) == exact(8 * 16 + 16 * 4, 0.5)
    assert not any(layer.weight.requires_grad for layer in layers)


def test_a_compiled_step_of_a_timm_network():
    timm = pytest.importorskip('timm')
    torch._dynamo.reset()

    def build():
        torch.manual_seed(0)
        return timm.create_model('resnet10t', num_classes=5)

    model = build()
    pruner = Pruner(model, final_rate=0.8, nbatches=3, epochs=1, say=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    images = torch.randn(4, 3, 32, 32)

    @torch.compile(backend='aot_eager')
    def loss_of(images):
        pruner.update_thresh()
        return nn.functional.cross_entropy(model(images), torch.arange(4))

    for _ in range(3):
        optimizer.zero_grad()
        loss_of(images).backward()
        optimizer.step()
    finish(model, pruner, lambda net: net(images), build())


# --------------------------------------------------------------------------------------------------------- two processes

LIGHTNING = """
import sys, torch
import lightning
from torch import nn
from sparse_utils import Pruner, count_zeros

class Net(lightning.LightningModule):
    def __init__(self, attach):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        self.attach, self.pruner = attach, None

    def start(self):
        self.pruner = Pruner(self.net, final_rate=0.9, nbatches=4, epochs=2, say=None)

    def configure_model(self):
        if self.attach == 'before' and self.pruner is None:
            self.start()

    def on_train_start(self):  # the network is wrapped by now
        if self.attach == 'after':
            self.start()

    def on_train_batch_start(self, batch, number):
        self.pruner.update_thresh()

    def training_step(self, batch, number):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_train_end(self):
        self.pruner.update_thresh(end_of_batch=True)
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(9))
        self.net.eval()
        before = self.net(images)
        self.pruner.desparsify()
        same = torch.equal(self.net(images), before)
        result = {'same': same, 'state': self.net.state_dict(), 'dense': self.dense, 'steps': self.pruner.step}
        torch.save(result, f'{sys.argv[1]}/rank{self.global_rank}.pt')

    def on_before_zero_grad(self, optimizer):
        if self.pruner is not None:
            self.dense = {name: parameter.detach().clone() for name, parameter in self.net.named_parameters()}

generator = torch.Generator().manual_seed(0)
images, labels = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(0, 5, (32,), generator=generator)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
quiet = {'logger': False, 'enable_checkpointing': False, 'enable_progress_bar': False, 'enable_model_summary': False}
trainer = lightning.Trainer(accelerator='cpu', devices=2, strategy='ddp_fork', max_epochs=2, **quiet)
trainer.fit(Net(sys.argv[2]), loader)
"""

DDP = """
import os, sys, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from sparse_utils import Pruner

def work(rank, folder, attach):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    settings = {'final_rate': 0.9, 'nbatches': 4, 'epochs': 2, 'say': None}
    if attach == 'before':
        pruner = Pruner(model, **settings)
    wrapped = DistributedDataParallel(model)
    if attach == 'after':
        pruner = Pruner(wrapped, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(10 + rank)
    for _ in range(8):
        pruner.update_thresh()
        loss = wrapped(torch.randn(4, 1, 8, 8, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pruner.update_thresh(end_of_batch=True)
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    wrapped.eval()
    before = wrapped(images)
    pruner.desparsify()
    same = torch.equal(wrapped(images), before)
    torch.save({'same': same, 'state': model.state_dict(), 'dense': dense, 'steps': pruner.step}, f'{folder}/rank{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()

if __name__ == '__main__':
    torch.multiprocessing.start_processes(work, (sys.argv[1], sys.argv[2]), nprocs=2, start_method='fork')
"""


@pytest.mark.parametrize('attach', ['before', 'after'])
@pytest.mark.parametrize('program', ['lightning', 'torch'])
def test_two_processes(program, attach, tmp_path):
    """Attached before or after the network is wrapped: both ranks end with the same weights and exact zeros."""
    pytest.importorskip(program)
    (tmp_path / 'train.py').write_text(LIGHTNING if program == 'lightning' else DDP)
    done = subprocess.run(
        [sys.executable, 'train.py', str(tmp_path), attach],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**__import__('os').environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f'rank{rank}.pt') for rank in range(2))
    assert one['same'] and two['same'] and one['steps'] == two['steps'] == 8
    for kind in ('state', 'dense'):
        buffers = ('1.running_mean', '1.running_var')  # each rank has its own images
        assert all(torch.equal(one[kind][name], two[kind][name]) for name in one[kind] if name not in buffers)
    fresh = images_net()
    fresh.load_state_dict(one['state'], strict=True)
    assert count(fresh) == (exact(72 + 1440, 0.9), 72 + 1440)


def test_copies_of_a_lightning_module_do_not_share_a_class():
    lightning = pytest.importorskip('lightning')

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x)

    model = Net()
    pruner = Pruner(model, final_rate=0.5, say=None)
    twin = copy.deepcopy(model)
    pruner.desparsify()
    assert parametrize.is_parametrized(twin.fc) and twin(torch.ones(1, 8)).shape == (1, 8)

"""Train and sparsify one network: parse, seed, data, model, method, train, evaluate, record.

python main.py --model=resnet20 --ptarget=0.99                  Feather on CIFAR-100, as its paper's repository runs it
python main.py --method dense --dataset digits --epochs 15      the dense control, on data that needs no download
python main.py --config configs/quickstart.yaml --row feather-90
python main.py --shrink RUN, --publish RUN, --evaluate FILE     what is done with a finished run; with --help after it, more
"""

import contextlib
import math
import os
import shlex
import sys
import time
from argparse import Namespace

import torch
from torch import nn
from tqdm import tqdm

import archs
import distributed
import methods
import published
import record
import shrink
from args import parse
from data import DataError, load
from sparse_utils import count_zeros, layers_to_prune


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if any(word.split('=')[0] == '--shrink' for word in argv):  # a finished run becomes a smaller network
        return shrink.main(argv)
    args = parse(argv)
    try:
        device = pick_device(args)
        if not args.command:
            distributed.start(device)
            if args.batch_size < distributed.world():
                raise ValueError(f'--batch-size {args.batch_size} leaves nothing for some of {distributed.world()} processes')
        if device.type == 'cpu' and args.device is None:
            record.say('running on the CPU' + ('' if args.no_cuda else ': PyTorch finds no CUDA device'))
        if args.command:  # --publish, --evaluate: something with a run that is finished
            return published.act(args, device)
        torch.manual_seed(args.seed)
        data = load(args, device)
        model = archs.build(
            args.model, data.num_classes, args.width, data.in_channels, data.image_size, args.dropout, args.bn_momentum
        )
        layers_to_prune(model, args.pthres)  # raises ValueError where there are none
        method = methods.load(args.method)(args)
        if run := vars(args).get('from'):
            method.start_from(model, record.weights(run.replace('{seed}', str(args.seed))))
        folder, lock = record.open_run(args)
    except (DataError, record.RunError, ValueError, RuntimeError) as error:
        sys.exit(f'main.py: error: {error}')
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    with lock:
        result = record.finished(folder) or carry_out(Job(args, model, data, device, folder), method)
        record.report(result, folder)


def carry_out(job, method):
    """Train, finalize, measure and write down; a run that fails leaves its reason in result.json."""
    record.say(f'{job.args.method} on {job.args.model}, {job.args.dataset}, {record.hardware(job.device)}; in {job.folder}')
    try:
        method.run(job)
        job.model = method.finalize(job.model)
        state = {name: tensor.cpu().contiguous() for name, tensor in job.model.state_dict().items()}
        record.save(state, job.folder / 'model.pt')
        result = record.measure(job, method)
        record.write_json(result, job.folder / 'result.json')
        return result
    except KeyboardInterrupt:
        sys.exit(f'interrupted; continue with: python main.py --resume {shlex.quote(str(job.folder))}')
    except Exception as error:
        expected = isinstance(error, (record.RunError, DataError, ValueError))
        reason = str(error) if expected else f'{type(error).__name__}: {error}'
        with contextlib.suppress(record.RunError):  # a full disk may be the reason
            record.write_json({'status': 'failed', 'reason': reason, 'args': vars(job.args)}, job.folder / 'result.json')
        if expected:
            sys.exit(f'main.py: error: {error}')
        raise
    finally:
        if job.writer is not None:
            job.writer.close()


class Job:
    """What method.run(job) works with: args, model, device, the loaders train, val (or None) and test, fit and evaluate."""

    def __init__(self, args, model, data, device, folder):
        self.args, self.model, self.device, self.folder = args, model, device, folder
        self.train, self.val, self.test, self.source = data.train, data.val, data.test, data.source
        self.done = {'epochs': 0, 'seconds': 0.0, 'best': 0.0}  # over all stages
        self.writer = None

    def fit(self, method, stage='train', **changes):
        """Train one stage; `changes` replace arguments: fit(method, 'finetune', epochs=20, lr=0.001).

        A stage of this name that is finished is loaded instead, one that was interrupted is continued: a pipeline that is run
        again from its start does the right thing. Stage names must differ within a pipeline.
        """
        args = Namespace(**vars(self.args) | changes)
        model = self.model
        method.prepare(model, args.epochs * len(self.train))
        optimizer = make_optimizer(args, method.param_groups(model))
        forward = distributed.wrap(model, method.IDLE)
        fit = Namespace(
            model=model,
            forward=torch.compile(forward, mode=args.compile) if args.compile else forward,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss(label_smoothing=args.label_smoothing),
            autocast=torch.autocast(self.device.type, torch.bfloat16) if args.amp else contextlib.nullcontext(),
            example=next(iter(self.test))[0][:1],
        )
        method.attach(fit)
        for epoch in range(self.restore(method, optimizer, stage), args.epochs):
            began = time.perf_counter()
            loss, images = self.train_epoch(method, fit, args, stage, epoch)
            method.after_epoch(epoch)
            distributed.same_buffers(model)
            line = {'stage': stage, 'epoch': epoch + 1, 'epochs': args.epochs, 'loss': loss}
            line['images_per_second'] = round(images / (time.perf_counter() - began), 1)
            line['accuracy'] = self.evaluate(self.test)
            if self.val is not None:
                line['val_accuracy'] = self.evaluate(self.val)
            zeros, weights = record.totals(count_zeros(model, args.pthres))
            last = lr_factor(args, (epoch + 1) * len(self.train) - 1, len(self.train))
            line |= {'sparsity': zeros / weights, 'lr': args.lr * last, **method.metrics()}
            line['seconds'] = round(time.perf_counter() - began, 3)
            method.after_evaluation(line)
            self.end_epoch(line)
            self.save(method, optimizer, stage, epoch + 1)

    def train_epoch(self, method, fit, args, stage, epoch):
        """The steps of one epoch -> (mean loss, number of images). Raises RunError when the loss is not finite."""
        batches, device = len(self.train), self.device
        total, good, seen = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device), 0
        fit.model.train()
        self.train.set_epoch(self.done['epochs'])
        progress = tqdm(
            self.train, f'{stage} {epoch + 1}/{args.epochs}', leave=False, disable=True if distributed.rank() else None
        )
        for index, (images, labels) in enumerate(progress):
            step, size = epoch * batches + index, self.train.size(index)
            method.before_step(step)
            fit.optimizer.zero_grad()
            total += backward(method, fit, images, labels, size, args.accumulate)
            good, seen = good + total.isfinite(), seen + size
            method.after_backward(step)
            if args.clip:
                nn.utils.clip_grad_norm_(fit.model.parameters(), args.clip)
            factor = lr_factor(args, step, batches)
            for group in fit.optimizer.param_groups:
                group['lr'] = group['initial_lr'] * factor
            fit.optimizer.step()
            method.after_step(step, (images, labels))
            if (index + 1) % 50 == 0 or index + 1 == batches:  # not each step, as this waits for the GPU
                if not total.isfinite():
                    self.diverged(f'step {int(good) + 1} of {batches} of epoch {epoch + 1} of {stage}', args.lr * factor)
        return distributed.total(total).item() / seen, seen

    def diverged(self, place, lr):
        kept = self.done['epochs']
        rest = f'the checkpoint of {kept} epochs in {self.folder} is from before' if kept else 'there is no checkpoint yet'
        raise record.RunError(f'the loss is not finite in {place}, at a learning rate of {lr:g}; {rest}: try a lower --lr')

    def evaluate(self, loader):
        """Accuracy in percent over a loader, in float32 and eval mode."""
        return record.accuracy(self.model, loader)

    def end_epoch(self, line):
        """Count the epoch, and write its line to log.jsonl, to TensorBoard and to the terminal."""
        from torch.utils.tensorboard import SummaryWriter  # a second to import, so not at the top

        record.log(self.folder, line, self.done['epochs'])
        self.done['epochs'] += 1
        self.done['seconds'] += line['seconds']
        self.done['best'] = max(self.done['best'], line['accuracy'])
        if distributed.rank() == 0:
            self.writer = self.writer or SummaryWriter(self.folder, purge_step=self.done['epochs'])
            for name, value in line.items():
                if name not in ('stage', 'epoch', 'epochs'):
                    self.writer.add_scalar(name, value, self.done['epochs'])
            self.writer.flush()
        record.say(
            f'{line["stage"]} {line["epoch"]:>{len(str(line["epochs"]))}}/{line["epochs"]}  loss {line["loss"]:.4f}  '
            f'accuracy {line["accuracy"]:.2f} %  sparsity {100 * line["sparsity"]:.2f} %  {line["seconds"]:.1f} s'
        )

    def save(self, method, optimizer, stage, epoch):
        """The checkpoint: all that the rest of the run depends on."""
        state = {'stage': stage, 'epoch': epoch, 'done': self.done, 'rng': torch.get_rng_state()}
        state |= {'model': self.model.state_dict(), 'optimizer': optimizer.state_dict(), 'method': method.state_dict()}
        if self.device.type == 'cuda':
            state['cuda_rng'] = torch.cuda.get_rng_state(self.device)
        record.save(state, self.folder / 'checkpoint.pt')

    def restore(self, method, optimizer, stage):
        """Load what there is of this stage and return the epoch to go on with, 0 for none."""
        ended, current = self.folder / f'stage-{stage}.pt', self.folder / 'checkpoint.pt'
        distributed.wait()
        if ended.exists():
            state = record.load(ended, self.device)
        elif current.exists():
            state = record.load(current, self.device)
            if state['stage'] != stage:  # the stage before has ended: keep its end, and start this one
                distributed.wait()
                if distributed.rank() == 0:
                    current.rename(self.folder / f'stage-{state["stage"]}.pt')
                distributed.wait()
                return 0
        else:
            return 0
        try:
            self.model.load_state_dict(state['model'])
            optimizer.load_state_dict(state['optimizer'])
            method.load_state_dict(state['method'])
            torch.set_rng_state(state['rng'].cpu())
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = ' '.join(str(error).split())[:100]
            raise record.RunError(
                f'{ended if ended.exists() else current} does not fit this run ({reason}); take another --out'
            ) from None
        if 'cuda_rng' in state and self.device.type == 'cuda':
            torch.cuda.set_rng_state(state['cuda_rng'].cpu(), self.device)
        self.done = state['done']
        return state['epoch']


def backward(method, fit, images, labels, size, parts):
    """Gradients of a step's mean loss over the `size` images that all processes have, in `parts` pieces -> sum of the losses."""
    total, parts = 0.0, min(parts, max(size // distributed.world(), 1))  # as many in every process
    for number, (some, their) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)):
        with fit.autocast:
            loss = fit.criterion(fit.forward(some), their)
        extra = method.loss() if number == 0 else None
        share = len(their) * distributed.world() / size  # 1 in one piece and one process; gradients are averaged over processes
        (loss * share if extra is None else loss * share + extra).backward()
        total = total + loss.detach() * len(their)
    return total


def pick_device(args):
    """--device, or the GPU number --gpu where there is one, else the CPU."""
    if args.device is None and (args.no_cuda or not torch.cuda.is_available()):
        return torch.device('cpu')
    device = torch.device(args.device or f'cuda:{args.gpu}')
    if device.type == 'cuda' and 'LOCAL_RANK' in os.environ:  # torchrun: a GPU for each process
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'there is no device {device}: PyTorch finds {torch.cuda.device_count()} CUDA devices')
    torch.backends.cudnn.benchmark = True
    return device


def make_optimizer(args, groups):
    """SGD or Adam over the method's parameter groups; a group without an `lr` has --lr."""
    if args.optimizer == 'adam':
        optimizer = torch.optim.Adam(groups, args.lr)
    else:
        optimizer = torch.optim.SGD(groups, args.lr, momentum=args.momentum, nesterov=args.nesterov)
    for group in optimizer.param_groups:
        group['initial_lr'] = group['lr']
    return optimizer


def lr_factor(args, step, batches):
    """The learning rate at a step, as a share of its initial value: a pure function, so there is no state to resume."""
    if args.lr_update == 'epoch':
        step = step // batches * batches
    total, warmup = args.epochs * batches, args.warmup_epochs * batches
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if args.lr_schedule == 'multistep':
        return args.lr_gamma ** sum(step >= milestone * total for milestone in args.lr_milestones)
    if args.lr_schedule == 'cosine':
        span = total - warmup
        phase = (step - warmup) * (args.lr_restarts + 1) % span / span  # exactly 0 at a restart
        return 0.5 * (1 + math.cos(math.pi * phase))
    return 1.0


if __name__ == '__main__':
    main()

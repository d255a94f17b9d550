"""Train and sparsify one network: parse, seed, data, model, method, train, evaluate, record.

python main.py --model=resnet20 --ptarget=0.99                  Feather on CIFAR-100, as its paper's repository runs it
python main.py --method dense --dataset digits --epochs 15      the dense control, on data that needs no download
python main.py --config configs/quickstart.yaml --row feather-90
python main.py --shrink RUN, --sparse-compile RUN, --publish RUN, --evaluate FILE     with a finished run; --help after it
"""

import contextlib
import functools
import shlex
import sys
import time
from argparse import Namespace

import torch
from torch import nn
from tqdm import tqdm

import archs
import methods
from args import parse
from deploy.files import FileError, read_tensors, write_json, write_tensors
from harness import commands, graphs, recalibrate, result, run_folder
from harness.data import DataError, load
from harness.training import keep_freed_memory, lr_factor, make_optimizer, one_step, pick_device
from harness.weights import start_weights
from pruners import processes
from pruners.processes import say
from sparse_utils import count_zeros, layers_to_prune


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        device = pick_device(args)
        if args.command:  # something with a run that is finished
            return commands.carry_out(args, device)
        processes.start(device)
        keep_freed_memory()
        if args.batch_size < processes.world():
            raise ValueError(f'--batch-size {args.batch_size} leaves nothing for some of {processes.world()} processes')
        if device.type == 'cpu' and args.device is None:
            say('running on the CPU' + ('' if args.no_cuda else ': PyTorch finds no CUDA device'))
        torch.manual_seed(args.seed)
        data = load(args, device)
        copies = run_folder.sources(args.resume)
        model = archs.from_args(args, data.num_classes, data.in_channels, data.image_size, copies)
        layers_to_prune(model, args.pthres)  # raises ValueError where there are none
        method = methods.load(args.method)(args)
        graphs.check(args, device, method)
        recalibrate.check(model, vars(args).get('recalibrate_images'))
        if start := start_weights(args, data):
            method.start_from(model, *start)
        folder, lock = run_folder.open_run(args)
        run_folder.keep_sources(folder, archs.files_of(args.model))
    except (DataError, FileError, ValueError, RuntimeError) as error:
        sys.exit(f'main.py: error: {error}')
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    with lock:
        figures = run_folder.finished(folder) or carry_out(Job(args, model, data, device, folder), method)
        result.report(figures, folder)


def carry_out(job, method):
    """Train, finalize, measure and write down; a run that fails leaves its reason in result.json."""
    say(f'{job.args.method} on {job.args.model}, {job.args.dataset}, {result.hardware(job.device)}; in {job.folder}')
    try:
        method.announce(job.model)
        method.run(job)
        job.model = method.finalize(job.model)
        job.recalibrate()
        state = {name: tensor.cpu().contiguous() for name, tensor in job.model.state_dict().items()}
        write_tensors(state, job.folder / 'model.pt')
        figures = result.measure(job, method)
        write_json(figures, job.folder / 'result.json')
        return figures
    except KeyboardInterrupt:
        sys.exit(f'interrupted; continue with: python main.py --resume {shlex.quote(str(job.folder))}')
    except Exception as error:
        expected = isinstance(error, (FileError, DataError, ValueError))
        reason = str(error) if expected else f'{type(error).__name__}: {error}'
        with contextlib.suppress(FileError):  # a full disk may be the reason
            write_json({'status': 'failed', 'reason': reason, 'args': vars(job.args)}, job.folder / 'result.json')
        if expected:
            sys.exit(f'main.py: error: {error}')
        raise
    finally:
        if job.writer is not None:
            job.writer.close()


class Job:
    """What method.run(job) has: args, model, device, folder, train, val (or None) and test loaders, example, fit, evaluate."""

    def __init__(self, args, model, data, device, folder):
        self.args = args
        self.model = model
        self.device = device
        self.folder = folder
        self.data = data
        self.train = data.train
        self.val = data.val
        self.test = data.test
        self.done = {'epochs': 0, 'epochs_on': {}, 'seconds': 0.0, 'best': 0.0}  # over all stages; epochs_on: by hardware
        self.recalibrated = {}  # figures, once it is done
        self.writer = None
        self.forward = None  # of evaluations within a stage, where it is not the model itself

    @functools.cached_property
    def example(self):
        """One test image, [1, C, H, W], normalised and on the device: an input for whatever traces the network."""
        return next(iter(self.test))[0][:1].clone()

    def fit(self, method, stage='train', **changes):
        """Train one stage; `changes` replace arguments: fit(method, 'finetune', epochs=20, lr=0.001).

        A stage of this name that is finished is loaded instead, one that was interrupted is continued: a pipeline that is run
        again from its start does the right thing. Stage names must differ within a pipeline.
        """
        args = Namespace(**vars(self.args) | changes)
        model = self.model
        method.prepare(model, args.epochs * len(self.train), args)
        optimizer = make_optimizer(args, method.param_groups(model, args))
        forward = processes.wrap(model, method.idle)
        fit = Namespace(
            args=args,
            batches=len(self.train),
            model=model,
            forward=torch.compile(forward, mode=args.compile) if args.compile else forward,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss(label_smoothing=args.label_smoothing),
            autocast=torch.autocast(self.device.type, torch.bfloat16) if args.amp else contextlib.nullcontext(),
            example=self.example,
            replayed=None,
        )
        method.attach(fit)
        if vars(args).get('cuda_graphs'):
            fit.replayed = graphs.forward_backward(fit)
            self.forward = graphs.forward(model)
        for epoch in range(self.restore(method, optimizer, stage), args.epochs):
            began = time.perf_counter()
            loss, images = self.train_epoch(method, fit, stage, epoch)
            method.after_epoch(epoch)
            processes.same_buffers(model)
            line = {'stage': stage, 'epoch': epoch + 1, 'epochs': args.epochs, 'loss': loss}
            line['images_per_second'] = round(images / (time.perf_counter() - began), 1)
            line['accuracy'] = self.evaluate(self.test)
            if self.val is not None:
                line['val_accuracy'] = self.evaluate(self.val)
            zeros, weights = result.totals(count_zeros(model, args.pthres))
            last = lr_factor(args, (epoch + 1) * len(self.train) - 1, len(self.train))
            line |= {'sparsity': zeros / weights, 'lr': args.lr * last, **method.metrics()}
            line['seconds'] = round(time.perf_counter() - began, 3)
            method.after_evaluation(line)
            self.end_epoch(line)
            self.save(method, optimizer, stage, epoch + 1)
        self.forward = None

    def train_epoch(self, method, fit, stage, epoch):
        """The steps of one epoch -> (mean loss, number of images). Raises RunError when the loss is not finite."""
        total = torch.zeros((), device=self.device)
        good = torch.zeros((), dtype=torch.int64, device=self.device)
        seen = 0
        fit.model.train()
        self.train.set_epoch(self.done['epochs'])
        title = f'{stage} {epoch + 1}/{fit.args.epochs}'
        for index, batch in enumerate(tqdm(self.train, title, leave=False, disable=True if processes.rank() else None)):
            size = self.train.size(index)
            total += one_step(method, fit, epoch * fit.batches + index, batch, size)
            good += total.isfinite()
            seen += size
            if (index + 1) % 50 == 0 or index + 1 == fit.batches:  # not each step, as this waits for the GPU
                if not total.isfinite():
                    self.diverged(f'step {int(good) + 1} of {fit.batches} of epoch {epoch + 1} of {stage}', fit.optimizer)
        return processes.total(total).item() / seen, seen

    def diverged(self, place, optimizer):
        kept = self.done['epochs']
        lr = optimizer.param_groups[0]['lr']
        rest = f'the checkpoint of {kept} epochs in {self.folder} is from before' if kept else 'there is no checkpoint yet'
        raise run_folder.RunError(f'the loss is not finite in {place}, at a learning rate of {lr:g}; {rest}: try a lower --lr')

    def evaluate(self, loader):
        """Accuracy in percent over a loader, in float32 and eval mode."""
        return result.accuracy(self.model, loader, self.forward)

    def recalibrate(self):
        """Estimate the statistics of batch norms again, where --recalibrate says so and it was not done yet.

        For the end, when the weights are final.
        """
        number = vars(self.args).get('recalibrate_images')
        if not number or self.recalibrated:
            return
        before = self.evaluate(self.test)
        seen = recalibrate.recalibrate(self.model, self.train, number, self.done['epochs'], self.args.seed)
        self.recalibrated = {'recalibrated_images': seen, 'accuracy_before_recalibration': before}
        say(f'recalibrated batch norms on {seen:,} training images; accuracy before it {before:.2f} %')

    def end_epoch(self, line):
        """Count the epoch, and write its line to log.jsonl, to TensorBoard and to the terminal."""
        from torch.utils.tensorboard import SummaryWriter  # a second to import, so not at the top

        run_folder.log(self.folder, line, self.done['epochs'])
        self.done['epochs'] += 1
        here = result.hardware(self.device)
        self.done['epochs_on'][here] = self.done['epochs_on'].get(here, 0) + 1
        self.done['seconds'] += line['seconds']
        self.done['best'] = max(self.done['best'], line['accuracy'])
        if processes.rank() == 0:
            self.writer = self.writer or SummaryWriter(self.folder, purge_step=self.done['epochs'])
            for name, value in line.items():
                if name not in ('stage', 'epoch', 'epochs'):
                    self.writer.add_scalar(name, value, self.done['epochs'])
            self.writer.flush()
        say(
            f'{line["stage"]} {line["epoch"]:>{len(str(line["epochs"]))}}/{line["epochs"]}  loss {line["loss"]:.4f}  '
            f'accuracy {line["accuracy"]:.2f} %  sparsity {100 * line["sparsity"]:.2f} %  {line["seconds"]:.1f} s'
        )

    def save(self, method, optimizer, stage, epoch):
        """The checkpoint: all that the rest of the run depends on."""
        state = {'stage': stage, 'epoch': epoch, 'done': self.done, 'rng': torch.get_rng_state()}
        state |= {'model': self.model.state_dict(), 'optimizer': optimizer.state_dict(), 'method': method.state_dict()}
        if self.device.type == 'cuda':
            state['cuda_rng'] = torch.cuda.get_rng_state(self.device)
        write_tensors(state, self.folder / 'checkpoint.pt')

    def restore(self, method, optimizer, stage):
        """Load what there is of this stage and return the epoch to go on with, 0 for none."""
        ended = self.folder / f'stage-{stage}.pt'
        current = self.folder / 'checkpoint.pt'
        processes.wait()
        path = next((path for path in (ended, current) if path.exists()), None)
        if path is None:
            return 0
        state = read_tensors(path, self.device)
        if state['stage'] != stage:  # the stage before has ended: keep its end, and start this one
            processes.wait()
            if processes.rank() == 0:
                current.rename(self.folder / f'stage-{state["stage"]}.pt')
            processes.wait()
            return 0
        try:
            self.model.load_state_dict(state['model'])
            optimizer.load_state_dict(state['optimizer'])
            method.load_state_dict(state['method'])
            torch.set_rng_state(state['rng'].cpu())
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = ' '.join(str(error).split())[:100]
            raise run_folder.RunError(f'{path} does not fit this run ({reason}); take another --out') from None
        if 'cuda_rng' in state and self.device.type == 'cuda':
            torch.cuda.set_rng_state(state['cuda_rng'].cpu(), self.device)
        self.done = state['done']
        self.done.setdefault('epochs_on', {'unknown hardware': self.done['epochs']})  # files from before it was written down
        return state['epoch']


if __name__ == '__main__':
    main()

"""--cuda-graphs: the kernels of a step recorded once, and from then on launched together.

A large GPU is done with a kernel of a small network before Python has launched the next one. The same kernels run on the same
numbers, so this is one of the flags that say where a run runs, not what it computes. Recorded are the forward and backward
pass of a whole batch, and the forward pass of an evaluation; the optimizer and the hooks of a method stay as they are. That
needs a method whose passes launch the same kernels each time, on memory that stays where it is (Method.replays): thresholds
and masks that are written in place, and no number that Python waits for.
"""

import torch

from pruners import processes

WARM_UP = 3  # passes before recording, in which libraries choose their kernels and take their memory


def check(args, device, method):
    """Raise ValueError where --cuda-graphs cannot be used."""
    if not vars(args).get('cuda_graphs'):  # runs of before do not have it
        return
    reasons = {
        f'a GPU, not {device}': device.type != 'cuda',
        f'a method whose steps are all alike, which {args.method} is not': not method.replays,
        'one process': processes.world() > 1,
        'whole batches: leave --accumulate out': args.accumulate > 1,
        'the network as it is: leave --compile out': bool(args.compile),
    }
    for reason, missing in reasons.items():
        if missing:
            raise ValueError(f'--cuda-graphs needs {reason}')


def recorded(function, inputs, state=()):
    """The CUDA graph of function(*inputs): a function of tensors of these shapes and layouts, with the results of `function`.

    The tensors it returns are overwritten by the next call. state: the tensors that `function` changes; recording leaves them
    as they are. Raises ValueError for a function that cannot be recorded, as one that waits for the GPU.
    """
    places = [tensor.clone() for tensor in inputs]
    before = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(places[0].device):
        warm_up(function, places)
        try:
            with torch.cuda.graph(graph):
                result = function(*places)
        except RuntimeError as error:
            reason = ' '.join(str(error).split())[:150]
            raise ValueError(f'--cuda-graphs cannot record this network: {reason}') from None
    for tensor, old in zip(state, before, strict=True):
        tensor.copy_(old)

    def replay(*inputs):
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return result

    return replay


def warm_up(function, inputs):
    """Run a function some times, on a stream of its own as recording asks for; what it draws does not count."""
    draws = torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_rng_state(draws)


def forward_backward(fit):
    """A function of a whole batch, images and labels, that sets the gradients of the mean loss and returns it, 0-d."""
    parameters = list(fit.model.parameters())
    graph = None

    def passes(images, labels):
        for parameter in parameters:
            parameter.grad = None
        with fit.autocast:
            loss = fit.criterion(fit.forward(images), labels)
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in parameters]

    def run(images, labels):
        nonlocal graph
        if graph is None:
            graph = recorded(passes, (images, labels), list(fit.model.buffers()))
        loss, gradients = graph(images, labels)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    return run


def forward(model):
    """model(images) for evaluation, by one graph for each shape of images."""
    graphs = {}

    def run(images):
        if images.shape not in graphs:
            graphs[images.shape] = recorded(model, (images,))
        return graphs[images.shape](images)

    return run

"""The memory of tensors: where each lies, and which share a buffer."""

import torch

from . import build
from .geometry import MOST_BORDER


class Value:
    """The memory of one tensor: its own buffer, or a slice of the channels of a concatenation.

    Images of four axes may have a border of zeros: `border` rows above and below, and as many columns between two rows.
    """

    def __init__(self, shape, border=0):
        self.shape = torch.Size(shape)
        self.images = shape[0] if shape else 1
        self.border = border
        self.pitch, self.plane, self.size = plain_strides(self.shape)  # floats between two rows, channels and images
        if border:
            self.pitch = shape[3] + border
            self.plane = -(-(shape[2] + border) * self.pitch // 16) * 16  # a multiple of every vector
            self.size = shape[1] * self.plane
        self.parent = None
        self.before = 0  # floats of the parent's image before this slice
        self.first = None  # index of the work that writes it, and of the last one that reads it
        self.last = None
        self.buffer = None

    def layout(self):
        """What buffers must have in common to be shared: where the zeros of the border lie."""
        return (self.pitch, self.plane, self.shape[2:]) if self.border else ()

    def root(self):
        return self if self.parent is None else self.parent.root()

    def place(self, shape=None):
        """Where it lies, read as this shape: (buffer, floats before the first image, ... between images, planes, rows)."""
        before = 0
        value = self
        while value.parent is not None:
            before += value.before
            value = value.parent
        pitch = self.pitch
        plane = self.plane
        if not self.border and shape is not None:
            pitch, plane, _ = plain_strides(shape)
        return value.buffer, before, value.size, plane, pitch


def plain_strides(shape):
    """(floats of a row, of a channel, of an image) of a tensor without border."""
    plane = torch.Size(shape[2:]).numel()
    return (shape[-1] if len(shape) > 2 else 1), plane, torch.Size(shape[1:]).numel()


def place_buffers(values):
    """Give every root value a buffer; those that are never needed at the same time share one.

    Returns (the buffers, tensors with slack around; for each the floats before its first image).
    """
    spans = {}
    for value in values:
        root = value.root()
        first = -1 if value.first is None else value.first
        last = max(first, -1 if value.last is None else value.last)
        old = spans.get(root, (first, last))
        spans[root] = min(old[0], first), max(old[1], last)
    sizes = []  # free: (number of buffer, index after which it is)
    layouts = []
    free = []
    for root, (first, last) in sorted(spans.items(), key=lambda item: item[1][0]):
        size = root.images * root.size
        layout = root.layout()
        fitting = [(n, end) for n, end in free if end < first and layouts[n] == layout and sizes[n] >= size >= sizes[n] // 4]
        if fitting and first >= 0:
            entry = min(fitting, key=lambda entry: sizes[entry[0]])
            free.remove(entry)
            root.buffer = entry[0]
        else:
            root.buffer = len(sizes)
            sizes.append(size)
            layouts.append(layout)
        if first >= 0:
            free.append((root.buffer, last))
    edges = [layout[0] * MOST_BORDER + MOST_BORDER if layout else 0 for layout in layouts]
    memory = [torch.zeros(size + 2 * (build.SLACK + edge) + 16) for size, edge in zip(sizes, edges, strict=True)]
    starts = []
    for buffer, edge in zip(memory, edges, strict=True):
        skip = -(buffer.data_ptr() // 4 + build.SLACK + edge) % 16  # first images begin at a multiple of 64 bytes
        starts.append(build.SLACK + edge + skip)
    return memory, starts


def view(value, memory, starts):
    """The value as a tensor of PyTorch over the same memory."""
    number, before, image, plane, pitch = value.place()
    if value.border:
        strides = [image, plane, pitch, 1]
    else:
        strides = [1]
        for size in reversed(value.shape[2:]):
            strides.insert(0, strides[0] * size)
        strides = [image, *strides] if value.shape[1:] else [1]
    return memory[number].as_strided(value.shape, strides, starts[number] + before)


def mask_of(value):
    """-1 at the pixels of a plane's rows, 0 in the border, and behind."""
    height, width = value.shape[2:]
    mask = torch.zeros(value.plane + build.SLACK, dtype=torch.int32)
    mask[: height * value.pitch].view(height, value.pitch)[:, :width] = -1
    return mask

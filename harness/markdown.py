"""Markdown tables whose columns line up."""


def markdown(head, lines):
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    rule = ['-' * width for width in widths]
    text = ''
    for line in [head, rule, *lines]:
        text += '| ' + ' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + ' |\n'
    return text

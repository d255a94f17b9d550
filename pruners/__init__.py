"""What methods and people's own training loops share: config lists, selection, masks that hold, groups of filters, searches."""

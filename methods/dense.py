"""Dense training: the control that every table begins with."""

from . import Method as Base


class Method(Base):
    gives = 'the dense network'
    replays = True

    def announce(self, model):
        pass  # nothing is pruned

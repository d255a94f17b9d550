"""Dense training: the control that every table begins with."""

from methods import Method as Base


class Method(Base):
    GIVES = 'the dense network'

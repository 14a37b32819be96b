"""A dictionary key that is an object itself."""


class Identity:
    """Equal to another of the very same object, whatever the object's class says of equality.

    A loss may be an instance of any class, also of one that cannot be hashed. The object stays alive as
    long as the key, so that no other takes its identity.
    """

    def __init__(self, of: object) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.of is other.of

    def __hash__(self) -> int:
        return id(self.of)

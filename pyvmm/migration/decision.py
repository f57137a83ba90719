# decision.py: placeholder
"""`Decision`."""


class Decision:
    """x"""

    def __init__(self, side: str) -> None:
        self.value = {"source": "held", "destination": "none"}[side]

    def __enter__(self) -> "Decision":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set(self, value: str) -> None:
        self.value = value

    def release(self) -> None:
        pass

"""What a row tried and what it lost, told to the process that runs it."""

import json
import time


class Tally:
    def __init__(self, show=lambda line: None):
        self.tried: dict[str, int] = {}
        self.lost: list[str] = []
        self.notes: list[str] = []
        self.show = show
        self.shown = time.monotonic()

    def count(self, what, n=1):
        self.tried[what] = self.tried.get(what, 0) + n

    def expect(self, right, loss):
        """What is not right is lost."""
        if not right:
            self.lost.append(loss)

    def note(self, text):
        """Something measured on the way, or a part that could not be tried here."""
        self.notes.append(text)

    def progress(self, done):
        """Tell the parent which part of the row is done, a few times a second."""
        if time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            self.show(json.dumps({"done": min(1.0, done)}))

    def result(self):
        return {"tried": self.tried, "lost": self.lost, "notes": self.notes}

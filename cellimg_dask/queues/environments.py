"""Stub."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Env:
    python: str
    token: str = ""

    def command(self):
        return [self.python]

    def variables(self):
        return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    @classmethod
    def venv(cls, path):
        return cls(str(path) + "/bin/python", str(path))

    @classmethod
    def current(cls):
        import sys

        return cls(sys.executable)

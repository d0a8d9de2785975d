"""Stub."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Env:
    python: str
    token: str = ""

    @classmethod
    def venv(cls, path):
        import pathlib

        path = pathlib.Path(path)
        return cls(str(path / "bin/python") if path.is_dir() else str(path))

    def command(self):
        return [self.python]

    def variables(self):
        return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

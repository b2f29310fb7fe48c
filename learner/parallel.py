"""Provisional: one process."""
from dataclasses import dataclass

@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1

    def sum(self, tensor):
        return tensor

    def reduce(self, watched):
        return watched

    def broadcast(self, data):
        return data

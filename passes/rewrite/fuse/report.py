"""What a fusion says of its work."""

from dataclasses import dataclass, field

from hikui.passes.patterns.match import NoMatch


@dataclass
class FusionReport:
    """How many patterns became one op, and why others did not."""

    what: str
    fused: int = 0
    misses: list[NoMatch] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Lines for the pass's result."""
        places: dict[str, list[str]] = {}
        for miss in self.misses:
            places.setdefault(miss.reason, []).append(miss.node)
        out = [f"{self.what}: {self.fused} fused"] if self.fused else []
        return out + [f"{self.what}: not fused at {', '.join(nodes)}: {reason}" for reason, nodes in places.items()]

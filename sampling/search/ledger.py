"""What a search has spent, counted where it is spent; budgets are held against it.

A forward-and-backward row counts 3 NFE, as in Ma et al. 2025.
"""

from dataclasses import asdict, dataclass, fields

BACKWARD_NFE = 2


@dataclass
class Ledger:
    """Counts of one search; add two with +."""

    conditional_rows: int = 0
    """UNet rows of the prompts."""
    unconditional_rows: int = 0
    """UNet rows of guidance's empty prompt."""
    backward_rows: int = 0
    """UNet rows that a gradient went back through."""
    decoded_images: int = 0
    """Images that the autoencoder decoded, previews included."""
    verifier_calls: int = 0
    """Images that verifiers scored, each verifier by itself."""
    denoising_s: float = 0.0
    """Seconds in the sampler."""
    decoding_s: float = 0.0
    """Seconds in the autoencoder."""
    verifying_s: float = 0.0
    """Seconds in the verifiers."""

    @property
    def nfe(self) -> int:
        """UNet evaluations; one that is differentiated counts 3."""
        rows = self.conditional_rows + self.unconditional_rows
        return rows + BACKWARD_NFE * self.backward_rows

    def __add__(self, other: "Ledger") -> "Ledger":
        names = [field.name for field in fields(self)]
        return Ledger(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __sub__(self, other: "Ledger") -> "Ledger":
        names = [field.name for field in fields(self)]
        return Ledger(**{name: getattr(self, name) - getattr(other, name) for name in names})

    def share(self, count: int) -> "Ledger":
        """Returns what one of `count` equal candidates of a batch has spent."""
        parts = {}
        for name, value in vars(self).items():
            parts[name] = round(value / count, 4) if name.endswith("_s") else value // count
        return Ledger(**parts)

    def to_row(self) -> dict[str, float]:
        """Returns every count and the NFE."""
        return {"nfe": self.nfe, **asdict(self)}

"""How an extraction is to be made."""

from dataclasses import dataclass

from featcache.inputs import Views
from featcache.inputs.images import KeptPixels
from featcache.machine import cores, resolve_device
from featcache.store.comparable import exact_name
from featcache.store.layout import DTYPES, EMBEDDING, FLOAT16, LOGITS, TOKEN_LOGITS


@dataclass(frozen=True, kw_only=True)
class ExtractSettings:
    """The keyword arguments of `extract_all`, checked.

    Raises:
        ValueError: a device, precision or dtype that there is not.
    """

    recipe: Views
    fields: tuple[str, ...] = (EMBEDDING,)
    dtype: str = FLOAT16
    top_k: int | None = None
    pixels: KeptPixels | None = None
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    precision: str = "auto"
    max_failures: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        resolve_device(self.device)
        if self.precision != "auto":
            exact_name(self.precision)
        if self.top_k is not None and (self.top_k < 1 or not {LOGITS, TOKEN_LOGITS} & {*self.fields}):
            raise ValueError(
                f"--top-k {self.top_k}: of the logits at least 1 is kept, where --fields names them; give both"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype}: unknown; known: {', '.join(DTYPES)}")

    @property
    def processor(self) -> str:
        """What computes: "cpu" or "cuda"."""
        return resolve_device(self.device)

    @property
    def batch(self) -> int:
        """Images a forward pass."""
        return self.batch_size or (256 if self.processor == "cuda" else 16)

    @property
    def readers(self) -> int:
        """Threads that read, decode and resize."""
        return self.workers or cores()

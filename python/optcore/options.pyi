from typing import Any, NamedTuple

class Option(NamedTuple):
    name: str
    range: int
    default: float | bool | str | None
    holder: str
    refused: int
    offset: int
    families: tuple[str, ...] = ...

GROUP: str
CALL: str
OPTIMIZER: str
RANGES: dict[int, str]
CHOICES: dict[str, tuple[str | None, ...]]
REFUSALS: dict[int, str]
OPTIONS: dict[str, Option]
FAMILIES: tuple[str, ...]
MOVING: tuple[str, ...]
ADAPTIVE: tuple[str, ...]
STORAGE: tuple[str, ...]
LASTING: tuple[str, ...]
GROUP_OPTIONS: dict[str, dict[str, Any]]
OPTIMIZER_OPTIONS: dict[str, Any]
KERNEL_OPTIONS: dict[str, Option]

def defaults_of(holder: str, family: str) -> dict[str, Any]: ...
def plain_number(value: object) -> float | None: ...
def running_power(beta: float, n: int) -> float: ...
def is_schedule(value: object) -> bool: ...
def checked(option: str, value: object, name: str) -> Any: ...

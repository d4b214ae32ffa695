from optcore.options import GROUP_OPTIONS as GROUP_OPTIONS
from optcore.options import LASTING as LASTING

OWN_KEYS: tuple[str, ...]
GROUP_NOTES: tuple[str, ...]

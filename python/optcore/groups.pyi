from optcore.options import GROUP_OPTIONS as GROUP_OPTIONS

OWN_KEYS: tuple[str, ...]
GROUP_NOTES: tuple[str, ...]

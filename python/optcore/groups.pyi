from optcore.options import GROUP_OPTIONS as GROUP_OPTIONS

GROUP_KEYS: tuple[str, ...]
GROUP_NOTES: tuple[str, ...]

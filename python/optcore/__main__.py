"""``python -m optcore`` prints what `optcore.show_config` prints."""
from optcore import show_config

show_config()

"""``python -m snpc.cli`` is the command ``snpc``."""

from snpc.cli import main

main()

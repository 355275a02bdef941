"""``python -m loraconv``."""

from loraconv.cli import main

main()

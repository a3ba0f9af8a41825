"""``python -m vivace.cli``: the command where no ``vivace`` is on the PATH, and under torchrun."""

from vivace.cli.main import main

main()

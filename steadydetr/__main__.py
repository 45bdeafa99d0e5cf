"""`python -m steadydetr`, and what torchrun starts."""

from steadydetr.cli import main

main()

"""`python -m steadydetr`, and what torchrun starts."""

from steadydetr.cli import main

if __name__ == "__main__":
    main()

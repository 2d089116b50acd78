"""`python -m vlbeit` and `torchrun -m vlbeit`: the same as the `vlbeit` command."""

from vlbeit.cli import command

if __name__ == "__main__":
    command()

"""`python -m torch_lab train …` is `torch-lab train …`."""

from torch_lab.cli import torch_lab_entry

if __name__ == "__main__":
    torch_lab_entry()

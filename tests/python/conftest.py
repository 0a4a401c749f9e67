"""What every test starts from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    """Seeds torch, whose generator a test may use without saying so: what passed once passes again."""
    torch.manual_seed(0)

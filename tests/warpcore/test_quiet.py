"""What libraries write in vain stays unwritten."""

import logging

from torch.distributed.checkpoint.logger import _dcp_logger

from warpcore.quiet import ignore_expected_warnings


def test_the_tensors_of_a_checkpoint_are_not_logged_one_by_one():
    _dcp_logger.setLevel(logging.DEBUG)  # as PyTorch has it
    ignore_expected_warnings()
    assert not _dcp_logger.isEnabledFor(logging.INFO)
    assert _dcp_logger.isEnabledFor(logging.ERROR)

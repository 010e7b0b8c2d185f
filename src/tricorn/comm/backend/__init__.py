"""``tricorn`` as a backend of ``torch.distributed``."""

from tricorn.comm.backend.group import TricornGroup, create

__all__ = ["TricornGroup", "create"]
